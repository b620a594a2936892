"""Processes that are one command: who started them, which of them tells what, how this command starts its like.

torchrun, the deepspeed launcher and srun start all processes, on any number of nodes, and say by environment variables
which process each is: torchrun's variables are the convention, and what the other two leave out of it is filled in.
`start_processes` is the launcher of commands that need no other, for this machine.
"""

import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vqt2i.errors import ResourceError, UserError
from vqt2i.runtime import is_first_process, pick_device, say

if TYPE_CHECKING:  # torch takes seconds to import, and who only starts others does without
    import torch.distributed as dist

T = TypeVar("T")
STOPPED = 75  # the exit code after a signal: EX_TEMPFAIL of sysexits.h, "try again later"
PARENT = "VQT2I_PARENT"  # the variable by which `start_processes` tells its processes who started them
LOOK_S = 0.5  # between two looks at what other processes tell
SILENCE_S = 600.0  # after which a process that waits for others gives up
WAIT_S = 0.1
GRACE_S = 60.0  # that processes have to end after a signal
LOADING = timedelta(minutes=10)  # for which others wait for what the first process reads
MEETING_S = 3.0  # how long a process that ends with an error waits for others that do
_calls = itertools.count()  # of from_first, the same in every process


class Stopped(SystemExit):
    """A command that was asked to stop has stopped, with all that is needed to go on later.

    The process exits with `STOPPED`.

    Only the first process does: Lightning's launcher kills the first process where another ends with an error.
    """

    def __init__(self) -> None:
        super().__init__(STOPPED if is_first_process() else 0)


ENDS = {"interrupt": KeyboardInterrupt, "stop": Stopped}


@cache  # of the start: Lightning sets such variables too, later
def find_launcher() -> str | None:
    """What has started this process and its like, None for nothing; completes the variables in the environment."""
    variables = os.environ
    if variables.get("SLURM_STEP_ID") and int(variables.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in variables:
        variables.update(_srun_variables())
        return "srun"
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= variables.keys():
        return None
    if "LOCAL_WORLD_SIZE" in variables:
        return "torchrun"
    if "LOCAL_SIZE" in variables:
        variables["LOCAL_WORLD_SIZE"] = variables["LOCAL_SIZE"]
        return "the deepspeed launcher"
    return None


def _srun_variables() -> dict[str, str]:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    slurm = {name: os.environ[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "NTASKS", "STEP_NUM_NODES")}
    nodes, job = os.environ["SLURM_STEP_NODELIST"], os.environ["SLURM_JOB_ID"]
    return {
        "RANK": slurm["PROCID"],
        "LOCAL_RANK": slurm["LOCALID"],
        "WORLD_SIZE": slurm["NTASKS"],
        "LOCAL_WORLD_SIZE": str(-(-int(slurm["NTASKS"]) // int(slurm["STEP_NUM_NODES"]))),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes)),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(15000 + int(job) % 10000)),  # jobs may share a node
    }


def from_first(work: Callable[[], T], timeout: timedelta) -> T:
    """What `work` gives, or the `UserError` it raises, in the first of the processes that a launcher has started.

    Processes that Lightning starts come later than this, and do the work again.
    """
    if find_launcher() is None:
        return work()
    key = f"from-first/{next(_calls)}"
    if not is_first_process():
        _meeting_point().wait([key], timeout)
        result, error = pickle.loads(_meeting_point().get(key))
        if error is not None:
            raise error
        return result
    try:
        result, error = work(), None
    except UserError as raised:
        result, error = None, raised
    _meeting_point().set(key, pickle.dumps((result, error)))
    if error is not None:
        raise error
    return result


@contextmanager
def one_command(stopped: str = "stopped before the first step; --resume goes on") -> Iterator[None]:
    """Make one command of the processes that a launcher or Lightning starts.

    A `UserError` that ends all ranks is told by the first, whose exit code is that of the command; the others exit
    with 0, for a launcher that sees another end with an error kills the first. One that ends some ranks is told by each
    of these, and the others, which lose their connection to them, end without a traceback.

    SIGTERM ends the command with the exit code of `Stopped`, telling `stopped`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if is_first_process():  # straight to the file, as in StepGuard
            os.write(2, f"SIGTERM: {stopped}\n".encode())
        raise Stopped

    terminate = signal.signal(signal.SIGTERM, stop)
    try:
        if find_launcher() is not None:
            _meeting_point()
        yield
    except Exception as error:
        if (store := _store()) is not None:
            _require_own(error, store)
        raise
    finally:
        # launchers send it to all when one rank has ended with an error, and it would become their exit code
        signal.signal(signal.SIGTERM, terminate if find_launcher() is None else signal.SIG_IGN)


def _require_own(error: Exception, store: "dist.Store") -> None:
    """Return where this rank is to tell its error; exit where another rank does.

    Raises:
        SystemExit: with 0 where all ranks end and the first tells it, with 2 where another rank has told it.
    """
    import torch.distributed as dist

    rank = int(os.environ["RANK"]) if "RANK" in os.environ else dist.get_rank()
    n_ranks = int(os.environ["WORLD_SIZE"]) if find_launcher() else dist.get_world_size()
    try:
        if isinstance(error, UserError):
            store.set("error", "")
            store.set(f"ended/{rank}", "")
            others = [f"ended/{other}" for other in range(n_ranks)] if rank == 0 else ["ended/0"]
            end = time.monotonic() + MEETING_S
            while not (met := store.check(others)) and time.monotonic() < end:
                time.sleep(0.05)
            if met and rank != 0:
                raise SystemExit(0)
        elif store.check(["error"]):
            raise SystemExit(2)
    except RuntimeError:  # the first process, which holds the store, is gone
        if not isinstance(error, UserError):
            say(f"rank {rank}: the first process is gone", every_process=True)
            raise SystemExit(1) from None


def _store() -> "dist.Store | None":
    import torch.distributed as dist

    if find_launcher() is not None:
        return _meeting_point()
    several = dist.is_initialized() and dist.get_world_size() > 1
    return dist.PrefixStore("vqt2i", dist.distributed_c10d._get_default_store()) if several else None


@cache
def _meeting_point() -> "dist.Store":
    """Where the processes of a launcher leave each other messages, before and beside their process group."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("vqt2i", store)


class Place(NamedTuple):
    """Which of a command's processes this is, and where it computes. n_sharing: how many compute on that device."""

    rank: int
    size: int
    device: str
    n_sharing: int


def find_place(devices: int | None) -> Place:
    """The place of this process. `devices`: how many processes were asked for; None is as many as were started.

    Raises:
        ResourceError: a launcher has started another number, or this machine has fewer GPUs.
    """
    launcher, device = find_launcher(), pick_device()
    if launcher is None:
        return Place(0, 1, str(device), 1)
    rank, size, n_here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if devices not in (None, size):
        raise ResourceError(f"--devices {devices}, but {launcher} started {size} processes; leave --devices out")
    if device.type != "cuda":
        return Place(rank, size, str(device), n_here)
    import torch

    n_gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if n_gpus == 1 and launcher == "srun":  # which may let each process see its own only
        local = 0
    elif n_here > n_gpus:
        raise ResourceError(f"{n_here} processes on this machine, but it has {n_gpus} GPUs; start one for each")
    return Place(rank, size, f"cuda:{local}", 1)


class Tally:
    """A count that the processes of a command keep together, through which they also learn that one has ended early.

    As a context: whatever ends one process ends the others at their next `add` or `look`: an interrupt or a stop as if
    they had got it too, an error without a word, for the process that has it tells it.
    """

    def __init__(self, on_more: Callable[[int], None], name: str = "") -> None:
        """on_more: called with what the count has grown by, over all processes. name: tells counts of a command apart,
        one after another."""
        self._on_more, self._own, self._total, self._key = on_more, 0, 0, f"count/{name}"
        self._store = _meeting_point() if find_launcher() is not None else None
        self._looked = self._changed = time.monotonic()

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None and self._store is not None:
            why = next((name for name, kinds in ENDS.items() if isinstance(error, kinds)), "error")
            with suppress(RuntimeError):  # the first process, which holds the store, is gone
                self._store.set("ended", why)

    def add(self, n: int) -> None:
        """Count n more; the other processes learn of it within a second or so."""
        self._own += n
        if self._store is None or time.monotonic() - self._looked >= LOOK_S:
            self.look()

    def look(self) -> None:
        """Tell the others what was counted here, and hear what they tell.

        Raises:
            UserError: no process has counted anything for SILENCE_S.
        """
        if self._store is None:
            self._own, n = 0, self._own
            self._on_more(n)
            return
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            raise SystemExit(1)  # who started this process is gone, and with it the command
        if self._store.check(["ended"]):
            why = self._store.get("ended").decode()
            raise ENDS[why]() if why in ENDS else SystemExit(0)
        before, self._total = self._total, self._store.add(self._key, self._own)
        self._own, self._looked = 0, time.monotonic()
        if self._total != before:
            self._changed = self._looked
            self._on_more(self._total - before)
        elif self._looked - self._changed > SILENCE_S:
            raise UserError(f"another process has done nothing for {SILENCE_S:.0f} s; see what it told")

    def wait(self) -> None:
        """Let the others work for a moment, and `look`."""
        time.sleep(WAIT_S)
        self.look()


def start_processes(n: int, argv: Sequence[str]) -> int:
    """Run `vqt2i` with these arguments as n processes of this machine, each with its share of the CPU's cores.

    They are told by torchrun's variables which they are. SIGINT or SIGTERM is passed on, and all have GRACE_S
    to end; a second one kills them. When a process ends with an error, the others are killed: what they do must be such
    that it may end at any time.

    Returns the exit code of the first process that did not end with 0, else 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    place = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             PARENT: os.getpid()}  # fmt: skip
    shared = {"OMP_NUM_THREADS": str(max(1, n_cores // n))} | os.environ | {k: str(v) for k, v in place.items()}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), shared.get("PYTHONPATH"))))
    main = "import sys; from vqt2i.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", main, *argv]  # -P: not what is called vqt2i in the current folder
    signals: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: signals.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(n):
            # a session of its own: Ctrl-C would reach it from the terminal and from here
            processes.append(subprocess.Popen(
                command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True
            ))  # fmt: skip
        return _watch(processes, signals)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen], signals: Sequence[int]) -> int:
    """The exit code of all, once all have ended or one has failed. `signals` fills with those to pass on."""
    end = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
        if None not in codes or (failed and not signals) or len(signals) > 1 or time.monotonic() > end:
            break
        if signals and end == float("inf"):
            for process in processes:
                process.send_signal(signals[0])
            end = time.monotonic() + GRACE_S
        time.sleep(0.05)
    if failed is None:
        return 128 + signals[0] if None in codes else 0
    rank, code = failed
    if code < 0:
        say(f"error: process {rank} of {len(processes)} was killed by {signal.Signals(-code).name}; "
            "was there too little memory?")  # fmt: skip
    return max(code, 1)

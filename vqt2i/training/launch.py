"""Who started the processes of a run, and how they are one command together.

Lightning starts further processes by itself, on this machine. torchrun, the deepspeed launcher and srun start all of
them, on any number of nodes, and say by environment variables which process each is: torchrun's variables are the
convention, and what the other two leave out of it is filled in.
"""

import itertools
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from vqt2i.errors import ConfigError, UserError
from vqt2i.runtime import is_first_process, say
from vqt2i.training.guard import Stopped

T = TypeVar("T")
MEETING_S = 3.0  # how long a rank that ends with an error waits for others that do
_calls = itertools.count()  # of from_first, the same in every process


class World(NamedTuple):
    """The processes of a run, one for each device. launcher: what started them; None where Lightning does."""

    n_nodes: int
    devices_per_node: int
    launcher: str | None

    @property
    def size(self) -> int:
        return self.n_nodes * self.devices_per_node


def find_world(devices: int | None) -> World:
    """The world of a run. `devices`: how many the settings ask for; None is as many as were started, else 1.

    Raises:
        ConfigError: a launcher has started another number, or not as many on every node.
    """
    launcher = find_launcher()
    if launcher is None:
        return World(1, devices or 1, None)
    n_processes, n_here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if n_processes % n_here:
        raise ConfigError(f"{launcher} started {n_processes} processes, {n_here} of them on this node; "
                          "start as many on every node")  # fmt: skip
    if devices not in (None, n_processes):
        raise ConfigError(f"trainer.devices is {devices}, but {launcher} started {n_processes} processes (over all "
                          f"nodes); start {devices}, or leave trainer.devices out")  # fmt: skip
    return World(n_processes // n_here, n_here, launcher)


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


def cluster_environment(world: World) -> ClusterEnvironment:
    """What tells Lightning about the world, whatever it would make of the environment by itself."""
    return LightningEnvironment() if world.launcher is None else TorchElasticEnvironment()


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
def one_command() -> Iterator[None]:
    """Make one command of the processes that a launcher or Lightning starts.

    A `UserError` that ends all ranks is told by the first, whose exit code is that of the command; the others exit
    with 0, for a launcher that sees another end with an error kills the first. One that ends some ranks is told by each
    of these, and the others, which lose their connection to them, end without a traceback.

    SIGTERM before the first step ends the command as it does later, with the exit code of `Stopped`.
    """
    terminate = signal.signal(signal.SIGTERM, _stop)
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


def _stop(number: int, frame: FrameType | None) -> None:
    if is_first_process():  # straight to the file, as in StepGuard
        os.write(2, b"SIGTERM: stopped before the first step; --resume goes on\n")
    raise Stopped


def _require_own(error: Exception, store: dist.Store) -> None:
    """Return where this rank is to tell its error; exit where another rank does.

    Raises:
        SystemExit: with 0 where all ranks end and the first tells it, with 2 where another rank has told it.
    """
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


def _store() -> dist.Store | None:
    if find_launcher() is not None:
        return _meeting_point()
    several = dist.is_initialized() and dist.get_world_size() > 1
    return dist.PrefixStore("vqt2i", dist.distributed_c10d._get_default_store()) if several else None


@cache
def _meeting_point() -> dist.Store:
    """Where the processes of a launcher leave each other messages, before and beside their process group."""
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("vqt2i", store)

"""The machine under us: seeds and random streams, device, precision, threads, progress and messages."""

import ctypes
import gc
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from vqt2i.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import and `--help` must not wait for it
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0  # of a long job's progress in a log file

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 of several, by what the launchers tell in the environment.

    Holds before `torch.distributed` is set up.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def say(message: str, *, every_process: bool = False) -> None:
    """Tell the user something on standard error: once (rank 0 only), or from wherever it happened."""
    if every_process or is_first_process():
        _console.print(message, markup=False)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self.unit}/s")


class _StepProgress(Progress):
    """A bar, and below it what the steps have come to."""

    def get_renderables(self) -> Iterator[Any]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["facts"], no_wrap=False, overflow="fold") for task in self.tasks)


@contextmanager
def step_bar(label: str, total: int) -> Iterator[Callable[[int, str], None] | None]:
    """Yield a function that shows how many steps are done and facts about them; None where no terminal is.

    Messages go above the bar, which is gone at the end, also where an error ends the work.
    """
    if not (_console.is_terminal and is_first_process()):
        yield None
        return
    with _StepProgress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=_console, transient=True
    ) as bar:
        task = bar.add_task(label, total=total, facts="")
        yield lambda done, facts: bar.update(task, completed=done, facts=facts)


@contextmanager
def counter(label: str, total: int | None, *, unit: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that counts work done, in whole or part units; rate and time left are shown.

    A terminal shows a bar. A log file gets a line every `SECONDS_BETWEEN_LINES`. One line with the rate ends both.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn()]
    start, done = time.monotonic(), 0.0
    told = start
    shown = _console.is_terminal and is_first_process()
    with Progress(*columns, console=_console, transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=total)

        def advance(count: float) -> None:
            nonlocal done, told
            done += count
            bar.advance(task, count)
            now = time.monotonic()
            if total and not _console.is_terminal and now - told >= SECONDS_BETWEEN_LINES:
                told, rate = now, done / (now - start)
                left = timedelta(seconds=round((total - done) / max(rate, 1e-9)))
                say(f"{label}: {int(done):,} of {total:,} {unit} ({rate:,.1f} {unit}/s, {left} left)")

        yield advance
    seconds = time.monotonic() - start
    say(f"{label}: {round(done):,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):,.1f} {unit}/s)")


def progress(items: Iterable[T], label: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate over `items`, counted by `counter`."""
    with counter(label, len(items) if total is None and hasattr(items, "__len__") else total, unit=unit) as advance:
        for item in items:
            yield item
            advance(1)


def stream_seed(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` only: the same in every process, for every batch split.

    Parts are hashed by their `repr`, so use plain ints and strings.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for its next tensors, where the C library is glibc.

    By itself glibc gives large blocks back to the system at once, and the page faults of fresh ones cost a training
    step of a 111 M model a tenth of its time (mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
        mallopt(trim_threshold, never)
        mallopt(mmap_threshold, never)


def find_cpp_compiler() -> str | None:
    """The C++ compiler, which torch.compile needs on CPUs: that of the variable CXX, else one that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def pick_device(name: str = "auto") -> "torch.device":
    """The device called `name`, or for "auto" CUDA where there is one, else Apple's GPU, else the CPU."""
    import torch

    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done what it was told; a CPU has."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pick_precision(name: Precision | Literal["auto"], device_type: str) -> Precision:
    """The precision called `name`, or for "auto" the fastest.

    Raises:
        ConfigError: fp16 without CUDA, whose loss scaling and kernels it needs.
    """
    if name == "fp16" and device_type != "cuda":
        raise ConfigError(f"precision fp16 needs a CUDA GPU, found {device_type}; take auto, fp32 or bf16")
    return fastest_precision(device_type) if name == "auto" else name


@cache
def fastest_precision(device_type: str) -> Precision:
    """fp32 or bf16, whichever multiplies matrices faster here.

    CUDA: bf16 where the card has it natively. CPU: measured once (about 0.5 s), because only recent server CPUs
    (AVX512-BF16, AMX) gain and others lose.
    """
    import torch

    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device_type != "cpu":
        return "fp32"
    # the shape of a small model's MLP over a training batch
    rates = {name: matmul_rate(device_type, name, (4096, 256, 1024)) for name in ("fp32", "bf16")}
    return "bf16" if rates["bf16"] > 1.2 * rates["fp32"] else "fp32"


def matmul_rate(device_type: str, precision: Precision, shape: tuple[int, int, int] = (1024, 1024, 1024)) -> float:
    """FLOP/s of matrix products (M, K) x (K, N) of that shape on this machine, measured at each call; see `best_rate`.

    What MFU is a share of: the rate that this machine reaches, not the one on its data sheet.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    m, k, n = shape if device_type == "cpu" else tuple(8 * size for size in shape)
    generator = torch.Generator(device_type).manual_seed(0)  # the global stream stays where it is
    x, w = (torch.randn(size, device=device_type, generator=generator).to(dtype) for size in ((m, k), (n, k)))
    y = x @ w.T  # written again and again: fresh memory for each product would take longer than the product
    return best_rate(lambda: torch.mm(x, w.T, out=y), 2 * m * k * n, device_type)


def memory_bandwidth(device_type: str, n_bytes: int = 2**29) -> float:
    """Bytes a second at which this machine reads memory, measured at each call: `best_rate` of passes over
    parts of a tensor.

    The parts are read in turns, so that each has left the processor's caches when its turn comes.
    """
    import torch

    n_parts = 16 if device_type == "cpu" else 1  # of milliseconds each; a GPU reads all of it in less
    parts = itertools.cycle(torch.ones(n_bytes // 4, device=device_type).chunk(n_parts))
    return best_rate(lambda: next(parts).amax(), n_bytes // n_parts, device_type)


def best_rate(action: Callable[[], Any], amount: float, device_type: str, seconds: float = 0.2) -> float:
    """`amount` a second by the fastest of the many short spells in which `action` is called again and again.

    The fastest, for what else runs on the machine can only slow it down; short, for a spell of a few milliseconds often
    passes undisturbed on a busy machine, one of a few hundred never. Memory read at 33 GB/s was measured as 15 to 26
    in spells of 20 ms beside other work, and as 33 in those of 2 ms.
    """
    import torch

    def spell() -> float:
        start = time.perf_counter()
        count = 0
        while count == 0 or time.perf_counter() - start < 0.002:
            action()
            count += 1
        if device_type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / count

    spell()  # memory is touched, kernels are made
    end, best = time.perf_counter() + seconds, spell()
    while time.perf_counter() < end:
        best = min(best, spell())
    return amount / best


def peak_memory(device: "torch.device") -> int:
    """The most bytes that this process has held at once: on a CUDA device as allocated by PyTorch, else of the host."""
    import resource  # not on Windows

    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage begins at what the process held that started this one
        with open("/proc/self/status", encoding="ascii") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: "torch.device") -> int:
    """Bytes that this process can still take: of the device, or of the host within its control groups' limits.

    What PyTorch keeps of a CUDA device for its own next tensors counts as free.
    """
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: what is in use cannot be told
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *control_group_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def control_group_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Bytes left under each memory limit that this process is under, of control groups version 1 and 2.

    membership: the file that names its groups, `/proc/self/cgroup`. root: where the groups are.
    """
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        names = {
            "": ("", "memory.max", "memory.current", "inactive_file "),
            "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        }
        if controllers not in names:
            continue
        top, limit, used, cached = names[controllers]
        group = (root / top / path.lstrip("/")).resolve()
        # in a container the path is that of the host, and its own group is the root
        for folder in (group, *group.parents):
            if folder.is_relative_to(root / top) and (folder / limit).is_file():
                most = (folder / limit).read_text().strip()
                if most != "max":
                    statistics = (folder / "memory.stat").read_text().splitlines()
                    files = sum(int(row.removeprefix(cached)) for row in statistics if row.startswith(cached))
                    yield max(0, int(most) - int((folder / used).read_text()) + files)


def measured_peak(device: "torch.device", work: Callable[[], T]) -> tuple[T, int | None]:
    """What `work` gives, and the bytes by which memory in use rose meanwhile, at the most; None where none can tell.

    On a CUDA device what PyTorch has allocated, on the host what of this process is in memory.
    """
    import torch

    gc.collect()  # what is garbage, and what malloc keeps of freed blocks, would hide as large a rise
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the highest is counted anew
        before = _resident("VmRSS")
    except OSError:
        return work(), None
    return work(), _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

"""Which way images are decoded: in plain PyTorch, by compiled steps, or whichever ends a job sooner."""

from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.utils._triton import has_triton

from vqt2i.config import Config, load_config, save_config
from vqt2i.errors import ConfigError
from vqt2i.files import cache_folder, sha256_of_parts
from vqt2i.generation.compiled import CompiledDrawing, CompiledEngine, Shape
from vqt2i.generation.decode import Drawing, PlainDrawing, Start, Texts
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT
from vqt2i.runtime import has_cpp_compiler, say, synchronize

EngineName = Literal["auto", "plain", "compiled"]

WARM_UP, TIMED = 2, 4  # tokens that are drawn plainly before it is decided: some to warm up, some that are timed
WARM_SHARE = 0.5  # of the time that steps took to compile, what they take again from the cache on disk


class Engine:
    """How a pipeline decodes. Keeps what it compiled for the jobs that follow.

    Args:
        name: "auto" is plain on CPUs, and on CUDA compiled where that ends a job sooner (`AutoStart`).

    Raises:
        ConfigError: no engine of this name, or nothing to compile with.
    """

    def __init__(self, name: EngineName, device: torch.device) -> None:
        if name not in get_args(EngineName):
            raise ConfigError(f"engine: found {name!r}, expected one of {', '.join(get_args(EngineName))}")
        missing = _missing_to_compile(device)
        if name == "compiled" and missing:
            raise ConfigError(f"engine compiled: {missing}; take the engine plain or auto")
        if name == "auto":
            name = "auto" if device.type == "cuda" and not missing else "plain"
        self.name = name
        self._compiled: CompiledEngine | None = None

    def start(self, gpt: GPT, n_images: int) -> Start:
        """How the batches of a job of so many images begin."""
        if self.name == "plain":
            return partial(PlainDrawing, gpt)
        if self._compiled is None or self._compiled.gpt is not gpt:
            self._compiled = CompiledEngine(gpt)
        return self._compiled if self.name == "compiled" else AutoStart(self._compiled, n_images)


class Measured(Config):
    """What compiling for a shape cost and brought; a YAML file in the folder `compiled` of the user's cache.

    compile_seconds: when it was last done. step_ratio: seconds of a compiled step in those of a plain one. n_times: how
    often it was measured. Before that guesses stand here.
    """

    compile_seconds: NonNegativeFloat = 60.0
    step_ratio: NonNegativeFloat = 0.5
    n_times: NonNegativeInt = 0

    def pays(self, plain_seconds: float, n_steps: int) -> bool:
        """Whether compiling now would save more than it takes, of steps that take `plain_seconds` each in PyTorch."""
        compile_seconds = self.compile_seconds * (WARM_SHARE if self.n_times == 1 else 1)
        return n_steps * plain_seconds * (1 - self.step_ratio) > compile_seconds


class AutoStart:
    """Begins the batches of one job: compiled where that has been done, else plainly until it is known what pays.

    After the first few tokens it is decided by the seconds that they took, the steps that are left in the job, and what
    was measured of this shape before: compiling pays if n_steps * seconds * (1 - step_ratio) > compile_seconds.
    """

    def __init__(self, compiled: CompiledEngine, n_images: int) -> None:
        self.compiled, self.n_left = compiled, n_images
        self._decided: set[Shape] = set()  # what stays plain in this job

    def __call__(self, texts: Texts, uniform_IB: Tensor, sampling: SamplingConfig) -> Drawing:
        """As `Start`."""
        n, n_images = uniform_IB.shape
        self.n_left -= n_images
        shape = self.compiled.shape(texts, sampling)
        found = self.compiled.find(shape)
        if found and found.is_ready:
            return self.compiled(texts, uniform_IB, sampling)
        plain = PlainDrawing(self.compiled.gpt, texts, uniform_IB, sampling)
        if shape in self._decided or n <= WARM_UP + TIMED:
            return plain
        self._decided.add(shape)
        later_steps = -(-max(0, self.n_left) // n_images) * n
        start = partial(self.compiled, texts, uniform_IB, sampling)
        return _Measuring(plain, start, n, later_steps, record_path(self.compiled.gpt, shape))


class _Measuring:
    """A drawing that begins plainly and goes on compiled if that pays, and remembers what it cost and brought."""

    def __init__(self, plain: PlainDrawing, start: partial[CompiledDrawing], n: int, later_steps: int, record: Path):
        self._drawing: PlainDrawing | CompiledDrawing = plain
        self._start, self._n, self._later_steps, self._record = start, n, later_steps, record
        self._device = plain.gpt.device
        self._measured = read_record(record)

    @property
    def image_BI(self) -> Tensor:
        return self._drawing.image_BI

    def step(self, index: int) -> None:
        """As `Drawing.step`."""
        if index == WARM_UP:
            self._since = self._now()
        if index == WARM_UP + TIMED:
            self._plain_seconds = (self._now() - self._since) / TIMED
            if self._measured.pays(self._plain_seconds, self._n - index + self._later_steps):
                self._compile(index)
                return
        self._drawing.step(index)
        if index == self._n - 1 and isinstance(self._drawing, CompiledDrawing):
            self._remember(index)

    def _compile(self, index: int) -> None:
        self._since = self._now()
        try:
            compiled = self._start(self.image_BI[:, :index])
            compiled.step(index)
        except RuntimeError as error:  # of PyTorch's compiler or its kernels; what was drawn so far is untouched
            say(f"engine: compiling failed, drawing goes on in plain PyTorch ({str(error).splitlines()[0]})")
            self._drawing.step(index)
        else:
            self._drawing = compiled

    def _remember(self, index: int) -> None:
        steps = self._drawing.steps
        seconds = self._now() - self._since - steps.compile_seconds
        n_steps = index + 1 - WARM_UP - TIMED - steps.n_slow
        ratio = seconds / n_steps / self._plain_seconds if n_steps > 0 else self._measured.step_ratio
        measured = Measured(
            compile_seconds=steps.compile_seconds, step_ratio=max(0.0, ratio), n_times=self._measured.n_times + 1
        )
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            save_config(measured, self._record)
        except OSError as error:
            say(f"{self._record}: cannot be written ({error.strerror}); what compiling costs is not remembered")

    def _now(self) -> float:
        synchronize(self._device)
        return perf_counter()


def record_path(gpt: GPT, shape: Shape) -> Path:
    """Where it is remembered what compiling for this shape costs with this model, PyTorch and device."""
    device = torch.cuda.get_device_name(gpt.device) if gpt.device.type == "cuda" else gpt.device.type
    key = sha256_of_parts(repr(gpt), repr(gpt.config.layout), repr(shape), torch.__version__, device)
    return cache_folder() / "compiled" / f"{key[:16]}.yaml"


def read_record(path: Path) -> Measured:
    """What is remembered there, else the guesses."""
    try:
        return load_config(Measured, path)
    except ConfigError:  # nothing there, or of another version
        return Measured()


def _missing_to_compile(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if has_triton() else "PyTorch finds no Triton for this GPU"
    if device.type == "cpu":
        return None if has_cpp_compiler() else "no C++ compiler (g++ or clang++) found"
    return f"the model is on {device}, expected cuda or cpu"

"""Which way images are decoded: in plain PyTorch, natively, by compiled steps, or whichever ends a job sooner."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.utils._triton import has_triton

from vqt2i.clip import CLIP
from vqt2i.config import Config, load_config, save_config
from vqt2i.errors import ConfigError
from vqt2i.files import cache_folder, sha256_of_parts
from vqt2i.generation.compiled import CompiledDrawing, CompiledEngine, Shape
from vqt2i.generation.decode import Drawing, PlainDrawing, Start
from vqt2i.generation.int8 import to_int8
from vqt2i.generation.native import NativeGPT, native_clip
from vqt2i.generation.rows import Job, count_runs
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT
from vqt2i.runtime import fastest_precision, find_cpp_compiler, say, synchronize

EngineName = Literal["auto", "plain", "native", "compiled"]
PrecisionName = Literal["auto", "fp32", "bf16", "int8"]

WARM_UP, TIMED = 2, 4  # tokens that are drawn plainly before it is decided: some to warm up, some that are timed
WARM_SHARE = 0.5  # of the time that steps took to compile, what they take again from the cache on disk


class Engine:
    """How a pipeline's GPT decodes and scores. Keeps what it made of the GPT for the jobs that follow.

    Args:
        name: "plain" is PyTorch's operators, "native" compiled C++ for CPUs (`NativeGPT`), "compiled" steps of fixed
            shapes by torch.compile (`CompiledEngine`). "auto" is native on CPUs where that can be, and on CUDA compiled
            where it ends a job sooner (`AutoStart`).
        precision: of matrices and products. "auto" is fp32 on CPUs, and on CUDA bf16 where the card has it.

    Raises:
        ConfigError: no engine or precision of this name, or not on this device.
    """

    def __init__(self, name: EngineName, precision: PrecisionName, device: torch.device) -> None:
        for label, value, type_ in (("engine", name, EngineName), ("precision", precision, PrecisionName)):
            if value not in get_args(type_):
                raise ConfigError(f"{label}: found {value!r}, expected one of {', '.join(get_args(type_))}")
        missing = _missing_to_compile(device)
        if name == "compiled" and missing:
            raise ConfigError(f"engine compiled: {missing}; take the engine plain or auto")
        if name == "auto" and device.type != "cpu" and (missing or device.type != "cuda"):
            name = "plain"
        if precision == "auto":
            precision = "fp32" if device.type == "cpu" else fastest_precision(device.type)
        self.name, self.precision, self.device = name, precision, device
        self._made: tuple[GPT, GPT | NativeGPT] | None = None
        self._made_clip: tuple[CLIP, CLIP] | None = None
        self._compiled: CompiledEngine | None = None

    def gpt(self, gpt: GPT) -> GPT | NativeGPT:
        """What decodes and scores in the GPT's place.

        Raises:
            ConfigError: the engine cannot be made of this GPT, on this machine or in this precision.
        """
        if self._made is None or self._made[0] is not gpt:
            self._made = gpt, self._make(gpt)
        return self._made[1]

    def _make(self, gpt: GPT) -> GPT | NativeGPT:
        if self.device.type == "cpu" and self.name in ("auto", "native"):
            try:
                return NativeGPT(gpt, self.precision)
            except ConfigError as error:
                if self.name == "native" or self.precision == "int8":
                    raise ConfigError(f"engine native: {error}") from error
                say(f"engine plain, several times slower: {error}")
        if self.precision == "fp32":
            return gpt
        if self.precision == "int8" and self.device.type == "cpu":
            raise ConfigError("precision int8: only the engine native has it on CPUs; take that, or bf16")
        half = copy.deepcopy(gpt).bfloat16()
        return half if self.precision == "bf16" else to_int8(half)

    def clip(self, clip: CLIP) -> CLIP:
        """What scores in the CLIP's place: faster where the engine is native, else itself."""
        if self._made is None or not isinstance(self._made[1], NativeGPT):
            return clip
        if self._made_clip is None or self._made_clip[0] is not clip:
            try:
                self._made_clip = clip, native_clip(clip, self.precision)
            except ConfigError:  # a width that native code lacks; the scorer is no bottleneck
                self._made_clip = clip, clip
        return self._made_clip[1]

    def start(self, gpt: GPT, n_images: int) -> Start:
        """How the batches of a job of so many images begin; raises as `gpt` does."""
        made = self.gpt(gpt)
        if self.name == "plain" or (self.device.type == "cpu" and self.name != "compiled"):
            return partial(PlainDrawing, made)
        if self._compiled is None or self._compiled.gpt is not made:
            self._compiled = CompiledEngine(made)
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

    def __call__(self, jobs: Sequence[Job], uniform_IB: Tensor, sampling: SamplingConfig) -> Drawing:
        """As `Start`."""
        n, n_images = uniform_IB.shape
        self.n_left -= n_images
        shape = self.compiled.shape(count_runs(job.condition for job in jobs), sampling)
        found = self.compiled.find(shape)
        if found and found.is_ready:
            return self.compiled(jobs, uniform_IB, sampling)
        plain = PlainDrawing(self.compiled.gpt, jobs, uniform_IB, sampling)
        if shape in self._decided or n <= WARM_UP + TIMED or not self.compiled.serves(jobs):
            return plain
        self._decided.add(shape)
        later_steps = -(-max(0, self.n_left) // n_images) * n
        start = partial(self.compiled, jobs, uniform_IB, sampling)
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

    def caption_scores(self) -> Tensor | None:
        """As `Drawing.caption_scores`."""
        return self._drawing.caption_scores()

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
        return None if find_cpp_compiler() else "no C++ compiler (CXX, g++ or clang++) found"
    return f"the model is on {device}, expected cuda or cpu"

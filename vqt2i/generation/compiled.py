"""Decoding by compiled steps: each token is one call of a step of fixed shapes, whose state stays in place.

A step reads the newest token where the one before wrote it, appends it to the caches, guides, filters, picks and writes
the next, all on the device: Python waits for nothing, passes nothing and gets nothing back. On CUDA it is recorded as a
CUDA graph. The candidates of a text share its keys as in plain decoding; what differs is that every prefix is padded to
the longest text, and that a step looks at all of an image's room, with what is not drawn yet hidden.

B batch (images, filled up to the room), G texts, I image ids, V vocabulary
"""

import os
import types
from collections.abc import Callable, Sequence
from math import gcd
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from vqt2i.files import cache_folder
from vqt2i.generation.decode import PlainDrawing
from vqt2i.generation.int8 import Int8Linear
from vqt2i.generation.rows import Job, Prefixes, count_runs, read_conditions
from vqt2i.generation.sampling import SamplingConfig, draw, guide
from vqt2i.gpt import GPT, Condition
from vqt2i.nn.cache import BranchedCache, StaticBranches
from vqt2i.runtime import synchronize

ROOMS_KEPT = 4  # compiled shapes whose tensors are kept, the last used ones
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SLOW_CALLS = 3  # of a step: the first compiles it, with CUDA graphs the second warms up and the third records

Step = Callable[["Room"], None]


class Shape(NamedTuple):
    """What a room is made and its steps are compiled for."""

    n_texts: int
    n_each: int
    guided: bool
    top_k: int | None
    top_p: float | None
    min_p: float | None
    dtype: torch.dtype


class Room:
    """The state of n_texts x n_each images being drawn, all of it in tensors that stay where they are."""

    def __init__(self, gpt: GPT, shape: Shape, read: Prefixes, null: Prefixes | None) -> None:
        self.gpt, self.shape = gpt, shape
        self.filters = SamplingConfig(top_k=shape.top_k, top_p=shape.top_p, min_p=shape.min_p)
        n, n_images = gpt.layout.image_length, shape.n_texts * shape.n_each

        def room_after(prefixes: Prefixes, n_prefixes: int) -> StaticBranches:
            length = prefixes.real_GP.shape[1]
            return StaticBranches(prefixes.cache, n_prefixes, n_images // n_prefixes, length, max(1, n - 1))

        self.conditional = room_after(read, shape.n_texts)
        self.null = room_after(null, 1) if null else None
        logits = read.logits_GV
        self.image_BI = logits.new_zeros(n_images, n, dtype=torch.long)
        self.uniform_IB = logits.new_zeros(n, n_images, dtype=torch.double)
        self.scale_I, self.temperature_I = (logits.new_ones(n, dtype=torch.float) for _ in range(2))
        for tensor in self._tensors:
            torch._dynamo.mark_static_address(tensor)

    @property
    def _tensors(self) -> list[Tensor]:
        own = [self.image_BI, self.uniform_IB, self.scale_I, self.temperature_I, *self.conditional.tensors]
        return own + (self.null.tensors if self.null else [])

    def pick(self, index_1: Tensor, logits_BV: Tensor, null_logits_BV: Tensor | None) -> None:
        """Guide, filter, pick: write the tokens of number `index_1`, (1,)."""
        if null_logits_BV is not None:
            logits_BV = guide(logits_BV.float(), null_logits_BV.float(), self.scale_I[index_1])
        uniform_B = self.uniform_IB.index_select(0, index_1).squeeze(0)
        token_B = draw(logits_BV, uniform_B, self.filters, self.temperature_I[index_1])
        self.image_BI.index_copy_(1, index_1, token_B[:, None])


def plain_step(room: Room) -> None:
    """The next token of every image, where guidance is off."""
    token_B1 = room.image_BI.index_select(1, room.conditional.n_filled)
    logits_BV = room.gpt.step(token_B1, BranchedCache([room.conditional]))[:, -1]
    room.pick(room.conditional.n_filled, logits_BV, None)


def guided_step(room: Room) -> None:
    """The next token of every image, where guidance is on."""
    token_B1 = room.image_BI.index_select(1, room.conditional.n_filled)
    both = BranchedCache([room.conditional, room.null])
    logits_BV, null_logits_BV = room.gpt.step(token_B1.repeat(2, 1), both)[:, -1].chunk(2)
    room.pick(room.conditional.n_filled, logits_BV, null_logits_BV)


def compile_step(step: Step, gpt: GPT, backend: str | Callable = "inductor") -> Step:
    """The step compiled for one room.

    What inductor makes is kept in the folder `inductor` of the user's cache, or in `TORCHINDUCTOR_CACHE_DIR` where that
    is set, so that the next process that meets the same step only traces it.
    """
    mode = None
    if backend == "inductor":
        _keep_what_is_compiled()
        if gpt.device.type == "cuda":
            # reduce-overhead is CUDA graphs; only Triton's own products widen 8-bit weights as they are read
            int8 = any(isinstance(module, Int8Linear) for module in gpt.modules())
            mode = "max-autotune" if int8 else "reduce-overhead"
    # code of its own for each room: PyTorch compiles one piece of code for eight shapes at most
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, mode=mode)


def _keep_what_is_compiled() -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes a second, for compiling only

    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():  # PyTorch may have set it to that
        os.environ[CACHE_VARIABLE] = str(cache_folder() / "inductor")


class Steps:
    """A room's two steps, compiled when they are first called."""

    def __init__(self, room: Room, compiler: Callable[[Step, GPT], Step]) -> None:
        self.room = room
        self._steps = {guided: compiler(guided_step if guided else plain_step, room.gpt) for guided in (False, True)}
        self._n_calls = {False: 0, True: 0}
        self.compile_seconds = 0.0  # of the calls that compile and record

    @property
    def is_ready(self) -> bool:
        """Whether a step has been compiled."""
        return any(self._n_calls.values())

    @property
    def n_slow(self) -> int:
        """How many calls compiled or recorded."""
        return sum(min(n, SLOW_CALLS) for n in self._n_calls.values())

    def __call__(self, guided: bool) -> None:
        device = self.room.gpt.device
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        if self._n_calls[guided] >= SLOW_CALLS:
            self._steps[guided](self.room)
            return
        synchronize(device)
        start = perf_counter()
        self._steps[guided](self.room)
        synchronize(device)
        self.compile_seconds += perf_counter() - start
        self._n_calls[guided] += 1


class CompiledDrawing:
    """Images drawn by compiled steps, in the first rows of a room."""

    def __init__(
        self,
        steps: Steps,
        prefixes: tuple[Prefixes, Prefixes | None],
        rows_G: Sequence[int],
        uniform_IB: Tensor,
        sampling: SamplingConfig,
        drawn_BI: Tensor | None,
    ) -> None:
        """rows_G: which of the prefixes each text of the room is. drawn_BI: tokens that there are already."""
        self.steps, room = steps, steps.room
        (read, null), n_images = prefixes, uniform_IB.shape[1]
        self.image_BI = room.image_BI[:n_images]
        room.uniform_IB[:, :n_images] = uniform_IB
        n = len(uniform_IB)
        room.scale_I.copy_(torch.tensor(sampling.guidance_scales(n)))
        room.temperature_I.copy_(torch.tensor(sampling.temperatures(n)))
        rows = torch.tensor(rows_G, device=uniform_IB.device)
        room.conditional.restart(read.cache, read.real_GP, rows)
        self.guided, self._null_is_behind = sampling.guided_tokens(n), True
        if null:
            room.null.restart(null.cache, null.real_GP, torch.zeros_like(rows[:1]))
        n_drawn = drawn_BI.shape[1] if drawn_BI is not None else 0
        if n_drawn:
            self.image_BI[:, :n_drawn] = drawn_BI
            self._catch_up(room.conditional, n_drawn)
        self._first = (read.logits_GV[rows].repeat_interleave(room.shape.n_each, dim=0), null and null.logits_GV)

    def step(self, index: int) -> None:
        """As `Drawing.step`."""
        guided, room = index in self.guided, self.steps.room
        if index == 0:
            logits_BV, null_logits_1V = self._first
            room.pick(room.conditional.n_filled, logits_BV, null_logits_1V.expand_as(logits_BV) if guided else None)
            return
        if guided and self._null_is_behind:
            self._catch_up(room.null, index)
            self._null_is_behind = False
        self.steps(guided)

    def caption_scores(self) -> None:
        """As `Drawing.caption_scores`; the rooms have none for texts behind images."""

    def _catch_up(self, branches: StaticBranches, n_drawn: int) -> None:
        """Let rows read, at once and uncompiled, all drawn tokens but the last: the next step reads that."""
        if n_drawn > 1:
            self.steps.room.gpt.step(self.steps.room.image_BI[:, : n_drawn - 1], BranchedCache([branches]))


class CompiledEngine:
    """Draws batches by compiled steps; keeps those of the last few shapes that it met, with their tensors.

    Args:
        compiler: makes a compiled step of a step.
    """

    def __init__(self, gpt: GPT, compiler: Callable[[Step, GPT], Step] = compile_step) -> None:
        self.gpt, self.compiler = gpt, compiler
        self._kept: list[Steps] = []  # the last used ones last

    def __call__(
        self, jobs: Sequence[Job], uniform_IB: Tensor, sampling: SamplingConfig, drawn_BI: Tensor | None = None
    ) -> CompiledDrawing | PlainDrawing:
        """As `Start`; goes on where tokens are drawn already, (B, their number).

        Negative and mixed prompts and images with fixed tokens are drawn plainly.
        """
        if not self.serves(jobs):
            return PlainDrawing(self.gpt, jobs, uniform_IB, sampling)
        conditions = count_runs(job.condition for job in jobs)
        gpt, shape = self.gpt, self.shape(conditions, sampling)
        read = read_conditions(gpt, [condition for condition, _ in conditions], whole=True)
        null = None
        if shape.guided:  # that of texts is as short in all batches
            led_from = [gpt.reader.null(jobs[0].condition)]
            null = read_conditions(gpt, led_from, whole=not gpt.layout.reads_text)
        steps = self.find(shape) or Steps(Room(gpt, shape, read, null), self.compiler)
        self._kept = [*(s for s in self._kept if s is not steps), steps][-ROOMS_KEPT:]
        rows_G = [row for row, (_, count) in enumerate(conditions) for _ in range(count // shape.n_each)]
        rows_G += rows_G[-1:] * (steps.room.shape.n_texts - shape.n_texts)
        return CompiledDrawing(steps, (read, null), rows_G, uniform_IB, sampling, drawn_BI)

    def serves(self, jobs: Sequence[Job]) -> bool:
        """Whether there is nothing but a condition for each image, and one null for all."""
        nulls = {self.gpt.reader.null(job.condition) for job in jobs}
        return len(nulls) == 1 and all(job.negative in (None, *nulls) and not (job.mixed or job.fixed) for job in jobs)

    def shape(self, conditions: Sequence[tuple[Condition, int]], sampling: SamplingConfig) -> Shape:
        """What these images need: every condition the same number of rows, those of more images several times."""
        counts = [count for _, count in conditions]
        n_each, guided = gcd(*counts), bool(sampling.guided_tokens(self.gpt.layout.image_length))
        filters = sampling.top_k, sampling.top_p, sampling.min_p
        return Shape(sum(counts) // n_each, n_each, guided, *filters, self.gpt.cached_dtype)

    def find(self, shape: Shape) -> Steps | None:
        """The kept steps that fit, of the smallest number of texts."""
        fitting = [
            steps for steps in self._kept
            if steps.room.shape.n_texts >= shape.n_texts
            and steps.room.shape._replace(n_texts=shape.n_texts) == shape
        ]  # fmt: skip
        return min(fitting, key=lambda steps: steps.room.shape.n_texts, default=None)

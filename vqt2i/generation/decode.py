"""Image ids from conditions: prefill each distinct one once, share it among its candidates, step all images together.

B batch (images), I image ids
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vqt2i.generation.jacobi import jacobi_passes
from vqt2i.generation.rows import DRAWN, GuidedRows, Job, fixed_ids
from vqt2i.generation.sampling import SamplingConfig, draw
from vqt2i.gpt import GPT
from vqt2i.runtime import stream_seed

OnToken = Callable[[int], None]
OnPartial = Callable[[Sequence[Job], Callable[[], Tensor]], None]
OnPasses = Callable[[Job, int], None]
OnCaption = Callable[[Job, float], None]


class Drawing(Protocol):
    """A batch of images, rows in the order of their jobs, of which `image_BI` holds what is drawn."""

    image_BI: Tensor

    def step(self, index: int) -> None:
        """Draw token number `index` of every image; called for each, from the first to the last."""

    def caption_scores(self) -> Tensor | None:
        """Of the images, which are done, as `GuidedRows.caption_scores`; called once at most."""


class Start(Protocol):
    """How a batch is drawn: reads the conditions; `uniform_IB` are the numbers in [0, 1) that pick the tokens."""

    def __call__(self, jobs: Sequence[Job], uniform_IB: Tensor, sampling: SamplingConfig) -> Drawing: ...


@torch.inference_mode()
def decode_image_ids(
    gpt: GPT,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    seed: int,
    *,
    start: Start | None = None,
    rows_at_once: int = 64,
    on_token: OnToken | None = None,
    on_partial: OnPartial | None = None,
    on_passes: OnPasses | None = None,
    on_caption: OnCaption | None = None,
) -> Tensor:
    """Draw the ids of every job's image, (jobs, grid height, grid width) on the CPU.

    Args:
        gpt: or what has its `layout`, `reader`, `device`, `prefill` and `step`.
        start: how a batch is drawn; None is by a `PlainDrawing`. Changes speed, not the images.
        rows_at_once: images decoded together; a guided token takes two rows of each. Changes memory and speed, not the
            images. With a `jacobi_window` each is drawn alone, for each goes on at a pace of its own.
        on_token: called with the number of tokens that were drawn, after each step.
        on_partial: called after each step with the images being drawn and a function that returns the ids that they
            have so far, (images, tokens) on the CPU. Calling that function waits for the device; not calling it costs
            nothing.
        on_passes: called with each image that is done and how many passes of the GPT it took, that of its
            condition included: as many as tokens that were drawn, or fewer with a `jacobi_window`.
        on_caption: called with each image that is done and the caption score of its text, where drawing it brings that
            nearly for nothing (`GuidedRows.caption_scores`).
    """
    if sampling.jacobi_window is None:
        size, decode = rows_at_once, partial(_decode_batch, start=start or partial(PlainDrawing, gpt))
    else:
        size, decode = len(jobs), _decode_in_turn
    told = _Told(on_token, on_partial, on_passes, on_caption)
    parts = [decode(gpt, jobs[first : first + size], sampling, seed, told) for first in range(0, len(jobs), size)]
    layout = gpt.layout.config
    return torch.cat(parts).reshape(len(jobs), layout.grid_height, layout.grid_width)


def stream(job: Job, seed: int) -> np.random.Generator:
    """The random numbers of an image: a function of (seed, prompt, image) alone."""
    return np.random.default_rng(stream_seed("image", seed, job.prompt_index, job.image_index))


def uniforms(job: Job, seed: int, n: int) -> np.ndarray:
    """The numbers in [0, 1) that pick the image's n tokens: a function of (seed, prompt, image, token) alone."""
    return stream(job, seed).random(n)


class _Told(NamedTuple):
    """Who is told what of the drawing; see `decode_image_ids`."""

    token: OnToken | None
    partial: OnPartial | None
    passes: OnPasses | None
    caption: OnCaption | None


class PlainDrawing:
    """Step by step, with a `gpt` that has the `layout`, `reader`, `device`, `prefill` and `step` of `GPT`."""

    def __init__(self, gpt: GPT, jobs: Sequence[Job], uniform_IB: Tensor, sampling: SamplingConfig) -> None:
        self.gpt, self.uniform_IB, self.sampling = gpt, uniform_IB, sampling
        n = len(uniform_IB)
        self.temperatures, self.rows = sampling.temperatures(n), GuidedRows(gpt, jobs, sampling)
        self.image_BI = torch.empty(len(jobs), n, dtype=torch.long, device=gpt.device)
        fixed_BI = fixed_ids(jobs, n)
        self.fixed_BI, self.all_fixed_I = fixed_BI.to(gpt.device), (fixed_BI != DRAWN).all(0).tolist()

    def step(self, index: int) -> None:
        """As `Drawing.step`. What is fixed in all images is read with the next token that is drawn, in one pass."""
        token_B = self.fixed_BI[:, index]
        if not self.all_fixed_I[index]:
            logits_BV = self.rows.logits(self.image_BI[:, :index])[:, -1]
            drawn_B = draw(logits_BV, self.uniform_IB[index], self.sampling, self.temperatures[index])
            token_B = torch.where(token_B == DRAWN, drawn_B, token_B)
        self.image_BI[:, index] = token_B

    def caption_scores(self) -> Tensor | None:
        """As `Drawing.caption_scores`."""
        return self.rows.caption_scores(self.image_BI)


def _decode_batch(
    gpt: GPT,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    seed: int,
    told: _Told,
    *,
    start: Start,
) -> Tensor:
    """All images together, a token of each in a step."""
    n = gpt.layout.image_length
    # images of one condition stand together, and conditions of equally many images, so that they share prefixes and
    # products; those of one null condition before all
    counts, null = Counter(job.condition for job in jobs), gpt.reader.null
    keys = [(null(job.condition), counts[job.condition], job.condition) for job in jobs]
    order = sorted(range(len(jobs)), key=keys.__getitem__)
    inverse = torch.tensor(order).argsort()
    uniform_IB = torch.from_numpy(np.stack([uniforms(jobs[i], seed, n) for i in order], axis=1)).to(gpt.device)
    drawing = start([jobs[i] for i in order], uniform_IB, sampling)
    for index in range(n):
        drawing.step(index)
        if told.token:
            told.token(len(jobs))
        if told.partial:
            told.partial(jobs, lambda n_drawn=index + 1: drawing.image_BI[:, :n_drawn].cpu()[inverse])
    for job in jobs if told.passes else ():
        told.passes(job, job.n_passes(n))
    if told.caption and (score_B := drawing.caption_scores()) is not None:
        for job, score in zip(jobs, score_B.cpu()[inverse].tolist(), strict=True):
            told.caption(job, score)
    return drawing.image_BI.cpu()[inverse]


def _decode_in_turn(
    gpt: GPT,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    seed: int,
    told: _Told,
) -> Tensor:
    """One image after the other, several tokens of it in a step."""
    images = []
    for _, group in groupby(jobs, key=lambda job: job.conditions):
        group = list(group)
        rows = GuidedRows(gpt, group[:1], sampling)
        for job in group:
            rows.rewind_to(0)
            n_passes = n_drawn = 0
            for ids_1I in jacobi_passes(rows, job, sampling, stream(job, seed)):
                n_passes += 1
                if told.token:
                    told.token(ids_1I.shape[1] - n_drawn)
                if told.partial:
                    told.partial([job], ids_1I.cpu)
                n_drawn = ids_1I.shape[1]
            if told.passes:
                told.passes(job, n_passes)
            images.append(ids_1I.cpu())
    return torch.cat(images)

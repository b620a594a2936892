"""Image ids from texts: prefill each distinct text once, share it among its candidates, step all images together.

B batch (images), I image ids, V vocabulary
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vqt2i.generation.sampling import SamplingConfig, draw, guide
from vqt2i.gpt import GPT
from vqt2i.nn.cache import BranchedCache, Branches, PrefixCache
from vqt2i.runtime import stream_seed
from vqt2i.text import TextBatch, pad_texts


class Job(NamedTuple):
    """One image to draw: the ids of its text, and the numbers that, with the seed, make its random stream."""

    text_ids: tuple[int, ...]
    prompt_index: int
    image_index: int


Texts = Sequence[tuple[tuple[int, ...], int]]  # distinct texts, each with the number of images that it stands for


class Drawing(Protocol):
    """A batch of images, rows in the order of their texts, of which `image_BI` holds what is drawn."""

    image_BI: Tensor

    def step(self, index: int) -> None:
        """Draw token number `index` of every image; called for each, from the first to the last."""


class Start(Protocol):
    """How a batch is drawn: reads the texts; `uniform_IB` are the numbers in [0, 1) that pick the tokens."""

    def __call__(self, texts: Texts, uniform_IB: Tensor, sampling: SamplingConfig) -> Drawing: ...


@torch.inference_mode()
def decode_image_ids(
    gpt: GPT,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    seed: int,
    *,
    start: Start | None = None,
    rows_at_once: int = 64,
    on_token: Callable[[int], None] | None = None,
    on_partial: Callable[[Sequence[Job], Callable[[], Tensor]], None] | None = None,
) -> Tensor:
    """Draw the ids of every job's image, (jobs, grid height, grid width) on the CPU.

    Args:
        start: how a batch is drawn; None is by a `PlainDrawing` of the GPT. Changes speed, not the images.
        rows_at_once: images decoded together; a guided token takes two rows of each. Changes memory and speed, not the
            images.
        on_token: called with the number of images that got a token, after each step.
        on_partial: called after each step with the images being drawn and a function that returns the ids that they
            have so far, (images, tokens) on the CPU. Calling that function waits for the device; not calling it costs
            nothing.
    """
    start = start or partial(PlainDrawing, gpt)
    parts = [
        _decode_batch(gpt, jobs[first : first + rows_at_once], sampling, seed, start, on_token, on_partial)
        for first in range(0, len(jobs), rows_at_once)
    ]
    layout = gpt.layout.config
    return torch.cat(parts).reshape(len(jobs), layout.grid_height, layout.grid_width)


def uniforms(job: Job, seed: int, n: int) -> np.ndarray:
    """The numbers in [0, 1) that pick the image's n tokens: a function of (seed, prompt, image, token) alone."""
    return np.random.default_rng(stream_seed("image", seed, job.prompt_index, job.image_index)).random(n)


def _decode_batch(
    gpt: GPT,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    seed: int,
    start: Start,
    on_token: Callable[[int], None] | None,
    on_partial: Callable[[Sequence[Job], Callable[[], Tensor]], None] | None,
) -> Tensor:
    n = gpt.layout.image_length
    # images of one text stand together, and texts of equally many images, so that they share prefixes and products
    counts = Counter(job.text_ids for job in jobs)
    order = sorted(range(len(jobs)), key=lambda i: (counts[jobs[i].text_ids], jobs[i].text_ids))
    inverse = torch.tensor(order).argsort()
    uniform_IB = torch.from_numpy(np.stack([uniforms(jobs[i], seed, n) for i in order], axis=1)).to(gpt.device)
    drawing = start(sorted(counts.items(), key=lambda item: (item[1], item[0])), uniform_IB, sampling)
    for index in range(n):
        drawing.step(index)
        if on_token:
            on_token(len(jobs))
        if on_partial:
            on_partial(jobs, lambda n_drawn=index + 1: drawing.image_BI[:, :n_drawn].cpu()[inverse])
    return drawing.image_BI.cpu()[inverse]


class PlainDrawing:
    """Step by step in plain PyTorch, with a `gpt` that has the `layout`, `device`, `prefill` and `step` of `GPT`."""

    def __init__(self, gpt: GPT, texts: Texts, uniform_IB: Tensor, sampling: SamplingConfig) -> None:
        self.gpt, self.uniform_IB, self.sampling = gpt, uniform_IB, sampling
        n, n_images = uniform_IB.shape
        self.guided = sampling.guided_tokens(n)
        self.logits_BV, branches = _prefilled(gpt, texts)
        self.conditional = self.both = BranchedCache(branches)
        if self.guided:  # the null condition is the empty text; one prefix of it serves all images
            self.null_logits_BV, branches = _prefilled(gpt, [((), n_images)])
            self.null = BranchedCache(branches)
            self.both = BranchedCache([*self.conditional.branches, *self.null.branches])
        self.image_BI = torch.empty(n_images, n, dtype=torch.long, device=gpt.device)

    def step(self, index: int) -> None:
        """As `Drawing.step`."""
        if index:
            self._score(index)
        logits_BV = self.logits_BV
        if index in self.guided:
            logits_BV = guide(logits_BV.float(), self.null_logits_BV.float(), self.sampling.guidance)
        self.image_BI[:, index] = draw(logits_BV, self.uniform_IB[index], self.sampling)

    def _score(self, index: int) -> None:
        """The logits of token number `index`, from the one before it."""
        token_B1 = self.image_BI[:, index - 1 : index]
        if index not in self.guided:
            self.logits_BV = self.gpt.step(token_B1, self.conditional)[:, -1]
        elif self.null.n_filled == self.conditional.n_filled:
            self.logits_BV, self.null_logits_BV = self.gpt.step(token_B1.repeat(2, 1), self.both)[:, -1].chunk(2)
        else:  # guidance begins: the null rows read all tokens so far at once
            self.logits_BV = self.gpt.step(token_B1, self.conditional)[:, -1]
            self.null_logits_BV = self.gpt.step(self.image_BI[:, :index], self.null)[:, -1]


class Prefixes(NamedTuple):
    """Texts that were read: the logits of their images' first token, (G, V), their keys, and which are no padding."""

    logits_GV: Tensor
    cache: PrefixCache
    real_GP: Tensor


def read_texts(gpt: GPT, texts: Sequence[Sequence[int]], length: int) -> Prefixes:
    """Read texts as prefixes of images, each cut or padded to `length` ids."""
    text = TextBatch(*(t.to(gpt.device) for t in pad_texts([list(ids) for ids in texts], length)))
    prefix = gpt.layout.text_prefix(text)
    return Prefixes(*gpt.prefill(prefix), prefix.real_BL)


def _prefilled(gpt: GPT, texts: Texts) -> tuple[Tensor, list[Branches]]:
    """The logits of the images' first tokens, (B, V), and their branches; texts of equally many are read together."""
    logits, branches = [], []
    for n_each, group in groupby(texts, key=lambda item: item[1]):
        ids = [text for text, _ in group]
        # padded to the longest of them only: what is not there costs nothing in any step
        longest = min(max(1, *map(len, ids)), gpt.layout.config.text_length)
        read = read_texts(gpt, ids, longest)
        logits.append(read.logits_GV.repeat_interleave(n_each, dim=0))
        branches.append(Branches(read.cache, read.real_GP, n_each, gpt.layout.image_length - 1))
    return torch.cat(logits), branches

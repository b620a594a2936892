"""Image ids from texts: prefill each distinct text once, share it among its candidates, step all images together.

B batch (images), I image ids, V vocabulary
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqt2i.generation.sampling import SamplingConfig, draw, guide
from vqt2i.gpt import GPT
from vqt2i.nn.cache import BranchedCache, Branches
from vqt2i.runtime import stream_seed
from vqt2i.text import TextBatch, pad_texts


class Job(NamedTuple):
    """One image to draw: the ids of its text, and the numbers that, with the seed, make its random stream."""

    text_ids: tuple[int, ...]
    prompt_index: int
    image_index: int


class _Prefilled(NamedTuple):
    """Rows that have read their prefix: the logits of their first token, (B, V), and their branches."""

    logits_BV: Tensor
    branches: list[Branches]


@torch.inference_mode()
def decode_image_ids(
    gpt: GPT,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    seed: int,
    *,
    rows_at_once: int = 64,
    on_token: Callable[[int], None] | None = None,
    on_partial: Callable[[Sequence[Job], Callable[[], Tensor]], None] | None = None,
) -> Tensor:
    """Draw the ids of every job's image, (jobs, grid height, grid width) on the CPU.

    Args:
        gpt: or its twin from `to_int8`, which is faster on CPUs and draws other images.
        rows_at_once: images decoded together; a guided token takes two rows of each. Changes memory and speed, not the
            images.
        on_token: called with the number of images that got a token, after each step.
        on_partial: called after each step with the images being drawn and a function that returns the ids that they
            have so far, (images, tokens) on the CPU. Calling that function waits for the device; not calling it costs
            nothing.
    """
    parts = [
        _decode_batch(gpt, jobs[start : start + rows_at_once], sampling, seed, on_token, on_partial)
        for start in range(0, len(jobs), rows_at_once)
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
    on_token: Callable[[int], None] | None,
    on_partial: Callable[[Sequence[Job], Callable[[], Tensor]], None] | None,
) -> Tensor:
    n, device = gpt.layout.image_length, gpt.device
    # images of one text stand together, and texts of equally many images, so that they share prefixes and products
    counts = Counter(job.text_ids for job in jobs)
    order = sorted(range(len(jobs)), key=lambda i: (counts[jobs[i].text_ids], jobs[i].text_ids))
    inverse = torch.tensor(order).argsort()
    uniform_IB = torch.from_numpy(np.stack([uniforms(jobs[i], seed, n) for i in order], axis=1)).to(device)
    guided = sampling.guided_tokens(n)

    logits, branches = _prefill(gpt, sorted(counts.items(), key=lambda item: (item[1], item[0])))
    conditional = both = BranchedCache(branches)
    if guided:  # the null condition is the empty text; one prefix of it serves all images
        null_logits, branches = _prefill(gpt, [((), len(jobs))])
        null = BranchedCache(branches)
        both = BranchedCache([*conditional.branches, *null.branches])

    image_BI = torch.empty(len(jobs), n, dtype=torch.long, device=device)
    for index in range(n):
        if index in guided:
            logits = guide(logits.float(), null_logits.float(), sampling.guidance)
        image_BI[:, index] = draw(logits, uniform_IB[index], sampling)
        if index + 1 < n:
            token_B1 = image_BI[:, index : index + 1]
            if index + 1 not in guided:
                logits = gpt.step(token_B1, conditional)[:, -1]
            elif null.n_filled == conditional.n_filled:
                logits, null_logits = gpt.step(token_B1.repeat(2, 1), both)[:, -1].chunk(2)
            else:  # guidance begins: the null rows read all tokens so far at once
                logits = gpt.step(token_B1, conditional)[:, -1]
                null_logits = gpt.step(image_BI[:, : index + 1], null)[:, -1]
        if on_token:
            on_token(len(jobs))
        if on_partial:
            on_partial(jobs, lambda n_drawn=index + 1: image_BI[:, :n_drawn].cpu()[inverse])
    return image_BI.cpu()[inverse]


def _prefill(gpt: GPT, texts: Sequence[tuple[tuple[int, ...], int]]) -> _Prefilled:
    """Read each text once for as many images as stand beside it; equal numbers stand together."""
    logits, branches = [], []
    for n_each, group in groupby(texts, key=lambda item: item[1]):
        ids = [list(text) for text, _ in group]
        # padded to the longest of them only: what is not there costs nothing in any step
        longest = min(max(1, *map(len, ids)), gpt.layout.config.text_length)
        text = TextBatch(*(t.to(gpt.device) for t in pad_texts(ids, longest)))
        prefix = gpt.layout.text_prefix(text)
        logits_BV, cache = gpt.prefill(prefix)
        logits.append(logits_BV.repeat_interleave(n_each, dim=0))
        branches.append(Branches(cache, prefix.real_BL, n_each, gpt.layout.image_length - 1))
    return _Prefilled(torch.cat(logits), branches)

"""Image ids from conditions: prefill each distinct one once, share it among its candidates, step all images together.

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
from vqt2i.gpt import GPT, Condition
from vqt2i.nn.cache import BranchedCache, Branches
from vqt2i.runtime import stream_seed


class Job(NamedTuple):
    """One image to draw: its condition (of a text, the ids), and what with the seed makes its random stream."""

    condition: Condition
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
    # images of one condition stand together, and conditions of equally many images, so that they share prefixes and
    # products; those of one null condition before all, for their rows are shared too
    counts, null = Counter(job.condition for job in jobs), gpt.reader.null
    keys = [(null(job.condition), counts[job.condition], job.condition) for job in jobs]
    order = sorted(range(len(jobs)), key=keys.__getitem__)
    inverse = torch.tensor(order).argsort()
    uniform_IB = torch.from_numpy(np.stack([uniforms(jobs[i], seed, n) for i in order], axis=1)).to(device)
    guided = sampling.guided_tokens(n)

    logits, branches = _prefill(gpt, [(condition, n_each) for _, n_each, condition in sorted(set(keys))])
    conditional = both = BranchedCache(branches)
    if guided:  # one prefix of a null condition serves all its images
        null_logits, branches = _prefill(gpt, sorted(Counter(null for null, _, _ in keys).items()))
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


def _prefill(gpt: GPT, conditions: Sequence[tuple[Condition, int]]) -> _Prefilled:
    """Read each condition once for as many images as stand beside it; equal numbers side by side are read together."""
    logits, branches = [], []
    for n_each, group in groupby(conditions, key=lambda item: item[1]):
        prefix = gpt.reader(gpt.reader.collate([condition for condition, _ in group], gpt.device))
        logits_BV, cache = gpt.prefill(prefix)
        logits.append(logits_BV.repeat_interleave(n_each, dim=0))
        branches.append(Branches(cache, prefix.real_BL, n_each, gpt.layout.image_length - 1))
    return _Prefilled(torch.cat(logits), branches)

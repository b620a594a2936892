"""Image ids from texts: prefill each distinct text once, share it among its candidates, step all images together.

B batch (images), I image ids, P prefix length, V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqt2i.generation.sampling import SamplingConfig, draw, guide
from vqt2i.gpt import GPT
from vqt2i.nn.transformer import KVCache
from vqt2i.runtime import stream_seed
from vqt2i.text import pad_texts


class Job(NamedTuple):
    """One image to draw: the ids of its text, and the numbers that, with the seed, make its random stream."""

    text_ids: tuple[int, ...]
    prompt_index: int
    image_index: int


class _Started(NamedTuple):
    """After the prefill: next logits, cache, prefix mask. Conditional rows first and then, if guided, the null rows."""

    logits_BV: Tensor
    cache: KVCache
    real_BP: Tensor


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
        rows_at_once: images decoded together; guided, each takes two rows. Changes memory and speed, not the images.
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
    n, device = gpt.layout.image_length, gpt.embedding.weight.device
    uniform_IB = torch.from_numpy(np.stack([uniforms(job, seed, n) for job in jobs], axis=1)).to(device)
    guided = sampling.guidance != 1
    # rows of one text stand together, so that each distinct text is prefilled once
    order = sorted(range(len(jobs)), key=lambda i: jobs[i].text_ids)
    started = _start(gpt, [jobs[i].text_ids for i in order], guided)
    uniform_IB = uniform_IB[:, order]
    inverse = torch.empty(len(order), dtype=torch.long).scatter_(0, torch.tensor(order), torch.arange(len(order)))
    logits, image_ids = started.logits_BV, []

    def drawn_BI() -> Tensor:
        return torch.stack(image_ids, dim=1).cpu()[inverse]

    for index in range(n):
        if guided:
            logits = guide(*logits.float().chunk(2), sampling.guidance)
        drawn_B = draw(logits, uniform_IB[index], sampling)
        image_ids.append(drawn_B)
        if index + 1 < n:
            rows_B = drawn_B.repeat(2) if guided else drawn_B
            logits = gpt.step(rows_B, index, started.real_BP, started.cache)
        if on_token:
            on_token(len(jobs))
        if on_partial:
            on_partial(jobs, drawn_BI)
    return drawn_BI()


def _start(gpt: GPT, texts: Sequence[tuple[int, ...]], guided: bool) -> _Started:
    distinct = list(dict.fromkeys(texts))
    counts = [texts.count(text) for text in distinct]
    if guided:  # the null condition is the empty text; one row of it serves all images
        distinct, counts = [*distinct, ()], [*counts, len(texts)]
    text = pad_texts([list(text) for text in distinct], gpt.layout.config.text_length)
    device = gpt.embedding.weight.device
    prefix = gpt.layout.text_prefix(type(text)(*(t.to(device) for t in text)))
    logits, cache = gpt.prefill(prefix, gpt.layout.prefix_length)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    return _Started(logits[rows], cache.repeat(counts, gpt.layout.length - 1), prefix.real_BL[rows])

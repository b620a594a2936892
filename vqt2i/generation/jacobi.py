"""Speculative Jacobi decoding: several tokens of an image out of one pass of the GPT, exact in distribution.

A window of draft tokens is read at once, which gives the distribution of each after those before it. From the left on,
drafts are accepted as in speculative sampling; what follows the first that was rejected is drafted again (Teng et al.
2024, arXiv 2410.01699). Differs: what is drafted again keeps its token as often as the old and the new
distribution allow, by the rule that accepts (So et al. 2025, MC-SJD, arXiv 2510.24211), so that drafts settle instead
of being drawn afresh; and a draft that is new to the window repeats the token before it, with probability 1.

W window, V vocabulary, I image ids
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.generation.rows import DRAWN, GuidedRows, Job, fixed_ids
from vqt2i.generation.sampling import SamplingConfig, filter_logits, pick_by_weight


def jacobi_passes(rows: GuidedRows, job: Job, sampling: SamplingConfig, rng: np.random.Generator) -> Iterator[Tensor]:
    """Draw the tokens of one image; yields after each pass of the GPT those that are final, (1, tokens so far).

    A token that the job fixes is its own draft, of probability 1, so that the window reaches over it.

    Args:
        rows: those of the image alone, without image tokens.
    """
    n, device = rows.gpt.layout.image_length, rows.gpt.device
    temperature_I1 = torch.tensor(sampling.temperatures(n), device=device)[:, None]
    image_1I = fixed_ids([job], n).to(device)
    fixed_I = image_1I[0].clone()

    def first_drawn(start: int) -> int:
        """The first token from `start` on that is not fixed."""
        return next((at for at in range(start, n) if not job.fixed or job.fixed[at] is None), n)

    def distributions(start: int, end: int) -> Tensor:
        """Of the tokens `start` to `end`, each after those before it."""
        logits_WV = rows.logits(image_1I[:, : end - 1], end - start)[0]
        drawn_WV = filter_logits(logits_WV, sampling, temperature_I1[start:end]).double().softmax(-1)
        fixed_W1 = fixed_I[start:end, None]
        certain_WV = F.one_hot(fixed_W1[:, 0].clamp_min(0), drawn_WV.shape[-1])
        return torch.where(fixed_W1 == DRAWN, drawn_WV, certain_WV)

    n_final = first_drawn(0)
    if n_final == n:
        yield image_1I
        return
    new_WV = distributions(n_final, n_final + 1)
    image_1I[:, n_final] = pick_by_weight(new_WV, torch.from_numpy(rng.random(1)).to(device))
    n_final, old_WV = first_drawn(n_final + 1), new_WV[1:]
    yield image_1I[:, :n_final]
    while n_final < n:
        n_drafted, end = n_final + len(old_WV), min(n_final + sampling.jacobi_window, n)
        fixed_W = fixed_I[n_drafted:end]
        image_1I[0, n_drafted:end] = torch.where(fixed_W == DRAWN, image_1I[0, n_drafted - 1], fixed_W)
        certain_WV = F.one_hot(image_1I[0, n_drafted:end], new_WV.shape[-1])
        new_WV = distributions(n_final, end)
        uniform_W2 = torch.from_numpy(rng.random((end - n_final, 2))).to(device)
        drafts_W = image_1I[0, n_final:end]
        tokens_W = carry_over(drafts_W, torch.cat((old_WV, certain_WV)), new_WV, uniform_W2)
        # the first that changed is final too: all before it is what it was drawn after
        n_new = min(int((tokens_W == drafts_W).long().cumprod(0).sum()) + 1, end - n_final)
        image_1I[0, n_final:end] = tokens_W
        rows.rewind_to(n_final + n_new - 1)  # what was read behind it came after the draft, not after it
        n_new = first_drawn(n_final + n_new) - n_final
        n_final, old_WV = n_final + n_new, new_WV[n_new:]
        yield image_1I[:, :n_final]


def carry_over(draft_W: Tensor, old_WV: Tensor, new_WV: Tensor, uniform_W2: Tensor) -> Tensor:
    """Tokens (W,) that have the distributions `new_WV` if the drafts have `old_WV`, and are the drafts where they can.

    A draft x is kept with probability min(1, new(x) / old(x)); else the token is drawn from max(0, new - old),
    normalised: the rule of speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, section 2.3).

    Args:
        old_WV, new_WV: probabilities. uniform_W2: numbers in [0, 1), that of keeping and that of drawing.
    """
    old_W, new_W = (p_WV.gather(1, draft_W[:, None])[:, 0] for p_WV in (old_WV, new_WV))
    kept_W = uniform_W2[:, 0] * old_W < new_W
    rest_WV = (new_WV - old_WV).clamp_min(0)
    # equal distributions leave nothing to draw from, and, up to rounding, every draft is kept then
    rest_WV = torch.where(rest_WV.any(1, keepdim=True), rest_WV, new_WV)
    return torch.where(kept_W, draft_W, pick_by_weight(rest_WV, uniform_W2[:, 1]))

"""One token from logits: guide, filter, pick. Pure functions of their arguments; randomness comes in as numbers.

B batch, V vocabulary
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from vqt2i.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class SamplingConfig(Config):
    """guidance: 1 is none. temperature divides logits. top_k, top_p: null keeps everything.

    guidance_interval: the share of an image's tokens, from where to where, that guidance acts on (Kynkäänniemi et al.
        2024, arXiv 2404.07724, for diffusion). Elsewhere the unconditional half is not computed.
    """

    guidance: float = Field(2.0, ge=0, le=100)
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    temperature: PositiveFloat = Field(1.0, le=100)
    top_k: PositiveInt | None = None
    top_p: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _interval_does_not_end_before_it_begins(self) -> "SamplingConfig":
        start, end = self.guidance_interval
        if start > end:
            raise ValueError(f"guidance_interval: found {start} to {end}, expected a start that is not after the end")
        return self

    def guided_tokens(self, n: int) -> range:
        """Which of an image's `n` tokens are guided."""
        start, end = (round(share * n) for share in self.guidance_interval)
        return range(start, end) if self.guidance != 1 else range(0)


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """uncond + s · (cond - uncond): classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), on logits."""
    return torch.lerp(unconditional_BV, conditional_BV, scale)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The k largest logits of each row; the rest are -inf. Ties with the k-th are kept."""
    if k >= logits_BV.shape[-1]:
        return logits_BV
    kth = logits_BV.topk(k, dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < kth, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest most likely ids whose probabilities reach p (Holtzman et al. 2020); the rest are -inf."""
    ordered, order = logits_BV.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= p)
    return logits_BV.masked_fill(dropped, -torch.inf)


def pick(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw an id from each row by inverting its cumulative distribution at a number in [0, 1)."""
    cumulative = logits_BV.double().softmax(-1).cumsum(-1)
    # scaled by the last entry, which rounding may leave off 1, and kept below it: an id of probability 0 is never drawn
    last = cumulative[:, -1:]
    target = torch.minimum(uniform_B[:, None].double() * last, last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def draw(logits_BV: Tensor, uniform_B: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature, then top-k, then top-p, then `pick`; ids (B,)."""
    logits_BV = logits_BV.float() / config.temperature
    if config.top_k is not None:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p is not None:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    return pick(logits_BV, uniform_B)

"""One token from logits: guide, filter, pick. Pure functions of their arguments; randomness comes in as numbers.

B batch, V vocabulary
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from vqt2i.config import Config

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=100)]
BLOCK = 128  # ids; about the square root of a vocabulary, so that both levels of `pick` are short


class SamplingConfig(Config):
    """guidance: 1 is none. temperature divides logits. top_k, top_p, min_p: null keeps everything.

    guidance_interval: the share of an image's tokens, from where to where, that guidance acts on (Kynkäänniemi et al.
        2024, arXiv 2404.07724, for diffusion). Elsewhere the unconditional half is not computed.
    guidance_schedule: how guidance gets from 1 to its full scale, which the interval's last token has: at once, in
        equal steps (Chang et al. 2023, Muse, arXiv 2301.00704, section 2.7), or along half a wave of a cosine (among
        those that Wang et al. 2024, arXiv 2404.13040, compare for diffusion).
    temperature_end: of the last token; from the first one's `temperature` it changes in equal steps. Null: it stays.
    min_p: ids less likely than this share of the likeliest one's probability are left out (Nguyen et al. 2024, arXiv
        2407.01082).
    jacobi_window: draw images one after another, so many tokens of one at once, in fewer passes (`jacobi.py`).
    """

    guidance: float = Field(2.0, ge=0, le=100)
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    temperature: Temperature = 1.0
    temperature_end: Temperature | None = None
    top_k: PositiveInt | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, gt=0, le=1)
    jacobi_window: PositiveInt | None = None

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

    def guidance_scales(self, n: int) -> list[float]:
        """The scale of each of an image's `n` tokens; 1 where guidance does not act."""
        ramp = {"constant": lambda t: 1.0, "linear": lambda t: t, "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2}
        guided, scales = self.guided_tokens(n), [1.0] * n
        for step, index in enumerate(guided, 1):
            scales[index] = 1 + (self.guidance - 1) * ramp[self.guidance_schedule](step / len(guided))
        return scales

    def temperatures(self, n: int) -> list[float]:
        """The temperature of each of an image's `n` tokens."""
        change = 0.0 if self.temperature_end is None else self.temperature_end - self.temperature
        return [self.temperature + change * index / max(1, n - 1) for index in range(n)]


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float | Tensor) -> Tensor:
    """uncond + s · (cond - uncond): classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), on logits."""
    return torch.lerp(unconditional_BV, conditional_BV, scale)


def keep_likeliest(logits_BV: Tensor, k: int | None, p: float | None) -> Tensor:
    """Of each row the k largest logits, and of these the fewest whose probabilities reach p; the rest are -inf.

    p: nucleus sampling (Holtzman et al. 2020). None keeps everything. Ties with the last that is kept are kept.
    """
    k = min(k or logits_BV.shape[-1], logits_BV.shape[-1])
    if p is not None:
        # sorts the k largest only: sorting a whole vocabulary takes longer than everything else here
        ordered_BK = logits_BV.topk(k, dim=-1).values
        probabilities = ordered_BK.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        last_B1 = (before < p).sum(-1, keepdim=True) - 1
        least_B1 = ordered_BK.gather(-1, last_B1)
    elif k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    else:
        return logits_BV
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_near_the_likeliest(logits_BV: Tensor, share: float) -> Tensor:
    """Min-p: of each row the ids of at least this share of the largest probability; the rest are -inf."""
    return logits_BV.masked_fill(logits_BV < logits_BV.amax(-1, keepdim=True) + math.log(share), -torch.inf)


def filter_logits(logits_BV: Tensor, config: SamplingConfig, temperature: float | Tensor) -> Tensor:
    """Temperature, then top-k, then top-p, and min-p; in fp32."""
    logits_BV = keep_likeliest(logits_BV.float() / temperature, config.top_k, config.top_p)
    return logits_BV if config.min_p is None else keep_near_the_likeliest(logits_BV, config.min_p)


def pick(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw an id from each row by inverting its cumulative distribution at a number in [0, 1)."""
    return pick_by_weight((logits_BV.float() - logits_BV.amax(-1, keepdim=True)).exp(), uniform_B)


def pick_by_weight(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """`pick` from what is in proportion to the probabilities.

    In two levels, for a running sum over a vocabulary is slow: first the block of ids, then the id in it.
    """
    blocks_BNI = F.pad(weights_BV, (0, -weights_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block_B1, rest_B1 = _invert(blocks_BNI.sum(-1).double(), uniform_B[:, None].double())
    own_BI = blocks_BNI.gather(1, block_B1[..., None].expand(-1, -1, BLOCK)).squeeze(1)
    id_B1, _ = _invert(own_BI.double(), rest_B1)
    return (block_B1 * BLOCK + id_B1).squeeze(-1)


def _invert(weights_BN: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The index whose share of the weights holds a number in [0, 1), and where in its share, in [0, 1), (B, 1) each."""
    ends_BN = weights_BN.cumsum(-1)
    # below the last end, whatever the rounding: an index of weight 0 is never drawn
    last = ends_BN[:, -1:]
    target = torch.minimum(uniform_B1 * last, last.nextafter(torch.zeros_like(last)))
    index_B1 = torch.searchsorted(ends_BN, target, right=True)
    end, weight = ends_BN.gather(-1, index_B1), weights_BN.gather(-1, index_B1)
    return index_B1, (1 - (end - target) / weight).clamp(0, 1)


def draw(logits_BV: Tensor, uniform_B: Tensor, config: SamplingConfig, temperature: float | Tensor) -> Tensor:
    """`filter_logits`, then `pick`; ids (B,)."""
    return pick(filter_logits(logits_BV, config, temperature), uniform_B)

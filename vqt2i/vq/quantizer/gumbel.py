"""A categorical posterior over codes, relaxed with Gumbel noise in training: DALL·E's discrete VAE.

Source: Jang et al. 2016 (arXiv 1611.01144), equation 2 and section 2.2; Ramesh et al. 2021 (arXiv 2102.12092),
section 2.1 and appendix A.2.

N latents, C channels, K codes
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from vqt2i.vq.quantizer.base import Chosen, KindConfig, Quantizer, projections


class GumbelConfig(KindConfig):
    """temperature, final_temperature: of the relaxation, from the first to the second along a cosine within the first
        `anneal_share` of the training.
    kl_weight: of the KL divergence from the uniform prior in nats per cell; it rises from 0 along a cosine within the
        first `kl_warmup_share` of the training. More of it keeps more codes in use. DALL·E's beta of 6.6 is for sums
        over a cell's pixel values (appendix A.2); our losses are means over them: beta / (3 * downsample^2).
    code_dim: width of latents and codes, with 1x1 convolutions to and from it (VQGAN's variant, Esser et al. 2021);
        null leaves these out: codes are as wide as the decoder's input (DALL·E's).
    straight_through: in training the decoder reads one code instead of a mixture, with the mixture's gradient.
    """

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: PositiveInt = 512
    code_dim: PositiveInt | None = None
    temperature: PositiveFloat = 1.0
    final_temperature: PositiveFloat = 1 / 16
    anneal_share: float = Field(1.0, gt=0, le=1)
    kl_weight: NonNegativeFloat = 0.01
    kl_warmup_share: float = Field(0.05, ge=0, le=1)
    straight_through: bool = False

    @model_validator(mode="after")
    def _temperature_falls(self) -> "GumbelConfig":
        if self.final_temperature > self.temperature:
            raise ValueError(f"final_temperature ({self.final_temperature}) must be at most temperature "
                             f"({self.temperature})")  # fmt: skip
        return self


def along_cosine(first: float, last: float, share: float) -> float:
    """Between two values, `share` (cut at 1) of the way along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class GumbelQuantizer(Quantizer):
    """A logit for each code, by a 1x1 convolution of the latents.

    In training the noise is the global random stream's; in evaluation mode and in `encode` the likeliest code is taken.
    `ids_BHW` is it in both modes.
    """

    def __init__(self, config: GumbelConfig, channels: int, channels_out: int | None = None) -> None:
        to_code, from_code = nn.Conv2d(config.code_dim or channels, config.codebook_size, 1), nn.Identity()
        if config.code_dim:
            to_latents, from_code = projections(channels, config.code_dim, channels_out)
            to_code = nn.Sequential(to_latents, to_code)
        super().__init__(config, to_code, from_code)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim or channels_out or channels))

    def choose(self, latents_ND: Tensor, progress: float) -> Chosen:
        config, ids_N1 = self.config, self.ids_of(latents_ND)
        temperature = along_cosine(config.temperature, config.final_temperature, progress / config.anneal_share)
        warmed_up = progress / config.kl_warmup_share if config.kl_warmup_share else 1.0
        log_q_NK = F.log_softmax(latents_ND, dim=-1)
        kl = (log_q_NK.exp() * (log_q_NK + math.log(config.codebook_size))).sum(-1).mean()
        if self.training:
            mixture_NK = F.gumbel_softmax(latents_ND, temperature, hard=config.straight_through)
            codes_NC = mixture_NK @ self.codebook.float()
        else:
            codes_NC = self.codes()[ids_N1[:, 0]]
        measures = {"kl": kl.detach(), "temperature": torch.tensor(temperature)}
        return Chosen(codes_NC, ids_N1, along_cosine(0.0, config.kl_weight, warmed_up) * kl, 0, measures)

    def ids_of(self, latents_ND: Tensor) -> Tensor:
        return latents_ND.argmax(-1, keepdim=True)

    def codes(self) -> Tensor:
        return self.codebook.float()

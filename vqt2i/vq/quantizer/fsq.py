"""Finite scalar quantization: each of a few numbers is rounded to one of a few levels; no codebook is learned.

Source: Mentzer et al. 2023 (arXiv 2309.15505), section 3.1 and appendix A.1.

N latents, D latent width, K ids
"""

import math
from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from vqt2i.vq.quantizer.base import Chosen, KindConfig, Quantizer, projections, straight_through

MARGIN = 1e-3  # the bound lies so far outside of the outermost levels: tanh reaches these, and not only in the limit


class FSQConfig(KindConfig):
    """levels: how many values each number of a code has; 5 or more work best (the paper's section 4.3).

    The paper takes (8, 6, 5) for 2^8 ids, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12, (8, 8, 8, 6, 5) for 2^14,
    (8, 8, 8, 5, 5, 5) for 2^16.
    """

    kind: Literal["fsq"] = "fsq"
    levels: tuple[PositiveInt, ...] = (8, 8, 8)

    @model_validator(mode="after")
    def _levels_are_levels(self) -> "FSQConfig":
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels: expected one or more numbers of at least 3, found {list(self.levels)}; "
                             "for codes of bits take kind 'lfq'")  # fmt: skip
        return self

    @property
    def vocab_size(self) -> int:
        return math.prod(self.levels)


class FiniteScalarQuantizer(Quantizer):
    """Latents squashed to the range of the levels and rounded. There is no loss, and there are no dead codes to mend.

    Codes lie in [-1, 1]. The first number counts fastest in the ids.
    """

    def __init__(self, config: FSQConfig, channels: int, channels_out: int | None = None) -> None:
        super().__init__(config, *projections(channels, len(config.levels), channels_out))
        levels_D = torch.tensor(config.levels)
        self.register_buffer("levels", levels_D, persistent=False)
        steps_D = torch.cat((torch.ones(1, dtype=torch.long), levels_D.cumprod(0)[:-1]))
        self.register_buffer("steps", steps_D, persistent=False)

    def choose(self, latents_ND: Tensor, progress: float) -> Chosen:
        bounded_ND = self._bounded(latents_ND)
        codes_ND = straight_through(bounded_ND, bounded_ND.round()) / (self.levels // 2)
        return Chosen(codes_ND, self._ids(bounded_ND), latents_ND.new_zeros(()), 0, {})

    def ids_of(self, latents_ND: Tensor) -> Tensor:
        return self._ids(self._bounded(latents_ND))

    def codes(self) -> Tensor:
        ids_K1 = torch.arange(self.config.vocab_size, device=self.levels.device)[:, None]
        half_D = self.levels // 2
        return (ids_K1 // self.steps % self.levels - half_D) / half_D

    def _bounded(self, latents_ND: Tensor) -> Tensor:
        """Into the range of whole numbers that has as many as there are levels: -2 to 2 of 5, -2 to 1 of 4."""
        reach_D = (self.levels - 1) * (1 + MARGIN) / 2
        offset_D = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(latents_ND + torch.atanh(offset_D / reach_D)) * reach_D - offset_D

    def _ids(self, bounded_ND: Tensor) -> Tensor:
        return ((bounded_ND.round().long() + self.levels // 2) * self.steps).sum(-1, keepdim=True)

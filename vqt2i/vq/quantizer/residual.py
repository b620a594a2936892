"""Residual vector quantization: each level quantizes what the levels before it left over.

Source: Zeghidour et al. 2021 (arXiv 2107.03312), algorithm 1; Lee et al. 2022 (arXiv 2203.01941), section 3.1 and
equation 8 for the loss. Differs from the second: every level has a codebook of its own, as in the first.

N latents, D code width, K codes, R levels
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vqt2i.vq.quantizer.base import Chosen, Quantizer, projections, straight_through
from vqt2i.vq.quantizer.codebook import CodebookConfig, VectorQuantizer, VQConfig


class ResidualVQConfig(CodebookConfig):
    """depth: levels, and so ids, of each cell. codebook_size: codes of each level; ids differ between levels."""

    kind: Literal["residual"] = "residual"
    depth: int = Field(2, ge=2)

    @property
    def vocab_size(self) -> int:
        return self.depth * self.codebook_size

    @property
    def ids_per_cell(self) -> int:
        return self.depth

    @property
    def level(self) -> VQConfig:
        """Of one level. What is left over has a length that counts, so nothing is l2-normalised."""
        shared = {name: getattr(self, name) for name in CodebookConfig.model_fields if name != "kind"}
        return VQConfig(l2_normalised=False, **shared)


class ResidualQuantizer(Quantizer):
    """The sum of a code of each level.

    Level r has ids r * codebook_size and up, so an id says its level and its code, and any ids of a cell can be summed.
    """

    def __init__(self, config: ResidualVQConfig, channels: int, channels_out: int | None = None) -> None:
        super().__init__(config, *projections(channels, config.code_dim, channels_out))
        self.levels = nn.ModuleList(VectorQuantizer(config.level, None) for _ in range(config.depth))

    def choose(self, latents_ND: Tensor, progress: float) -> Chosen:
        rest_ND, found = latents_ND, []
        for level in self.levels:
            found.append(level.search(rest_ND))
            rest_ND = rest_ND - found[-1].codes_ND
        return Chosen(
            straight_through(latents_ND, torch.stack([level.codes_ND for level in found]).sum(0)),
            self._joined([level.ids_NR for level in found]),
            torch.stack([level.loss for level in found]).sum(),
            sum(level.n_restarted for level in found),
            {},
        )

    def ids_of(self, latents_ND: Tensor) -> Tensor:
        rest_ND, ids = latents_ND, []
        for level in self.levels:
            ids.append(level.ids_of(rest_ND))
            rest_ND = rest_ND - level.codes()[ids[-1][:, 0]]
        return self._joined(ids)

    def codes(self) -> Tensor:
        """Of all levels, the first one's first."""
        return torch.cat([level.codes() for level in self.levels])

    def _joined(self, ids: list[Tensor]) -> Tensor:
        ids_NR = torch.cat(ids, dim=1)
        return ids_NR + torch.arange(len(ids), device=ids_NR.device) * self.config.codebook_size

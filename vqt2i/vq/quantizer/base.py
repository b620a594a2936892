"""What all quantizers share: from feature maps to grids of ids and back.

B batch, C channels, H height, W width, N latents, D latent or code width, K ids, R ids per cell
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from vqt2i.config import Config


class KindConfig(Config):
    """Base of the quantizers' configurations."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return self.codebook_size

    @property
    def ids_per_cell(self) -> int:
        """Ids for each cell of the feature map."""
        return 1


class Quantized(NamedTuple):
    """features_BCHW: what the decoder reads, with the encoder's gradient. ids_BHW: of shape (B, H, W * R), the ids of
    a cell side by side. loss: scalar, weighted terms summed. n_restarted: dead codes that started anew from this batch.
    measures: what else is worth watching, scalars without gradient.
    """

    features_BCHW: Tensor
    ids_BHW: Tensor
    loss: Tensor
    n_restarted: int
    measures: dict[str, Tensor]


class Chosen(NamedTuple):
    """`Quantized` for latents instead of feature maps."""

    codes_ND: Tensor
    ids_NR: Tensor
    loss: Tensor
    n_restarted: int
    measures: dict[str, Tensor]


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The values of `codes`, the gradient of `latents` (Bengio et al. 2013, arXiv 1308.3432)."""
    return latents + (codes - latents).detach()


class Quantizer(nn.Module):
    """A projection to latents, codes for each of them, and a projection back. Kinds define `choose`, `ids_of`, `codes`.

    What moves from batch to batch besides parameters (codebooks, usage) moves in `forward` in training mode only, from
    the latents of all ranks, so that every rank keeps what one process would over the joint batch.
    """

    def __init__(self, config: KindConfig, to_code: nn.Module, from_code: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.to_code, self.from_code = to_code, from_code

    def forward(self, features_BCHW: Tensor, progress: float = 1.0) -> Quantized:
        """Quantize; `progress` is the share of the training that is done, 0 to 1, which schedules go by."""
        with torch.autocast(features_BCHW.device.type, enabled=False):
            chosen = self.choose(self._latents(features_BCHW), progress)
            batch, _, height, _ = features_BCHW.shape
            features_BCHW = self._features(chosen.codes_ND, batch, height)
            ids_BHW = chosen.ids_NR.view(batch, height, -1)
            return Quantized(features_BCHW, ids_BHW, chosen.loss, chosen.n_restarted, chosen.measures)

    def encode(self, features_BCHW: Tensor) -> Tensor:
        """ids_BHW (B, H, W * R); changes nothing, in training mode too."""
        batch, _, height, _ = features_BCHW.shape
        with torch.autocast(features_BCHW.device.type, enabled=False):
            return self.ids_of(self._latents(features_BCHW)).view(batch, height, -1)

    def decode(self, ids_BHW: Tensor) -> Tensor:
        """features_BCHW of the codes named by `ids_BHW`; those of a cell are summed."""
        batch, height, _ = ids_BHW.shape
        with torch.autocast(ids_BHW.device.type, enabled=False):
            codes_NRD = self.codes()[ids_BHW.reshape(-1, self.config.ids_per_cell)]
            return self._features(codes_NRD.sum(1), batch, height)

    def choose(self, latents_ND: Tensor, progress: float) -> Chosen:
        """Codes for latents, with the latents' gradient."""
        raise NotImplementedError

    def ids_of(self, latents_ND: Tensor) -> Tensor:
        """ids_NR that `choose` in evaluation mode names; changes nothing."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        """What each id stands for, (K, D) fp32."""
        raise NotImplementedError

    def _latents(self, features_BCHW: Tensor) -> Tensor:
        # fp32: searched in bf16, 2 % of latents get another of 512 codes, 5 % of 8192 (tests/vq/test_quantizer.py)
        return rearrange(self.to_code(features_BCHW.float()), "b d h w -> (b h w) d")

    def _features(self, codes_ND: Tensor, batch: int, height: int) -> Tensor:
        return self.from_code(rearrange(codes_ND, "(b h w) d -> b d h w", b=batch, h=height))


def projections(channels: int, code_dim: int, channels_out: int | None = None) -> tuple[nn.Conv2d, nn.Conv2d]:
    """From features to latents, and from codes to features of `channels_out` (null: as many as came in)."""
    return nn.Conv2d(channels, code_dim, 1), nn.Conv2d(code_dim, channels_out or channels, 1)

"""Quantizers: from feature maps to grids of ids and back.

Source: van den Oord et al. 2017 (arXiv 1711.00937), Yu et al. 2021 (arXiv 2110.04627, section 3.2: low-dimensional,
l2-normalised codes). Dead codes restart from the batch as in Dhariwal et al. 2020 (arXiv 2005.00341), but drawn with
probability proportional to their squared distance from the nearest code (k-means++; Arthur & Vassilvitskii 2007):
flat backgrounds fill a batch with equal latents, and codes restarted there would die again.

B batch, C channels, H height, W width, N latents, D code width, K codes
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqt2i.runtime import stream_seed
from vqt2i.vq.config import QuantizerConfig, VQConfig

MAX_SCORES = 2**24  # numbers held at once by the search: 64 MiB, whatever the batch and codebook


class Quantized(NamedTuple):
    """features_BCHW: what the decoder reads, with the encoder's gradient. loss: scalar, weighted terms summed.

    n_restarted: dead codes that started anew from this batch.
    """

    features_BCHW: Tensor
    ids_BHW: Tensor
    loss: Tensor
    n_restarted: int


def nearest_codes(latents_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """Index of the code with the smallest Euclidean distance to each latent, (N,) long."""
    squares_K = codes_KD.square().sum(-1)
    rows = max(1, MAX_SCORES // len(codes_KD))
    parts = [torch.addmm(squares_K, part, codes_KD.T, alpha=-2).argmin(-1) for part in latents_ND.split(rows)]
    return torch.cat(parts)


def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate the equally shaped `x` of all ranks along dimension 0, in rank order (no gradient)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class VectorQuantizer(nn.Module):
    """A projection to code width, the nearest of K codes, and a projection back.

    In training mode, `forward` also counts usage, restarts dead codes and, with update "ema", moves the codes. It does
    so from the latents of all ranks (they are narrow: 2 MB for 65,536 latents of 8 numbers), so every rank computes the
    same codebook that one process would over the joint batch. In evaluation mode nothing changes.
    """

    def __init__(self, config: VQConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.to_code = nn.Conv2d(channels, config.code_dim, 1)
        self.from_code = nn.Conv2d(config.code_dim, channels, 1)
        codebook_KD = torch.randn(config.codebook_size, config.code_dim)
        if config.update == "gradient":
            self.codebook = nn.Parameter(codebook_KD)
        else:
            self.register_buffer("codebook", codebook_KD)
            self.register_buffer("latent_sums", torch.zeros_like(codebook_KD))
        # usage 1 is an even share of all latents; latent_sums are in the same unit, whatever the batch size
        self.register_buffer("usage", torch.zeros(config.codebook_size))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))

    def forward(self, features_BCHW: Tensor) -> Quantized:
        with torch.autocast(features_BCHW.device.type, enabled=False):
            latents_ND = self._latents(features_BCHW)
            n_restarted = self._restart_dead_codes(gather_ranks(latents_ND.detach())) if self.training else 0
            codes_KD = self.codes()
            ids_N = nearest_codes(latents_ND.detach(), codes_KD.detach())
            chosen_ND = codes_KD[ids_N]
            loss = self.config.commitment_weight * F.mse_loss(latents_ND, chosen_ND.detach())
            if self.config.codebook_weight is not None:
                loss = loss + self.config.codebook_weight * F.mse_loss(chosen_ND, latents_ND.detach())
            if self.training:
                self._track(gather_ranks(latents_ND.detach()), gather_ranks(ids_N))
            straight_ND = latents_ND + (chosen_ND - latents_ND).detach()
            batch, _, height, width = features_BCHW.shape
            ids_BHW = ids_N.view(batch, height, width)
            return Quantized(self._features(straight_ND, ids_BHW.shape), ids_BHW, loss, n_restarted)

    def encode(self, features_BCHW: Tensor) -> Tensor:
        """ids_BHW of the nearest codes; changes nothing, in training mode too."""
        batch, _, height, width = features_BCHW.shape
        with torch.autocast(features_BCHW.device.type, enabled=False):
            return nearest_codes(self._latents(features_BCHW), self.codes()).view(batch, height, width)

    def decode(self, ids_BHW: Tensor) -> Tensor:
        """features_BCHW of the codes named by `ids_BHW`."""
        with torch.autocast(ids_BHW.device.type, enabled=False):
            return self._features(self.codes()[ids_BHW.flatten()], ids_BHW.shape)

    def codes(self) -> Tensor:
        """The codes as they are searched, (K, D) fp32."""
        return self._normalised(self.codebook.float())

    def _normalised(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.l2_normalised else x

    def _latents(self, features_BCHW: Tensor) -> Tensor:
        # fp32: searched in bf16, 2 % of latents get another of 512 codes, 5 % of 8192 (tests/vq/test_quantizer.py)
        return self._normalised(rearrange(self.to_code(features_BCHW.float()), "b d h w -> (b h w) d"))

    def _features(self, codes_ND: Tensor, shape_BHW: torch.Size) -> Tensor:
        batch, height, width = shape_BHW
        return self.from_code(rearrange(codes_ND, "(b h w) d -> b d h w", b=batch, h=height, w=width))

    @torch.no_grad()
    def _restart_dead_codes(self, latents_ND: Tensor) -> int:
        # how many there are decides what is computed, so the host waits for a GPU here
        dead = (self.usage < self.config.restart_below).nonzero().flatten()[: len(latents_ND)]
        if not len(dead):
            return 0
        codes_KD = self.codes()
        # numbers that are none would stop the draw, on a GPU the process; the training step skips such an update
        latents_ND = latents_ND.nan_to_num(0.0, 0.0, 0.0)
        errors_N = (latents_ND - codes_KD[nearest_codes(latents_ND, codes_KD)]).square().sum(-1)
        # seeded by the count of updates: the same draw on every rank, and after a resume
        generator = torch.Generator(latents_ND.device)
        generator.manual_seed(stream_seed("restart dead codes", int(self.n_updates)))
        rows = torch.multinomial(errors_N.clamp_min(1e-12), len(dead), generator=generator)
        self.codebook[dead] = latents_ND[rows].to(self.codebook.dtype)
        self.usage[dead] = 1.0
        if self.config.update == "ema":
            self.latent_sums[dead] = latents_ND[rows]
        return len(dead)

    @torch.no_grad()
    def _track(self, latents_ND: Tensor, ids_N: Tensor) -> None:
        share = len(self.usage) / len(ids_N)
        decay = self.config.usage_decay
        # not bincount: on a GPU it makes the host wait
        counts_K = torch.zeros_like(self.usage).index_add_(0, ids_N, self.usage.new_ones(()).expand(len(ids_N)))
        self.usage.mul_(decay).add_(counts_K, alpha=(1 - decay) * share)
        self.n_updates += 1
        if self.config.update == "ema":
            sums_KD = torch.zeros_like(self.latent_sums).index_add_(0, ids_N, latents_ND)
            self.latent_sums.mul_(decay).add_(sums_KD, alpha=(1 - decay) * share)
            means_KD = self._normalised(self.latent_sums / self.usage.clamp_min(1e-6)[:, None])
            # a code that is never used and never restarted stays where it is
            self.codebook.copy_(torch.where(self.usage[:, None] > 1e-6, means_KD, self.codebook))


def build_quantizer(config: QuantizerConfig, channels: int) -> VectorQuantizer:
    """The quantizer of a configuration, for feature maps of `channels` channels."""
    return VectorQuantizer(config, channels)

"""Vector quantization: a learned codebook.

Source: van den Oord et al. 2017 (arXiv 1711.00937), Yu et al. 2021 (arXiv 2110.04627, section 3.2: low-dimensional,
l2-normalised codes). Dead codes restart from the batch as in Dhariwal et al. 2020 (arXiv 2005.00341), but drawn with
probability proportional to their squared distance from the nearest code (k-means++; Arthur & Vassilvitskii 2007):
flat backgrounds fill a batch with equal latents, and codes restarted there would die again.

N latents, D code width, K codes
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from vqt2i.runtime import stream_seed
from vqt2i.vq.quantizer.base import Chosen, KindConfig, Quantizer, projections, straight_through
from vqt2i.vq.ranks import gather_ranks

MAX_SCORES = 2**24  # numbers held at once by the search: 64 MiB, whatever the batch and codebook


class CodebookConfig(KindConfig):
    """Learned codes, searched for the nearest one.

    code_dim: width of a code. Low (Yu et al. 2021): far more of the codebook stays in use.
    update: how codes move: "ema" to the running mean of the latents that chose them (van den Oord et al. 2017,
        appendix A.1), "gradient" by the codebook loss.
    commitment_weight: pulls latents to their codes.
    codebook_weight: pulls codes to their latents; needs update "gradient".
    usage_decay: of the running usage counts, and of the means with update "ema".
    restart_below: a code used less than this share of an even use restarts at a latent of the batch; 0 is never.
        The first batch restarts all codes, which is how they are initialised.
    """

    codebook_size: PositiveInt = 512
    code_dim: PositiveInt = 8
    update: Literal["gradient", "ema"] = "ema"
    commitment_weight: NonNegativeFloat = 0.25
    codebook_weight: NonNegativeFloat | None = None
    usage_decay: float = Field(0.98, ge=0, lt=1)
    restart_below: NonNegativeFloat = Field(0.05, lt=1)

    @model_validator(mode="after")
    def _codebook_weight_belongs_to_gradient(self) -> "CodebookConfig":
        if (self.update == "gradient") != (self.codebook_weight is not None):
            raise ValueError("codebook_weight: give a number with update 'gradient', and null with update 'ema'")
        return self


class VQConfig(CodebookConfig):
    """One code for each cell.

    l2_normalised: latents and codes lie on the unit sphere, so the nearest code is the one of largest cosine.
    """

    kind: Literal["vq"] = "vq"
    l2_normalised: bool = True

    @model_validator(mode="after")
    def _sphere_has_room(self) -> "VQConfig":
        if self.l2_normalised and self.code_dim == 1 and self.codebook_size > 2:
            raise ValueError(f"l2_normalised codes of code_dim 1 are +1 and -1, found codebook_size "
                             f"{self.codebook_size}; take a larger code_dim")  # fmt: skip
        return self


def nearest_codes(latents_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """Index of the code with the smallest Euclidean distance to each latent, (N,) long."""
    squares_K = codes_KD.square().sum(-1)
    rows = max(1, MAX_SCORES // len(codes_KD))
    # into one result: small ones that stay between large ones that go would keep the memory of all scores (measured:
    # 0.4 GB for 400,000 latents and 256 codes)
    ids_N = torch.empty(len(latents_ND), dtype=torch.long, device=latents_ND.device)
    for part_ND, found_N in zip(latents_ND.split(rows), ids_N.split(rows), strict=True):
        found_N.copy_(torch.addmm(squares_K, part_ND, codes_KD.T, alpha=-2).argmin(-1))
    return ids_N


class VectorQuantizer(Quantizer):
    """The nearest of K codes.

    In training mode, `forward` also counts usage, restarts dead codes and, with update "ema", moves the codes, from the
    latents of all ranks (they are narrow: 2 MB for 65,536 latents of 8 numbers). In evaluation mode nothing changes.
    """

    def __init__(self, config: VQConfig, channels: int | None, channels_out: int | None = None) -> None:
        """`channels` null: what comes in are latents already, as a level of a residual quantizer gets them."""
        around = (
            (nn.Identity(), nn.Identity()) if channels is None else projections(channels, config.code_dim, channels_out)
        )
        super().__init__(config, *around)
        codebook_KD = torch.randn(config.codebook_size, config.code_dim)
        if config.update == "gradient":
            self.codebook = nn.Parameter(codebook_KD)
        else:
            self.register_buffer("codebook", codebook_KD)
            self.register_buffer("latent_sums", torch.zeros_like(codebook_KD))
        # usage 1 is an even share of all latents; latent_sums are in the same unit, whatever the batch size
        self.register_buffer("usage", torch.zeros(config.codebook_size))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))

    def choose(self, latents_ND: Tensor, progress: float) -> Chosen:
        latents_ND = self._normalised(latents_ND)
        found = self.search(latents_ND)
        return found._replace(codes_ND=straight_through(latents_ND, found.codes_ND))

    def search(self, latents_ND: Tensor) -> Chosen:
        """`choose` with the codes as they are, without the latents' gradient; in training mode the codebook learns."""
        n_restarted = self._restart_dead_codes(gather_ranks(latents_ND.detach())) if self.training else 0
        codes_KD = self.codes()
        ids_N = nearest_codes(latents_ND.detach(), codes_KD.detach())
        chosen_ND = codes_KD[ids_N]
        loss = self.config.commitment_weight * F.mse_loss(latents_ND, chosen_ND.detach())
        if self.config.codebook_weight is not None:
            loss = loss + self.config.codebook_weight * F.mse_loss(chosen_ND, latents_ND.detach())
        if self.training:
            self._track(gather_ranks(latents_ND.detach()), gather_ranks(ids_N))
        return Chosen(chosen_ND.detach(), ids_N[:, None], loss, n_restarted, {})

    def ids_of(self, latents_ND: Tensor) -> Tensor:
        return nearest_codes(self._normalised(latents_ND), self.codes())[:, None]

    def codes(self) -> Tensor:
        """The codes as they are searched, (K, D) fp32."""
        return self._normalised(self.codebook.float())

    def _normalised(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.l2_normalised else x

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

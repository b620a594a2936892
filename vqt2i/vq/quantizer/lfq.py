"""Lookup-free quantization: a code is the signs of its latent; entropies keep all codes in use.

Source: Yu et al. 2023 (arXiv 2310.05737), section 3.1. Differs: the entropies are exact at any codebook size. A soft
assignment to sign codes is a product over the bits, so the entropy of one is a sum, and the mean of many is one matrix
product of two halves of the bits.

N latents, D bits, K = 2^D ids
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from vqt2i.vq.quantizer.base import Chosen, KindConfig, Quantizer, projections, straight_through
from vqt2i.vq.ranks import mean_over_ranks

LEAST_SHARE = 1e-8  # below it the logarithm of a share is cut off: a code out of reach has no infinite gradient


class LFQConfig(KindConfig):
    """codebook_size: a power of two.

    commitment_weight: pulls latents to their codes.
    entropy_weight: of the entropy loss: the entropy of each latent's soft assignment, to be small (a clear choice),
        less `diversity` times that of their mean, to be large (all codes in use).
    temperature: of the soft assignments, softmax of -|latent - code|^2 / temperature.
    """

    kind: Literal["lfq"] = "lfq"
    codebook_size: PositiveInt = 512
    commitment_weight: NonNegativeFloat = 0.25
    entropy_weight: NonNegativeFloat = 0.1
    diversity: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 0.01

    @model_validator(mode="after")
    def _size_is_a_power_of_two(self) -> "LFQConfig":
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size of kind 'lfq' must be a power of two, found {self.codebook_size}; "
                             f"the next one is {1 << self.codebook_size.bit_length()}")  # fmt: skip
        return self

    @property
    def n_bits(self) -> int:
        return self.codebook_size.bit_length() - 1


class LookupFreeQuantizer(Quantizer):
    """The sign of each number of a latent. The first number is the highest bit of the id."""

    def __init__(self, config: LFQConfig, channels: int, channels_out: int | None = None) -> None:
        super().__init__(config, *projections(channels, config.n_bits, channels_out))
        self.register_buffer("steps", 2 ** torch.arange(config.n_bits - 1, -1, -1), persistent=False)

    def choose(self, latents_ND: Tensor, progress: float) -> Chosen:
        codes_ND = (latents_ND > 0).to(latents_ND.dtype) * 2 - 1
        each, of_mean = self._entropies(latents_ND)
        loss = self.config.commitment_weight * F.mse_loss(latents_ND, codes_ND)
        loss = loss + self.config.entropy_weight * (each - self.config.diversity * of_mean)
        measures = {"entropy_each": each.detach(), "entropy_of_mean": of_mean.detach()}
        return Chosen(straight_through(latents_ND, codes_ND), self.ids_of(latents_ND), loss, 0, measures)

    def ids_of(self, latents_ND: Tensor) -> Tensor:
        return ((latents_ND > 0) * self.steps).sum(-1, keepdim=True)

    def codes(self) -> Tensor:
        ids_K1 = torch.arange(self.config.vocab_size, device=self.steps.device)[:, None]
        return (ids_K1 // self.steps % 2 * 2 - 1).float()

    def _entropies(self, latents_ND: Tensor) -> tuple[Tensor, Tensor]:
        """In nats: the mean entropy of the soft assignments, and the entropy of their mean over the batch."""
        logits_ND = 4 * latents_ND / self.config.temperature  # of +1 against -1: the difference of squared distances
        chances_ND = logits_ND.sigmoid()
        each = (F.softplus(logits_ND) - logits_ND * chances_ND).sum(-1).mean()
        half = (self.config.n_bits + 1) // 2
        first, rest = _joint(chances_ND[:, :half]), _joint(chances_ND[:, half:])
        shares_K = (first.T @ rest / len(latents_ND)).flatten()
        if self.training:
            # the value of all ranks, the gradient of this one's part: their mean is that of the joint batch
            shares_K = shares_K + (mean_over_ranks(shares_K.detach().clone()) - shares_K.detach())
        return each, -(shares_K * shares_K.clamp_min(LEAST_SHARE).log()).sum()


def _joint(chances_Nd: Tensor) -> Tensor:
    """Of independent bits, the probabilities of all their combinations, (N, 2^d), the first bit the highest."""
    joint = chances_Nd.new_ones(len(chances_Nd), 1)
    for chance_N in chances_Nd.unbind(-1):
        joint = (joint[:, :, None] * torch.stack((1 - chance_N, chance_N), -1)[:, None]).flatten(1)
    return joint

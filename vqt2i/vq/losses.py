"""Losses of the image tokenizer.

Source: Esser et al. 2021 (arXiv 2012.09841), equations 5 to 7; hinge loss of Lim & Ye 2017 (arXiv 1705.02894).
"""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.vq.autoencoder import VQOutput
from vqt2i.vq.discriminator import AdversarialConfig
from vqt2i.vq.logit_laplace import logit_laplace_loss
from vqt2i.vq.lpips import LPIPS, PerceptualConfig
from vqt2i.vq.ranks import mean_over_ranks


class VQGANLossConfig(Config):
    """l1_weight, l2_weight: of the mean absolute and squared error per pixel, pixels in [-1, 1].

    logit_laplace_weight: of the negative log-likelihood of the pixels (Ramesh et al. 2021, appendix A.3); for decoders
        with model.output "logit_laplace".
    perceptual, adversarial: null trains without.
    """

    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = 1.0
    logit_laplace_weight: NonNegativeFloat = 0.0
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None

    @model_validator(mode="after")
    def _pixels_count(self) -> "VQGANLossConfig":
        if self.l1_weight + self.l2_weight + self.logit_laplace_weight == 0:
            raise ValueError("l1_weight, l2_weight and logit_laplace_weight are all 0: nothing would tie the "
                             "pictures to their inputs")  # fmt: skip
        return self


class ReconstructionLoss(nn.Module):
    """Weighted sum of pixel errors and, where configured, LPIPS."""

    def __init__(self, config: VQGANLossConfig) -> None:
        super().__init__()
        self.config = config
        self.lpips = None if config.perceptual is None else LPIPS(config.perceptual)

    def forward(self, out: VQOutput, target_B3HW: Tensor) -> Tensor:
        """Scalar, averaged over batch and pixels."""
        reconstruction, target = out.reconstruction_B3HW.float(), target_B3HW.float()
        loss = self.config.l1_weight * F.l1_loss(reconstruction, target)
        loss = loss + self.config.l2_weight * F.mse_loss(reconstruction, target)
        if self.config.logit_laplace_weight:
            loss = loss + self.config.logit_laplace_weight * logit_laplace_loss(out.decoded_BCHW, target)
        if self.lpips is not None:
            loss = loss + self.config.perceptual.weight * self.lpips(reconstruction, target).mean()
        return loss


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss: zero once real logits are above 1 and fake ones below -1."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder minimises: the negative mean logit of its pictures."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, highest: float
) -> Tensor:
    """Gradient norm of the reconstruction loss over that of the adversarial loss, both at `last_layer`.

    Clamped to [0, highest] and detached: with it, both losses pull equally hard (Esser et al. 2021, equation 7). The
    gradients are those of the joint batch of all ranks.
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(mean_over_ranks(gradient.float()).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, highest).detach()

"""PatchGAN: a convolutional critic with one logit per patch (Isola et al. 2017, arXiv 1611.07004).

Differs: GroupNorm for BatchNorm, so that a logit depends on its own picture only and equals on one rank or many; the
two stride-1 convolutions are 3x3, so that small pictures do not shrink away.
"""

from itertools import pairwise

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.nn.conv import group_norm


class AdversarialConfig(Config):
    """weight: times the adaptive weight, of the adversarial loss.

    max_adaptive_weight: clamp of the adaptive weight.
    start_share: share of the training steps after which the critic trains and counts.
    channels, n_layers: width of the first and number of the strided convolutions; width doubles up to 8 times.
    """

    weight: PositiveFloat = 0.8
    max_adaptive_weight: PositiveFloat = 1e4
    start_share: float = Field(0.5, ge=0, lt=1)
    channels: PositiveInt = 64
    n_layers: PositiveInt = 3


class PatchDiscriminator(nn.Module):
    """Images in [-1, 1] to logits, one per patch; high means real."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, 8) for layer in range(config.n_layers + 1)]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        strided = pairwise(widths[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False) for a, b in strided)
        self.convs.append(nn.Conv2d(widths[-2], widths[-1], 3, padding=1, bias=False))
        self.norms = nn.ModuleList(group_norm(conv.out_channels) for conv in self.convs)
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """logits (B, 1, H / 2 ** n_layers, W / 2 ** n_layers)."""
        h = F.leaky_relu(self.conv_in(x_B3HW), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)

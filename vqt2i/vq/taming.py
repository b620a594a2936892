"""The encoder and decoder of VQGAN as published (Esser et al. 2021, arXiv 2012.09841, appendix table 7), which LDM,
LlamaGen and the VQModel of `diffusers` share: full resolution, two blocks a level or so, attention in the middle.

B batch, H height, W width, C channels
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.nn.conv import Norm, ResBlock, SpatialAttention, Upsample
from vqt2i.vq.config import ImageTokenizerConfig

N_GROUPS = 32


def taming_norm(config: ImageTokenizerConfig) -> Norm:
    """As published: 32 groups whatever the width, and an `eps` of its own."""
    return lambda channels: nn.GroupNorm(N_GROUPS, channels, eps=config.norm_eps)


class TamingDownsample(nn.Module):
    """Half the height and width by a strided 3x3 convolution over a map padded at the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


def _level(config: ImageTokenizerConfig, level: int, channels_in: int, n_blocks: int) -> list[nn.Module]:
    width = config.channels[level]
    layers: list[nn.Module] = []
    for i in range(n_blocks):
        layers.append(ResBlock(width if i else channels_in, width, config.dropout, norm=taming_norm(config)))
        if config.level_sizes_px[level] in config.attention_sizes_px:
            layers.append(SpatialAttention(width, n_heads=1, norm=taming_norm(config)))
    return layers


def _middle(config: ImageTokenizerConfig) -> list[nn.Module]:
    width = config.channels[-1]
    return [
        ResBlock(width, width, config.dropout, norm=taming_norm(config)),
        SpatialAttention(width, n_heads=1, norm=taming_norm(config)),
        ResBlock(width, width, config.dropout, norm=taming_norm(config)),
    ]


class TamingEncoder(nn.Module):
    """Image to features of `latent_width` at the size of the id grid."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        width = config.stem_width
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        layers: list[nn.Module] = []
        for level, level_width in enumerate(config.channels):
            layers += _level(config, level, width, config.n_res_blocks)
            width = level_width
            if level + 1 < len(config.channels):
                layers.append(TamingDownsample(width))
        self.layers = nn.Sequential(*layers, *_middle(config))
        self.norm_out = taming_norm(config)(width)
        self.conv_out = nn.Conv2d(width, config.latent_width, 3, padding=1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        h = self.layers(self.conv_in(x_B3HW))
        return self.conv_out(F.silu(self.norm_out(h)))


class TamingDecoder(nn.Module):
    """The mirror of `TamingEncoder` with one more block a level. `conv_out` is the last layer, which the adaptive
    adversarial weight looks at."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_width, width, 3, padding=1)
        layers: list[nn.Module] = _middle(config)
        for level in reversed(range(len(config.channels))):
            layers += _level(config, level, width, config.n_res_blocks + 1)
            width = config.channels[level]
            if level > 0:
                layers.append(Upsample(width, width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = taming_norm(config)(width)
        self.conv_out = nn.Conv2d(width, config.decoded_channels, 3, padding=1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        h = self.layers(self.conv_in(features_BCHW))
        return self.conv_out(F.silu(self.norm_out(h)))

"""The encoder and decoder of CogView's VQ-VAE (Ding et al. 2021, arXiv 2105.13290, §2.2, in its published code):
convolutions of 4 x 4 with stride 2, and ReLU.

B batch, H height, W width, C channels
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from vqt2i.vq.config import ImageTokenizerConfig


class StridedEncoder(nn.Module):
    """Image to features of `channels[-1]` at the size of the id grid.

    pixel_mean, pixel_std: of each channel, what images in [-1, 1] are normalised by; not learned.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(3))
        self.register_buffer("pixel_std", torch.ones(3))
        widths = (3, *config.channels)
        self.layers = nn.ModuleList(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1) for n_in, n_out in pairwise(widths))

    def forward(self, x_B3HW: Tensor) -> Tensor:
        h = (x_B3HW - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        for layer in self.layers:
            h = layer(h).relu()
        return h


class StridedDecoder(nn.Module):
    """Features of `latent_width` to images. `conv_out` is the last layer, which the adaptive adversarial weight looks
    at."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = (config.latent_width, *reversed(config.channels))
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1) for n_in, n_out in pairwise(widths)
        )
        self.conv_out = nn.Conv2d(widths[-1], config.decoded_channels, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        h = features_BCHW
        for layer in self.layers:
            h = layer(h).relu()
        return self.conv_out(h)

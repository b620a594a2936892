"""The encoder and decoder of DALL·E's discrete VAE (Ramesh et al. 2021, arXiv 2102.12092, appendix A.1, and the code
published with it): bottleneck blocks with scaled residuals, maximum pooling, nearest neighbours.

B batch, H height, W width, C channels
"""

from torch import Tensor, nn

from vqt2i.vq.config import ImageTokenizerConfig


def _conv(channels_in: int, channels_out: int, size: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, size, padding=size // 2)
    nn.init.normal_(conv.weight, std=(channels_in * size**2) ** -0.5)
    nn.init.zeros_(conv.bias)
    return conv


class Bottleneck(nn.Module):
    """Four ReLUs and convolutions at a quarter of the width, scaled by `gain`, plus a skip."""

    def __init__(self, channels_in: int, channels_out: int, sizes: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        hidden = channels_out // 4
        widths = (channels_in, hidden, hidden, hidden, channels_out)
        layers: list[nn.Module] = []
        for i, size in enumerate(sizes):
            layers += [nn.ReLU(), _conv(widths[i], widths[i + 1], size)]
        self.residual = nn.Sequential(*layers)
        self.skip = nn.Identity() if channels_in == channels_out else _conv(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.skip(x_BCHW) + self.gain * self.residual(x_BCHW)


def _levels(
    config: ImageTokenizerConfig, widths: list[int], width: int, sizes: tuple[int, ...], between: nn.Module
) -> nn.Sequential:
    # the paper scales by a small constant, its code by one over the square of the number of blocks
    gain = (len(widths) * config.n_res_blocks) ** -2
    layers: list[nn.Module] = []
    for level, level_width in enumerate(widths):
        layers += [between] * (level > 0)
        for _ in range(config.n_res_blocks):
            layers.append(Bottleneck(width, level_width, sizes, gain))
            width = level_width
    return nn.Sequential(*layers)


class DalleEncoder(nn.Module):
    """Image to features of `channels[-1]` at the size of the id grid; the quantizer's projection makes them logits."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = list(config.channels)
        self.conv_in = _conv(3, widths[0], 7)
        self.levels = _levels(config, widths, widths[0], (3, 3, 3, 1), nn.MaxPool2d(2))

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return self.levels(self.conv_in(x_B3HW)).relu()


class DalleDecoder(nn.Module):
    """Features of `latent_width` to images. `conv_out` is the last layer, which the adaptive adversarial weight looks
    at."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = list(reversed(config.channels))
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.levels = _levels(config, widths, config.latent_width, (1, 3, 3, 3), upsample)
        self.conv_out = _conv(widths[-1], config.decoded_channels, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return self.conv_out(self.levels(features_BCHW).relu())

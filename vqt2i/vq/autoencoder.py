"""The image tokenizer: images in [-1, 1] to grids of ids and back (VQ-VAE, van den Oord et al. 2017; VQGAN, Esser et
al. 2021, with the encoder and decoder made small enough for CPUs).

B batch, H height, W width of images or of id grids, C channels
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.nn.conv import Downsample, ResBlock, SpatialAttention, Upsample, group_norm
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.dalle import DalleDecoder, DalleEncoder
from vqt2i.vq.inputs import require_image_ids, require_images
from vqt2i.vq.logit_laplace import location_of
from vqt2i.vq.quantizer import build_quantizer
from vqt2i.vq.strided import StridedDecoder, StridedEncoder
from vqt2i.vq.taming import TamingDecoder, TamingEncoder


class VQOutput(NamedTuple):
    """reconstruction_B3HW: unclamped, for losses. decoded_BCHW: what the decoder said, of which it is the picture.

    quantizer_loss: scalar. n_restarted: codes that this batch gave. measures: of the quantizer, scalars to watch.
    """

    reconstruction_B3HW: Tensor
    decoded_BCHW: Tensor
    ids_BHW: Tensor
    quantizer_loss: Tensor
    n_restarted: int
    measures: dict[str, Tensor]


def _level(config: ImageTokenizerConfig, level: int) -> nn.Sequential:
    width = config.channels[level]
    blocks: list[nn.Module] = []
    for _ in range(config.n_res_blocks):
        blocks.append(ResBlock(width, width, config.dropout))
        if config.level_sizes_px[level] in config.attention_sizes_px:
            blocks.append(SpatialAttention(width))
    return nn.Sequential(*blocks)


class Encoder(nn.Module):
    """Image to features of `channels[-1]` at the size of the id grid."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.patch_px = config.patch_px
        self.conv_in = nn.Conv2d(3 * config.patch_px**2, config.channels[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, width in enumerate(config.channels):
            layers.append(_level(config, level))
            if level + 1 < len(config.channels):
                layers.append(Downsample(width, config.channels[level + 1]))
        self.levels = nn.Sequential(*layers)
        self.norm_out = group_norm(config.channels[-1])

    def forward(self, x_B3HW: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x_B3HW, self.patch_px))
        return F.silu(self.norm_out(self.levels(h)))


class PatchEncoder(nn.Module):
    """Features of each cell of the id grid from its own pixels, by residual two-layer perceptrons.

    Norms are over the channels of one cell: over the map, as in `Encoder`, they would tell it of the others.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.downsample = config.downsample
        width = 4 * config.channels[-1]  # one matrix product per layer: cheap beside the decoder's convolutions
        self.embed = nn.Linear(3 * config.downsample**2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width, eps=1e-6), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(config.n_res_blocks)
        )
        self.out = nn.Sequential(nn.RMSNorm(width, eps=1e-6), nn.Linear(width, config.channels[-1]))

    def forward(self, x_B3HW: Tensor) -> Tensor:
        h_BHWC = self.embed(F.pixel_unshuffle(x_B3HW, self.downsample).movedim(1, -1))
        for block in self.blocks:
            h_BHWC = h_BHWC + block(h_BHWC)
        return self.out(h_BHWC).movedim(-1, 1)


class Decoder(nn.Module):
    """The mirror of `Encoder`. `conv_out` is the last layer, which the adaptive adversarial weight looks at."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.patch_px = config.patch_px
        layers: list[nn.Module] = []
        for level in reversed(range(len(config.channels))):
            layers.append(_level(config, level))
            if level > 0:
                layers.append(Upsample(config.channels[level], config.channels[level - 1]))
        self.levels = nn.Sequential(*layers)
        self.norm_out = group_norm(config.channels[0])
        self.conv_out = nn.Conv2d(config.channels[0], config.decoded_channels * config.patch_px**2, 3, padding=1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        h = F.silu(self.norm_out(self.levels(features_BCHW)))
        return F.pixel_shuffle(self.conv_out(h), self.patch_px)


class ImageTokenizer(nn.Module):
    """Encoder, quantizer, decoder.

    Any height and width that `config.downsample` divides work; the id grid is that many times smaller (with several ids
    a cell, as many times wider again). Call `.eval()` before `encode` and `decode` where dropout is on.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        if config.architecture == "taming":
            self.encoder, self.decoder = TamingEncoder(config), TamingDecoder(config)
        elif config.architecture == "dalle":
            self.encoder, self.decoder = DalleEncoder(config), DalleDecoder(config)
        elif config.architecture == "strided":
            self.encoder, self.decoder = StridedEncoder(config), StridedDecoder(config)
        else:
            self.encoder = (PatchEncoder if config.encoder == "patch" else Encoder)(config)
            self.decoder = Decoder(config)
        self.quantizer = build_quantizer(config.quantizer, config.encoded_width, config.latent_width)

    @property
    def ids_fingerprint(self) -> str:
        """What a GPT and a token store know a loaded one by: equal where the ids mean the same."""
        return self.config.ids_of or self.fingerprint

    def forward(self, x_B3HW: Tensor, progress: float = 1.0) -> VQOutput:
        """Reconstruct images in [-1, 1]; in training mode the codebook learns too.

        progress: share of the training that is done, 0 to 1, which the quantizer's schedules go by.
        """
        require_images(x_B3HW, self.config.downsample)
        quantized = self.quantizer(self.encoder(x_B3HW), progress)
        decoded = self.decoder(quantized.features_BCHW)
        return VQOutput(
            self._pictures(decoded), decoded, quantized.ids_BHW, quantized.loss, quantized.n_restarted,
            quantized.measures,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def codes(self) -> Tensor:
        """What each id stands for, (K, D) fp32: ids of like meaning have codes that lie near each other."""
        return self.quantizer.codes()

    def _pictures(self, decoded_BCHW: Tensor) -> Tensor:
        return decoded_BCHW if self.config.output == "pixels" else location_of(decoded_BCHW)

    @torch.no_grad()
    def encode(self, x_B3HW: Tensor) -> Tensor:
        """ids_BHW (long, 0 to `config.vocab_size` - 1) of images in [-1, 1].

        Raises:
            DataError: the shape is not (B, 3, H, W) with sides that `config.downsample` divides.
        """
        require_images(x_B3HW, self.config.downsample)
        return self.quantizer.encode(self.encoder(x_B3HW))

    @torch.no_grad()
    def decode(self, ids_BHW: Tensor) -> Tensor:
        """x_B3HW in [-1, 1] of a grid of ids.

        Raises:
            DataError: not a (B, H, W) integer tensor with ids of this tokenizer, whole cells of them.
        """
        require_image_ids(ids_BHW, self.config.vocab_size, self.config.ids_per_cell)
        return self._pictures(self.decoder(self.quantizer.decode(ids_BHW))).clamp(-1, 1)

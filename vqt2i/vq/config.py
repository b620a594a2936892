"""Configuration of the image tokenizer. Sizes that follow from others are properties."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vqt2i.config import Config
from vqt2i.vq.quantizer import QuantizerConfig, VQConfig


class ImageTokenizerConfig(Config):
    """An encoder and a convolutional decoder around a quantizer (docs/quantizers.md compares its kinds).

    image_size_px: side of the square training images (other sizes that `downsample` divides work too).
    downsample: image side over id-grid side; a power of two.
    encoder: "convolution" sees the surroundings of a cell of the id grid, so that an id can say more of them. With
        "patch" an id depends on its own downsample x downsample pixels alone: equal patches have equal ids wherever
        they stand. That makes flat graphics a language that a small GPT learns from far fewer samples.
    architecture: "lean" is small enough for CPUs; "taming" is VQGAN as published (Esser et al. 2021): full resolution
        (patch_px 1), one more ResBlock per level in the decoder, two and attention in the middle; "dalle" is DALL·E's
        discrete VAE (Ramesh et al. 2021): full resolution, bottleneck blocks, no norms; "strided" is convolutions of
        4 x 4 with stride 2 and ReLU, one for each level (CogView's VQ-VAE, Ding et al. 2021).
    patch_px: the convolutional encoder starts with, and the decoder ends with, patches of this side folded into
        channels. The resolution above costs most and adds least.
    channels: width at each resolution, finest (image side / patch_px) to coarsest (the id grid).
    stem_channels: width of what the first convolution of "taming" gives; null is that of the finest level.
    latent_channels: width of the features between encoder, quantizer and decoder ("dalle": between quantizer and
        decoder); null is that of the coarsest level, which "lean" always has.
    norm_eps: of the norms of "taming"; PyTorch's own is 1e-5 (CLIP-GEN's, Wang et al. 2022).
    n_res_blocks: per resolution, in the encoder and in the decoder.
    attention_sizes_px: feature-map sides, for square images of `image_size_px`, with attention after each ResBlock.
    output: what the decoder says of a pixel: its value ("pixels"), or ("logit_laplace") location and scale of a
        logit-Laplace distribution, whose location is the picture; for training.loss.logit_laplace_weight.
    ids_of: fingerprint of the image tokenizer whose ids these are, where only the decoder was trained on from there.
    """

    image_size_px: PositiveInt = 32
    downsample: PositiveInt = 4
    encoder: Literal["convolution", "patch"] = "convolution"
    architecture: Literal["lean", "taming", "dalle", "strided"] = "lean"
    patch_px: PositiveInt = 2
    channels: tuple[PositiveInt, ...] = (24, 64)
    stem_channels: PositiveInt | None = None
    latent_channels: PositiveInt | None = None
    norm_eps: PositiveFloat = 1e-6
    n_res_blocks: NonNegativeInt = 1
    attention_sizes_px: tuple[PositiveInt, ...] = ()
    dropout: float = Field(0.0, ge=0, lt=1)
    output: Literal["pixels", "logit_laplace"] = "pixels"
    quantizer: QuantizerConfig = VQConfig()
    ids_of: str | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ImageTokenizerConfig":
        if self.downsample & (self.downsample - 1) or self.image_size_px % self.downsample:
            raise ValueError(f"downsample must be a power of two that divides image_size_px ({self.image_size_px}), "
                             f"found {self.downsample}")  # fmt: skip
        if self.patch_px & (self.patch_px - 1) or self.patch_px > self.downsample:
            raise ValueError(f"patch_px must be a power of two up to downsample ({self.downsample}), "
                             f"found {self.patch_px}")  # fmt: skip
        n_levels = (self.downsample // self.patch_px).bit_length()
        if len(self.channels) != n_levels:
            raise ValueError(f"channels must give {n_levels} widths, for feature maps of "
                             f"{[self.image_size_px // self.patch_px >> i for i in range(n_levels)]} px; "
                             f"found {len(self.channels)}")  # fmt: skip
        patch_px = 2 if self.architecture == "strided" else 1
        if self.architecture != "lean" and (self.patch_px != patch_px or self.encoder == "patch"):
            raise ValueError(f"architecture {self.architecture!r} has patch_px {patch_px} and encoder 'convolution', "
                             f"found {self.patch_px} and {self.encoder!r}")  # fmt: skip
        if self.architecture == "strided" and (self.attention_sizes_px or self.dropout or self.n_res_blocks):
            raise ValueError("architecture 'strided' has no attention_sizes_px, dropout 0 and n_res_blocks 0; found "
                             f"{list(self.attention_sizes_px)}, {self.dropout} and {self.n_res_blocks}")  # fmt: skip
        if self.architecture == "lean" and self.latent_width != self.channels[-1]:
            raise ValueError(f"latent_channels of architecture 'lean' is its last width, {self.channels[-1]}; "
                             f"found {self.latent_channels}")  # fmt: skip
        for size in self.attention_sizes_px:
            if size not in self.level_sizes_px:
                raise ValueError(f"attention_sizes_px must be among {list(self.level_sizes_px)}, found {size}")
        return self

    @model_validator(mode="after")
    def _taming_has_norms_of_32_groups(self) -> "ImageTokenizerConfig":
        if self.architecture != "taming" and self.stem_channels:
            raise ValueError(f"stem_channels {self.stem_channels}: of architecture 'taming' only; leave it out")
        if self.architecture != "taming" and self.norm_eps != 1e-6:
            raise ValueError(f"norm_eps {self.norm_eps}: of architecture 'taming' only; leave it out")
        if self.architecture == "taming" and any(width % 32 for width in (self.stem_width, *self.channels)):
            raise ValueError(f"widths of architecture 'taming' must be multiples of 32, found "
                             f"{[self.stem_width, *self.channels]}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _dalle_has_what_it_has(self) -> "ImageTokenizerConfig":
        if self.architecture != "dalle":
            return self
        if self.attention_sizes_px or self.dropout or not self.n_res_blocks:
            raise ValueError("architecture 'dalle' has no attention_sizes_px, dropout 0 and n_res_blocks of 1 or more; "
                             f"found {list(self.attention_sizes_px)}, {self.dropout} and "
                             f"{self.n_res_blocks}")  # fmt: skip
        if any(width % 4 for width in self.channels):
            raise ValueError(f"channels of architecture 'dalle' must be multiples of 4, found {list(self.channels)}")
        return self

    @property
    def stem_width(self) -> int:
        """Channels of what the first convolution gives."""
        return self.stem_channels or self.channels[0]

    @property
    def latent_width(self) -> int:
        """Channels of the features that the decoder reads."""
        return self.latent_channels or self.channels[-1]

    @property
    def encoded_width(self) -> int:
        """Channels of the features that the quantizer reads."""
        return self.channels[-1] if self.architecture in ("dalle", "strided") else self.latent_width

    @property
    def decoded_channels(self) -> int:
        """Numbers that the decoder says of a pixel."""
        return 3 if self.output == "pixels" else 6

    @property
    def level_sizes_px(self) -> tuple[int, ...]:
        """Side of the feature maps at each resolution, finest first."""
        return tuple(self.image_size_px // self.patch_px >> level for level in range(len(self.channels)))

    @property
    def ids_per_cell(self) -> int:
        """Ids for each cell of the feature map, side by side in a row of the id grid."""
        return self.quantizer.ids_per_cell

    @property
    def grid_height(self) -> int:
        """Rows of the id grid."""
        return self.image_size_px // self.downsample

    @property
    def grid_width(self) -> int:
        """Ids in a row of the id grid."""
        return self.grid_height * self.ids_per_cell

    @property
    def n_image_ids(self) -> int:
        """Ids per image."""
        return self.grid_height * self.grid_width

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return self.quantizer.vocab_size

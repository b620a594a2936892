"""Configuration of the image tokenizer. Sizes that follow from others are properties."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from vqt2i.config import Config


class VQConfig(Config):
    """A learned codebook, searched for the nearest code.

    code_dim: width of a code. Low (Yu et al. 2021): far more of the codebook stays in use.
    l2_normalised: latents and codes lie on the unit sphere, so the nearest code is the one of largest cosine.
    update: how codes move: "ema" to the running mean of the latents that chose them (van den Oord et al. 2017,
        appendix A.1), "gradient" by the codebook loss.
    commitment_weight: pulls latents to their codes.
    codebook_weight: pulls codes to their latents; needs update "gradient".
    usage_decay: of the running usage counts, and of the means with update "ema".
    restart_below: a code used less than this share of an even use restarts at a latent of the batch; 0 is never.
        The first batch restarts all codes, which is how they are initialised.
    """

    kind: Literal["vq"] = "vq"
    codebook_size: PositiveInt = 512
    code_dim: PositiveInt = 8
    l2_normalised: bool = True
    update: Literal["gradient", "ema"] = "ema"
    commitment_weight: NonNegativeFloat = 0.25
    codebook_weight: NonNegativeFloat | None = None
    usage_decay: float = Field(0.98, ge=0, lt=1)
    restart_below: NonNegativeFloat = Field(0.05, lt=1)

    @model_validator(mode="after")
    def _codebook_weight_belongs_to_gradient(self) -> "VQConfig":
        if (self.update == "gradient") != (self.codebook_weight is not None):
            raise ValueError("codebook_weight: give a number with update 'gradient', and null with update 'ema'")
        return self

    @property
    def vocab_size(self) -> int:
        return self.codebook_size


# One kind today; with a second, a union discriminated by `kind`, and its class in `quantizer.build_quantizer`.
QuantizerConfig = VQConfig


class ImageTokenizerConfig(Config):
    """An encoder and a convolutional decoder around a quantizer.

    image_size_px: side of the square training images (other sizes that `downsample` divides work too).
    downsample: image side over id-grid side; a power of two.
    encoder: "convolution" sees the surroundings of a cell of the id grid, so that an id can say more of them. With
        "patch" an id depends on its own downsample x downsample pixels alone: equal patches have equal ids wherever
        they stand. That makes flat graphics a language that a small GPT learns from far fewer samples.
    architecture: "lean" is small enough for CPUs; "taming" is VQGAN as published (Esser et al. 2021): full resolution
        (patch_px 1), one more ResBlock per level in the decoder, two and attention in the middle.
    patch_px: the convolutional encoder starts with, and the decoder ends with, patches of this side folded into
        channels. The resolution above costs most and adds least.
    channels: width at each resolution, finest (image side / patch_px) to coarsest (the id grid).
    latent_channels: width of the features between encoder, quantizer and decoder; null is that of the coarsest level,
        which "lean" always has.
    n_res_blocks: per resolution, in the encoder and in the decoder.
    attention_sizes_px: feature-map sides, for square images of `image_size_px`, with attention after each ResBlock.
    """

    image_size_px: PositiveInt = 32
    downsample: PositiveInt = 4
    encoder: Literal["convolution", "patch"] = "convolution"
    architecture: Literal["lean", "taming"] = "lean"
    patch_px: PositiveInt = 2
    channels: tuple[PositiveInt, ...] = (24, 64)
    latent_channels: PositiveInt | None = None
    n_res_blocks: NonNegativeInt = 1
    attention_sizes_px: tuple[PositiveInt, ...] = ()
    dropout: float = Field(0.0, ge=0, lt=1)
    quantizer: QuantizerConfig = VQConfig()

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
        if self.architecture == "taming" and (self.patch_px > 1 or self.encoder == "patch"):
            raise ValueError("architecture 'taming' has patch_px 1 and encoder 'convolution', "
                             f"found {self.patch_px} and {self.encoder!r}")  # fmt: skip
        if self.architecture == "lean" and self.latent_width != self.channels[-1]:
            raise ValueError(f"latent_channels of architecture 'lean' is its last width, {self.channels[-1]}; "
                             f"found {self.latent_channels}")  # fmt: skip
        for size in self.attention_sizes_px:
            if size not in self.level_sizes_px:
                raise ValueError(f"attention_sizes_px must be among {list(self.level_sizes_px)}, found {size}")
        return self

    @property
    def latent_width(self) -> int:
        """Channels of the features between encoder, quantizer and decoder."""
        return self.latent_channels or self.channels[-1]

    @property
    def level_sizes_px(self) -> tuple[int, ...]:
        """Side of the feature maps at each resolution, finest first."""
        return tuple(self.image_size_px // self.patch_px >> level for level in range(len(self.channels)))

    @property
    def grid_size(self) -> int:
        """Side of the id grid."""
        return self.image_size_px // self.downsample

    @property
    def n_image_ids(self) -> int:
        """Ids per image."""
        return self.grid_size**2

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return self.quantizer.vocab_size

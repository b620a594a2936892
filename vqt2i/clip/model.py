"""CLIP (Radford et al. 2021, arXiv 2103.00020): a vision transformer and a text transformer into one space.

B batch, S text length, P patches, D width, E embedding width
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.nn.transformer import Transformer, TransformerConfig, build_norm

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5: larger made training unstable


class MeanReadout(Config):
    """The embedding is read from the mean of all positions."""

    kind: Literal["mean"] = "mean"


class ClassReadout(Config):
    """It is read from a learned token before the patches, whose embedding has no bias; a norm stands before the blocks
    too (Radford et al. 2021, section 2.4).
    """

    kind: Literal["class"] = "class"


class EndReadout(Config):
    """It is read from the mark behind a text; positions see what is before them only (ibid.).

    start_id, end_id: of the marks before and behind a text, two of the vocabulary's ids.
    """

    kind: Literal["end"] = "end"
    start_id: NonNegativeInt
    end_id: NonNegativeInt


Channels = tuple[float, float, float]
Spread = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class CLIPConfig(Config):
    """A model folder's configuration. `text_tokenizer` is the fingerprint of what made its ids.

    The defaults are a scorer of ours; class and end readout with LayerNorms, biases and no qk-norm are those of Radford
    et al. text_length: ids of a text, without marks. pixel_mean, pixel_std: of pixels in [0, 1], which are brought to
    mean 0 and deviation 1; a half each leaves [-1, 1].
    """

    image_size_px: PositiveInt
    patch_size_px: PositiveInt
    text_length: PositiveInt
    n_text_ids: PositiveInt
    vision: TransformerConfig
    text: TransformerConfig
    embedding_width: PositiveInt
    text_tokenizer: str
    image_readout: Annotated[MeanReadout | ClassReadout, Field(discriminator="kind")] = MeanReadout()
    text_readout: Annotated[MeanReadout | EndReadout, Field(discriminator="kind")] = MeanReadout()
    pixel_mean: Channels = (0.5, 0.5, 0.5)
    pixel_std: Spread = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _marks_are_ids(self) -> "CLIPConfig":
        marks = self.text_readout
        if isinstance(marks, EndReadout) and max(marks.start_id, marks.end_id) >= self.n_text_ids:
            raise ValueError(f"text_readout: marks {marks.start_id} and {marks.end_id}, but n_text_ids is "
                             f"{self.n_text_ids}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> "CLIPConfig":
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px {self.image_size_px} must be a multiple of patch_size_px "
                             f"{self.patch_size_px}")  # fmt: skip
        return self

    @property
    def n_patches(self) -> int:
        return (self.image_size_px // self.patch_size_px) ** 2


class LogitScale(nn.Module):
    """The learned factor of the similarities, at most `MAX_LOGIT_SCALE` (Radford et al. 2021, section 2.5).

    For DeepSpeed: a module that is called, because ZeRO 3 brings weights together when their module is called, and a
    tensor with a dimension, because others cannot be sent to the ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self) -> Tensor:
        return self.log.clamp(0, math.log(MAX_LOGIT_SCALE)).exp().squeeze(0)


class CLIP(nn.Module):
    """Unit-length embeddings of images and texts; their cosine is the score."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.marks = config.text_readout if isinstance(config.text_readout, EndReadout) else None
        self.has_class = isinstance(config.image_readout, ClassReadout)
        self.patch_embedding = nn.Linear(3 * config.patch_size_px**2, config.vision.width, bias=not self.has_class)
        self.patch_positions = nn.Parameter(torch.randn(config.n_patches + self.has_class, config.vision.width) * 0.02)
        if self.has_class:
            self.class_token = nn.Parameter(torch.randn(config.vision.width) * 0.02)
            self.patch_norm = build_norm(config.vision)
        self.vision = Transformer(config.vision)
        self.vision_projection = nn.Linear(config.vision.width, config.embedding_width, bias=False)
        self.text_embedding = nn.Embedding(config.n_text_ids, config.text.width)
        n_positions = config.text_length + (2 if self.marks else 0)
        self.text_positions = nn.Parameter(torch.randn(n_positions, config.text.width) * 0.02)
        if not self.marks:
            self.no_text = nn.Parameter(torch.randn(config.text.width) * 0.02)
        self.text = Transformer(config.text)
        self.text_projection = nn.Linear(config.text.width, config.embedding_width, bias=False)
        self.logit_scale = LogitScale()
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        mean, std = (torch.tensor(channels)[:, None, None] for channels in (config.pixel_mean, config.pixel_std))
        # from [-1, 1]; exactly 1 and 0 where those are what is read
        self.register_buffer("pixel_scale_311", 0.5 / std, persistent=False)
        self.register_buffer("pixel_offset_311", (0.5 - mean) / std, persistent=False)

    def encode_image(self, image_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] of the configured size to unit vectors (B, E)."""
        p = self.config.patch_size_px
        pixels_B3HW = image_B3HW * self.pixel_scale_311 + self.pixel_offset_311
        patches = rearrange(pixels_B3HW, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x_BPD = self.patch_embedding(patches)
        if not self.has_class:
            return _unit(self.vision_projection(self.vision(x_BPD + self.patch_positions).mean(1)))
        x_BPD = torch.cat((self.class_token.expand(len(x_BPD), 1, -1), x_BPD), dim=1)
        hidden_BPD = self.vision(self.patch_norm(x_BPD + self.patch_positions))
        return _unit(self.vision_projection(hidden_BPD[:, 0]))

    def encode_text(self, ids_BS: Tensor, n_ids_B: Tensor) -> Tensor:
        """Right-padded ids, of which the first `n_ids_B` count, to unit vectors (B, E). Empty texts are allowed."""
        if self.marks:
            return self._encode_marked_text(ids_BS, n_ids_B)
        # a learned vector stands before every text, so that an empty one has something to attend to
        start = self.no_text.expand(len(ids_BS), 1, -1)
        x_BSD = torch.cat((start, self.text_embedding(ids_BS) + self.text_positions), dim=1)
        real = torch.arange(x_BSD.shape[1], device=ids_BS.device)[None] <= n_ids_B[:, None]
        hidden = self.text(x_BSD, mask_B1LK=real[:, None, None])
        weight = real[..., None].to(hidden.dtype)
        return _unit(self.text_projection((hidden * weight).sum(1) / weight.sum(1)))

    def _encode_marked_text(self, ids_BS: Tensor, n_ids_B: Tensor) -> Tensor:
        ids_BL = F.pad(ids_BS, (1, 1))
        place_L = torch.arange(ids_BL.shape[1], device=ids_BS.device)
        ids_BL[:, 0] = self.marks.start_id
        # marks all the way behind the text, for what is read sees only the first
        ids_BL = ids_BL.masked_fill(place_L > n_ids_B[:, None], self.marks.end_id)
        x_BLD = self.text_embedding(ids_BL) + self.text_positions[: len(place_L)]
        hidden_BLD = self.text(x_BLD, mask_B1LK=(place_L <= place_L[:, None])[None, None], causal=True)
        return _unit(self.text_projection(hidden_BLD[torch.arange(len(n_ids_B)), n_ids_B + 1]))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)

"""CLIP (Radford et al. 2021, arXiv 2103.00020): a vision transformer and a text transformer into one space.

B batch, S text length, P patches, D width, E embedding width
"""

import math

import torch
from einops import rearrange
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.nn.transformer import Transformer, TransformerConfig

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5: larger made training unstable


class CLIPConfig(Config):
    """A model folder's configuration. `text_tokenizer` is the fingerprint of what made its ids."""

    image_size_px: PositiveInt
    patch_size_px: PositiveInt
    text_length: PositiveInt
    n_text_ids: PositiveInt
    vision: TransformerConfig
    text: TransformerConfig
    embedding_width: PositiveInt
    text_tokenizer: str

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
        self.patch_embedding = nn.Linear(3 * config.patch_size_px**2, config.vision.width)
        self.patch_positions = nn.Parameter(torch.randn(config.n_patches, config.vision.width) * 0.02)
        self.vision = Transformer(config.vision)
        self.vision_projection = nn.Linear(config.vision.width, config.embedding_width, bias=False)
        self.text_embedding = nn.Embedding(config.n_text_ids, config.text.width)
        self.text_positions = nn.Parameter(torch.randn(config.text_length, config.text.width) * 0.02)
        self.no_text = nn.Parameter(torch.randn(config.text.width) * 0.02)
        self.text = Transformer(config.text)
        self.text_projection = nn.Linear(config.text.width, config.embedding_width, bias=False)
        self.logit_scale = LogitScale()
        nn.init.normal_(self.text_embedding.weight, std=0.02)

    def encode_image(self, image_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] of the configured size to unit vectors (B, E)."""
        p = self.config.patch_size_px
        patches = rearrange(image_B3HW, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        hidden_BPD = self.vision(self.patch_embedding(patches) + self.patch_positions)
        return _unit(self.vision_projection(hidden_BPD.mean(1)))

    def encode_text(self, ids_BS: Tensor, n_ids_B: Tensor) -> Tensor:
        """Right-padded ids, of which the first `n_ids_B` count, to unit vectors (B, E). Empty texts are allowed."""
        # a learned vector stands before every text, so that an empty one has something to attend to
        start = self.no_text.expand(len(ids_BS), 1, -1)
        x_BSD = torch.cat((start, self.text_embedding(ids_BS) + self.text_positions), dim=1)
        real = torch.arange(x_BSD.shape[1], device=ids_BS.device)[None] <= n_ids_B[:, None]
        hidden = self.text(x_BSD, mask_B1LK=real[:, None, None])
        weight = real[..., None].to(hidden.dtype)
        return _unit(self.text_projection((hidden * weight).sum(1) / weight.sum(1)))


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x.float(), dim=-1)

"""A decoder over a condition and image ids, with a split head for text and image.

B batch, L sequence, D width, A axes, V vocabulary, I image ids, P patterns of sparse attention
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vqt2i.config import Config, build_config
from vqt2i.errors import ConfigError
from vqt2i.gpt.condition import ConditionConfig, TextCondition
from vqt2i.gpt.reader import build_reader
from vqt2i.gpt.sequence import LayoutConfig, SequenceLayout, Sequences
from vqt2i.nn.attention import BLOCK, FLEX_HEAD_WIDTH, block_mask
from vqt2i.nn.cache import BranchedCache, PrefixCache
from vqt2i.nn.sparsity import DenseConfig, PivotWindowConfig, SparsityConfig
from vqt2i.nn.transformer import Rotary, Transformer, TransformerConfig, build_norm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

EMBEDDING_STD = 0.02  # GPT-2's
# "rotary", "rotary_image" (LlamaGen's, see `ImageRotary`), or learned tables that are added to the embeddings: of text
# index, row and column ("learned", DALL·E's), of text index and image index in raster order ("raster", minDALL-E's), of
# the index in the whole without padding ("sequence", CogView's)
Positions = Literal["rotary", "rotary_image", "learned", "raster", "sequence"]


class HeadConfig(Config):
    """What scores ids, besides its matrix.

    norm: whether the head has a norm of its own, behind the transformer's last one (ruDALL-E's, in its published code).
    bias: whether it has a bias (ruDALL-E's, CLIP-GEN's).
    """

    norm: bool = False
    bias: bool = False


class GPTConfig(Config):
    """`text_tokenizer` and `image_tokenizer` are the fingerprints of what made the ids it was trained on.

    condition: what is read before an image. Of vectors and labels the layout has no text sizes, and no text tokenizer.
    """

    transformer: TransformerConfig
    layout: LayoutConfig
    condition: ConditionConfig = TextCondition()
    positions: Positions = "rotary"
    sparsity: SparsityConfig = DenseConfig()
    head: HeadConfig = HeadConfig()
    text_tokenizer: str | None = None
    image_tokenizer: str

    @property
    def sequence_layout(self) -> SequenceLayout:
        return SequenceLayout(self.layout, self.condition)

    @property
    def turns(self) -> bool:
        """Whether positions turn queries and keys, and are not added to embeddings."""
        return self.positions in ("rotary", "rotary_image")

    @property
    def counts_from_start(self) -> bool:
        """Whether the position of an image id depends on how much stands before the image."""
        return self.positions == "sequence" and not self.sequence_layout.counts_anew

    @model_validator(mode="after")
    def _texts_have_sizes_and_nothing_else_has(self) -> GPTConfig:
        sizes = {"layout.n_text_ids": self.layout.n_text_ids, "layout.text_length": self.layout.text_length}
        parts = sizes | {"text_tokenizer": self.text_tokenizer}
        wrong = [f"{name} {value}" for name, value in parts.items() if bool(value) != self.sequence_layout.reads_text]
        if wrong or (self.layout.padding != "masked" and not self.sequence_layout.reads_text):
            padding = f"{self.layout.padding} padding"
            raise ValueError(f"condition {self.condition.kind}: found {', '.join(wrong) or padding}; texts "
                             "have a tokenizer and sizes above 0, other conditions neither")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _what_is_drawn_from_its_half_has_one(self) -> GPTConfig:
        height, width, null = self.layout.grid_height, self.layout.grid_width, self.layout.null_condition
        if self.sequence_layout.is_upscaling and (height % 2 or width % 2 or null == "image_first"):
            raise ValueError(f"condition low_resolution: found a grid of {height} x {width} ids, null_condition "
                             f"{null}; expected even sides, and empty_text")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _heads_hold_pairs(self) -> GPTConfig:
        width, multiple = self.transformer.head_width, {"rotary": 2, "rotary_image": 4}.get(self.positions, 1)
        if width % multiple:
            raise ValueError(f"positions {self.positions}: heads are {width} wide, expected a multiple of {multiple}; "
                             "change transformer.width or n_heads, or take learned positions")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _pivots_are_in_the_image(self) -> GPTConfig:
        length = self.sequence_layout.image_length
        if isinstance(self.sparsity, PivotWindowConfig) and self.sparsity.n_pivots > length:
            raise ValueError(f"sparsity.n_pivots {self.sparsity.n_pivots}: expected at most the image's {length} ids")
        return self


class SplitHead(nn.Linear):
    """One matrix, read in slices: rows of the text ids and EOT, rows of the image ids.

    A call of its own and no product with its bare weight: ZeRO 3 brings a module's weights together when it is called.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.transformer.width, config.sequence_layout.n_targets, bias=config.head.bias)
        self.norm = build_norm(config.transformer) if config.head.norm else nn.Identity()

    def forward(self, hidden_BLD: Tensor, rows: slice) -> Tensor:
        return F.linear(self.norm(hidden_BLD), self.weight[rows], None if self.bias is None else self.bias[rows])


class ImageRotary(Rotary):
    """Rotary positions of rows and columns alone, half of the pairs each. What stands before an image has none.

    There cosines and sines are 0, and with them queries and keys: an image position scores each of them 0, and they
    look at each other evenly (LlamaGen, Sun et al. 2024, arXiv 2406.06525, in its published code).
    """

    def __init__(self, head_width: int) -> None:
        super().__init__((head_width // 4, head_width // 4), (10_000.0, 10_000.0))

    def forward(self, positions_BLA: Tensor) -> tuple[Tensor, Tensor]:
        """As `Rotary.forward`, of positions whose first axis is a text's."""
        cos, sin = super().forward(positions_BLA[..., 1:])
        in_image = (positions_BLA[..., 1] > 0)[:, None, :, None]
        return cos * in_image, sin * in_image


class GPT(nn.Module):
    """`forward` for whole sequences; `prefill`, then `step` or `step_text`, with a cache: every path, equal logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = config.sequence_layout
        width = config.transformer.width
        self.reader = build_reader(self.layout, width)
        self.embedding = nn.Embedding(self.layout.n_ids, width)
        self.transformer = Transformer(config.transformer)
        self.head = SplitHead(config)
        if config.positions == "rotary":
            # half of the pairs for the text axis, a quarter each for row and column; image grids are short, so their
            # base is too: every pair turns by a useful angle within the grid
            pairs = config.transformer.head_width // 2
            self.rotary = Rotary((pairs - 2 * (pairs // 4), pairs // 4, pairs // 4), (10_000.0, 100.0, 100.0))
        elif config.positions == "rotary_image":
            self.rotary = ImageRotary(config.transformer.head_width)
        else:
            layout, text_size = config.layout, self.layout.n_text_positions
            sizes = {
                "learned": (text_size, layout.grid_height + 1, layout.grid_width + 1),
                "raster": (text_size, self.layout.image_length + 1),
                "sequence": (self.layout.n_sequence_positions,),
            }[config.positions]
            self.position_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.patterns = config.sparsity.patterns(config.transformer.n_layers)
        if not isinstance(config.sparsity, DenseConfig):
            self.register_buffer("visible_PII", self._visible(), persistent=False)
        for table in (m for m in self.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        if config.head.bias:
            nn.init.zeros_(self.head.bias)

    def _visible(self) -> Tensor:
        """What an image position may see of the image, for each pattern in `patterns`; NumPy has no meta device."""
        grid = (self.config.layout.grid_height, self.config.layout.grid_width)
        names = dict.fromkeys(self.patterns)
        return torch.from_numpy(np.stack([self.config.sparsity.visible(name, *grid) for name in names]))

    def visible_by_layer(self) -> list[Tensor] | None:
        """For each layer, bool (I, I): which image positions an image position may look at; None is all up to it."""
        if isinstance(self.config.sparsity, DenseConfig):
            return None
        by_name = dict(zip(dict.fromkeys(self.patterns), self.visible_PII, strict=True))
        return [by_name[name] for name in self.patterns]

    @torch.no_grad()
    def start_from_codes(self, codes_KD: Tensor) -> None:
        """Start the image ids' embeddings and head rows as random projections of the image tokenizer's codes (K, D).

        Ids of similar codes then start alike, so that what is learned of one holds for the other from the beginning:
        about a quarter fewer samples to the same loss on the shapes.
        """
        n_codes, code_width = codes_KD.shape
        first, width = self.layout.first_image_id, self.config.transformer.width
        unit_KD = codes_KD / codes_KD.square().sum(-1).mean().sqrt()
        for weight, std in ((self.embedding.weight, EMBEDDING_STD), (self.head.weight, width**-0.5)):
            weight[first : first + n_codes] = unit_KD @ torch.randn(code_width, width) * std

    def with_grid(self, height: int, width: int) -> GPT:
        """A twin of the same weights for images of `height` rows of `width` ids.

        Rotary positions go on beyond the grid of the training, where no weight has learned what they mean.

        Raises:
            ConfigError: its positions, or their tables, have no place for such a grid.
        """
        positions, own = self.config.positions, self.layout.config
        if not self.config.turns and positions != "learned":
            raise ConfigError(f"grid of {height} x {width} ids: the model's positions are {positions!r}, which count "
                              "tokens, not rows and columns; expected a model of rotary or learned ones")  # fmt: skip
        if height < 1 or width < 1:
            raise ConfigError(f"grid of {height} x {width} ids: expected 1 or more rows and columns")
        if positions == "learned":
            most = tuple(table.num_embeddings - 1 for table in self.position_embeddings[1:])
            if height > most[0] or width > most[1]:
                raise ConfigError(f"grid of {height} x {width} ids: the model has learned positions for "
                                  f"{most[0]} x {most[1]} at most")  # fmt: skip
        twin = copy.deepcopy(self, memo={id(parameter): parameter for parameter in self.parameters()})
        layout = own.model_copy(update={"grid_height": height, "grid_width": width})
        twin.config = build_config(GPTConfig, {**self.config.model_dump(), "layout": layout.model_dump()}, "grid")
        twin.layout = twin.reader.layout = twin.config.sequence_layout
        if not isinstance(self.config.sparsity, DenseConfig):
            twin.visible_PII = twin._visible().to(self.device)
        return twin

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def cached_dtype(self) -> torch.dtype:
        """That of keys and values, as of all activations: the weights', or autocast's where it is on."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.embedding.weight.dtype

    def forward(self, sequences: Sequences) -> Tensor:
        """Last hidden states (B, L, D) of whole sequences; `text_logits` and `image_logits` score slices of them."""
        x_BLD, cos_sin = self.embed(sequences)
        return self.transformer(x_BLD, mask_B1LK=self._masks(sequences), causal=self._causal, cos_sin=cos_sin)

    def text_logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the text ids and EOT, (B, L, n_text_ids + 1)."""
        return self.head(hidden_BLD, slice(None, self.layout.first_image_id))

    def image_logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the image ids, (B, L, n_image_ids)."""
        return self.head(hidden_BLD, slice(self.layout.first_image_id, None))

    def prefill(self, prefix: Sequences, *, reversed_order: bool = False) -> tuple[Tensor, PrefixCache]:
        """Read a prefix into a new cache: by the `reader`, or in the reversed order `layout.image_prefix`.

        Returns the logits after it, (B, n_image_ids) or in the reversed order (B, n_text_ids + 1), and the cache.
        """
        x_BLD, cos_sin = self.embed(prefix)
        cache = PrefixCache(self.config.transformer, *x_BLD.shape[:2], x_BLD.device, self.cached_dtype)
        hidden = self.transformer(
            x_BLD, mask_B1LK=self._masks(prefix), causal=self._causal, cos_sin=cos_sin, cache=cache
        )
        if x_BLD.device.type == "cpu":  # PyTorch's CPU products of bf16 are slow for a few rows, and round the scores
            cache.kv = cache.kv.float()
        score = self.text_logits if reversed_order else self.image_logits
        return score(hidden[:, -1]), cache

    def step(self, image_BI: Tensor, cache: BranchedCache, n_scored: int = 1) -> Tensor:
        """Append the next image tokens (codes from 0) to every row.

        One token or several: the tokens are those that follow the cache's `n_filled`.

        Returns the logits after each of the last `n_scored` of them, (B, n_scored, n_image_ids).
        """
        first, visible = cache.n_filled, self.visible_by_layer()
        at_L = first + torch.arange(image_BI.shape[1], device=self.device)
        masks = visible and [seen_II[at_L][None, None] for seen_II in visible]
        hidden = self.read_on(self.layout.image_part(image_BI, first), cache, masks)
        return self.image_logits(hidden[:, -n_scored:])

    def step_text(self, text_BL: Tensor, cache: BranchedCache) -> Tensor:
        """Append the next text ids to every row of the reversed order; as `step`.

        Returns the logits after the last of them, (B, n_text_ids + 1).
        """
        hidden = self.read_on(self.layout.text_part(text_BL, cache.n_filled), cache)
        return self.text_logits(hidden[:, -1])  # whatever the sparsity, text sees the image

    def read_on(self, part: Sequences, cache: BranchedCache, masks_B1LK: list[Tensor] | None = None) -> Tensor:
        """Append what comes next in every row and return its last hidden states (B, L, D).

        Args:
            masks_B1LK: for each layer what is seen of the rows' own positions, (1, 1, L, I); None is all before.
        """
        before_B = cache.n_before_B if self.config.counts_from_start else None
        x_BLD, cos_sin = self.embed(part, before_B)
        return self.transformer(x_BLD, mask_B1LK=masks_B1LK, cos_sin=cos_sin, cache=cache)

    @property
    def _causal(self) -> bool:
        """Whether kernels may leave out what stands behind a query's block: a text seen in full is in the first one."""
        return self.config.layout.text_attention == "causal" or self.layout.prefix_length <= BLOCK

    def _masks(self, sequences: Sequences) -> Tensor | list[Tensor | BlockMask]:
        """What each position sees, (B, 1, L, L): one mask for all layers or one for each."""
        mask_B1LL, visible = self.layout.mask(sequences), self.visible_by_layer()
        if visible is None:
            return mask_B1LL
        index_BL = self.layout.image_index(sequences) + 1
        masks = {}
        for name, seen_II in zip(self.patterns, visible, strict=True):
            if name not in masks:
                seen = F.pad(seen_II, (1, 0, 1, 0), value=True)  # by and of what is no image
                sparse_B1LL = mask_B1LL & seen[index_BL[:, :, None], index_BL[:, None, :]].unsqueeze(1)
                masks[name] = block_mask(sparse_B1LL) if self._in_blocks(mask_B1LL.device) else sparse_B1LL
        return [masks[name] for name in self.patterns]

    def _in_blocks(self, device: torch.device) -> bool:
        """Whether attention is to leave out what is hidden from whole blocks: where FlexAttention can, in training."""
        t = self.config.transformer
        plain = not t.pb_relax and not t.dropout and t.head_width >= FLEX_HEAD_WIDTH
        return device.type == "cuda" and torch.is_grad_enabled() and plain

    def embed(
        self, sequences: Sequences, n_before_B: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What the transformer reads, (B, L, D), and for rotary positions their cosines and sines.

        Args:
            n_before_B: real positions before the first of these; None is none.
        """
        x_BLD = self.embedding(sequences.ids_BL)
        if sequences.vectors_BND is not None:
            vectors_BND = sequences.vectors_BND.to(x_BLD.dtype)
            x_BLD = torch.cat((vectors_BND, x_BLD[:, vectors_BND.shape[1] :]), dim=1)
        if self.config.turns:
            return x_BLD, self.rotary(sequences.positions_BLA)
        if self.config.positions == "learned":
            indices = sequences.positions_BLA.unbind(-1)
        elif self.config.positions == "raster":
            indices = (sequences.positions_BLA[..., 0], self.layout.place_index(sequences) + 1)
        else:
            indices = (self.layout.index_in_sequence(sequences, n_before_B),)
        for table, index_BL in zip(self.position_embeddings, indices, strict=True):
            x_BLD = x_BLD + table(index_BL)
        return x_BLD, None

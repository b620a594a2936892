"""A decoder over text and image ids with a split head.

B batch, L sequence, D width, A axes, V vocabulary, I image ids
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.gpt.sequence import LayoutConfig, SequenceLayout, Sequences
from vqt2i.nn.cache import BranchedCache, PrefixCache
from vqt2i.nn.transformer import Rotary, Transformer, TransformerConfig

EMBEDDING_STD = 0.02  # GPT-2's


class GPTConfig(Config):
    """`text_tokenizer` and `image_tokenizer` are the fingerprints of what made the ids it was trained on."""

    transformer: TransformerConfig
    layout: LayoutConfig
    positions: Literal["rotary", "learned"] = "rotary"
    text_tokenizer: str
    image_tokenizer: str


class SplitHead(nn.Linear):
    """One matrix, read in slices: rows of the text ids and EOT, rows of the image ids.

    A call of its own and no product with its bare weight: ZeRO 3 brings a module's weights together when it is called.
    """

    def forward(self, hidden_BLD: Tensor, rows: slice) -> Tensor:
        return F.linear(hidden_BLD, self.weight[rows])


class GPT(nn.Module):
    """`forward` for whole sequences, `prefill` and `step` for decoding with a cache: three paths, equal logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = SequenceLayout(config.layout)
        width = config.transformer.width
        self.embedding = nn.Embedding(self.layout.n_ids, width)
        self.transformer = Transformer(config.transformer)
        self.head = SplitHead(width, self.layout.n_targets, bias=False)
        if config.positions == "rotary":
            # half of the pairs for the text axis, a quarter each for row and column; image grids are short, so their
            # base is too: every pair turns by a useful angle within the grid
            pairs = config.transformer.head_width // 2
            self.rotary = Rotary((pairs - 2 * (pairs // 4), pairs // 4, pairs // 4), (10_000.0, 100.0, 100.0))
        else:
            sizes = (config.layout.text_length + 2, config.layout.grid_height + 1, config.layout.grid_width + 1)
            self.position_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in (m for m in self.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=width**-0.5)

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
        x_BLD, cos_sin = self._embed(sequences)
        return self.transformer(x_BLD, mask_B1LK=sequences.causal_mask(), causal=True, cos_sin=cos_sin)

    def text_logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the text ids and EOT, (B, L, n_text_ids + 1)."""
        return self.head(hidden_BLD, slice(None, self.layout.first_image_id))

    def image_logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the image ids, (B, L, n_image_ids)."""
        return self.head(hidden_BLD, slice(self.layout.first_image_id, None))

    def prefill(self, prefix: Sequences) -> tuple[Tensor, PrefixCache]:
        """Read a prefix (`layout.text_prefix`) into a new cache.

        Returns the image logits after it, (B, n_image_ids), and the cache.
        """
        x_BLD, cos_sin = self._embed(prefix)
        cache = PrefixCache(self.config.transformer, *x_BLD.shape[:2], x_BLD.device, self.cached_dtype)
        hidden = self.transformer(
            x_BLD, mask_B1LK=prefix.causal_mask(), causal=True, cos_sin=cos_sin, cache=cache
        )
        return self.image_logits(hidden[:, -1]), cache

    def step(self, image_BI: Tensor, cache: BranchedCache, n_scored: int = 1) -> Tensor:
        """Append the next image tokens (codes from 0) to every row.

        One token or several: the tokens are those that follow the cache's `n_filled`.

        Returns the logits after each of the last `n_scored` of them, (B, n_scored, n_image_ids).
        """
        x_BLD, cos_sin = self._embed(self.layout.image_part(image_BI, cache.n_filled))
        hidden = self.transformer(x_BLD, cos_sin=cos_sin, cache=cache)
        return self.image_logits(hidden[:, -n_scored:])

    def _embed(self, sequences: Sequences) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x_BLD = self.embedding(sequences.ids_BL)
        if self.config.positions == "rotary":
            return x_BLD, self.rotary(sequences.positions_BLA)
        for axis, table in enumerate(self.position_embeddings):
            x_BLD = x_BLD + table(sequences.positions_BLA[..., axis])
        return x_BLD, None

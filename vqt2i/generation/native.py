"""A GPT and a scorer on CPUs by compiled code (nn/native.py): each step of decoding is one call.

B batch (sequences), L positions of each, V vocabulary, I image ids, D width, H head width
"""

import copy

import torch
from torch import Tensor

from vqt2i.clip import CLIP
from vqt2i.gpt import GPT, Sequences
from vqt2i.nn.cache import BranchedCache, PrefixCache
from vqt2i.nn.native import (
    DTYPES,
    EMBED,
    LOGITS,
    NORMED,
    RESIDUAL,
    NativePrecision,
    NativeTransformer,
    Operation,
    as_table,
)


class NativeGPT:
    """Decodes as a GPT does, with `prefill` and `step` of its own, and reads whole sequences as it does.

    It follows no later change of the weights. What each precision rounds: `NativeTransformer`.

    Raises:
        ConfigError: as `NativeTransformer` raises it.
    """

    def __init__(self, gpt: GPT, precision: NativePrecision) -> None:
        self.layout, self.reader, self.device, self.precision = gpt.layout, gpt.reader, gpt.device, precision
        self._gpt, self.config = gpt, gpt.config
        transformer = NativeTransformer(gpt.transformer, gpt.config.transformer, precision, gpt.visible_by_layer())
        self._transformer = transformer
        first = gpt.layout.first_image_id
        self._cos_sin_IH, places_ID = self._positions()
        table_VD = gpt.embedding.weight[first : first + gpt.layout.config.n_image_ids]
        tables = {"weight": table_VD, "bias": places_ID}
        self._blocks = list(transformer.list_operations(keeps=True))
        operations = [
            transformer.operation(EMBED, RESIDUAL, RESIDUAL, tables, n_out=table_VD.shape[1]),
            *self._blocks,
            *([transformer.norm(gpt.head.norm, NORMED, NORMED)] if gpt.config.head.norm else []),
            transformer.product(gpt.head, NORMED, LOGITS, rows=slice(first, None)),
        ]
        self._operations = (Operation * len(operations))(*operations)

    def __call__(self, sequences: Sequences) -> Tensor:
        """As `GPT.forward`, for sequences padded at their end only and alike in their positions."""
        sees_in_full = self.layout.config.text_attention == "full" and (sequences.ids_BL == self.layout.t2i).any()
        if self._transformer.visible or sees_in_full:
            return self._gpt(sequences)
        x_BLD, cos_sin = self._gpt.embed(sequences)
        return self._transformer(x_BLD, causal=True, cos_sin=cos_sin)

    def text_logits(self, hidden_BLD: Tensor) -> Tensor:
        """As `GPT.text_logits`."""
        return self._gpt.text_logits(hidden_BLD)

    def prefill(self, prefix: Sequences) -> tuple[Tensor, PrefixCache]:
        """As `GPT.prefill`, by the GPT itself; keys and values are kept as steps read them."""
        logits_BV, cache = self._gpt.prefill(prefix)
        cache.kv = cache.kv.to(DTYPES[self._transformer.cache_format])
        return logits_BV, cache

    def step(self, image_BL: Tensor, cache: BranchedCache, n_scored: int = 1) -> Tensor:
        """As `GPT.step`; the logits are fp32."""
        logits_BLV = torch.empty(len(image_BL), n_scored, self.layout.config.n_image_ids)
        self._transformer.step(
            self._operations, image_BL, cache, logits_BLV, cos_sin_LH=self._cos_sin_IH,
            from_start=self.config.counts_from_start,
        )  # fmt: skip
        return logits_BLV

    def read_on(self, part: Sequences, cache: BranchedCache) -> Tensor:
        """As `GPT.read_on` without masks, for parts that are alike in their positions."""
        before_B = cache.n_before_B if self.config.counts_from_start else None
        x_BLD, cos_sin = self._gpt.embed(part, before_B)
        return self._transformer.read_on(self._blocks, x_BLD, cache, cos_sin)

    def _positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Of each image token: cosines and sines, (I, H), or what is added to its embedding, (I, D)."""
        gpt = self._gpt
        if gpt.config.counts_from_start:
            return None, gpt.position_embeddings[0].weight
        image = self.layout.image_part(torch.zeros(1, self.layout.image_length, dtype=torch.long))
        if gpt.config.turns:
            return as_table(gpt.rotary(image.positions_BLA)), None
        embedded_1ID, _ = gpt.embed(image)
        return None, embedded_1ID[0] - gpt.embedding(image.ids_BL)[0]


def native_clip(clip: CLIP, precision: NativePrecision) -> CLIP:
    """A twin whose vision transformer is a `NativeTransformer`; the rest is shared.

    Raises:
        ConfigError: as `NativeTransformer` raises it.
    """
    twin = copy.deepcopy(clip, memo={id(parameter): parameter for parameter in clip.parameters()})
    twin.vision = NativeTransformer(clip.vision, clip.config.vision, precision)
    return twin

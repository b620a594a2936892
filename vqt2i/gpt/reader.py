"""How a GPT reads its condition: from values of it to what stands before the image, one class for each kind.

B batch, N vectors, C their width, M ids of low resolution, D the model's width, L prefix
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vqt2i.gpt.condition import (
    LabelCondition,
    LowResolution,
    LowResolutionBatch,
    LowResolutionCondition,
    Projection,
    TextCondition,
    VectorBatch,
    VectorCondition,
    Vectors,
)
from vqt2i.gpt.sequence import SequenceLayout, Sequences
from vqt2i.text.batch import TextBatch, pad_texts


class TextReader(nn.Module):
    """Texts by the ids of their tokenizer."""

    def __init__(self, layout: SequenceLayout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, text: TextBatch) -> Sequences:
        """What stands before the images."""
        return self.layout.text_prefix(text)

    def collate(self, conditions: Sequence[tuple[int, ...]], device: torch.device, *, whole: bool = False) -> TextBatch:
        """Values in a batch, padded to the longest of them only, for what is not there costs nothing in any step; or
        with `whole` to the length that all have room in."""
        ids, most = [list(text) for text in conditions], self.layout.config.text_length
        length = most if whole else min(max(1, *map(len, ids)), most)
        return TextBatch(*(t.to(device) for t in pad_texts(ids, length)))

    def values(self, text: TextBatch) -> list[tuple[int, ...]]:
        """What `collate` makes a batch of: the condition of each row."""
        return [tuple(row[:n]) for row, n in zip(text.ids_BS.tolist(), text.n_ids_B.tolist(), strict=True)]

    def null(self, condition: tuple[int, ...]) -> tuple[int, ...]:
        """The null condition that guidance leads away from where it leads to this one."""
        return ()

    def dropped(self, text: TextBatch, dropped_B: Tensor) -> TextBatch:
        """The batch with the null condition in some rows."""
        return text._replace(n_ids_B=text.n_ids_B.masked_fill(dropped_B, 0))


class VectorReader(nn.Module):
    """Vectors by a projection to the model's width; the null is learned, of the vectors' width.

    text_shift: what moves the embedding of a text to where those of images are, which it was trained on; (C,), not
        learned, zero where nothing was measured.
    """

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        config = layout.condition
        self.layout = layout
        self.null_vectors = nn.Parameter(torch.randn(config.n_vectors, config.width) * config.width**-0.5)
        self.register_buffer("text_shift", torch.zeros(config.width))
        self.projection = build_projection(config.projection, config.width, width)

    def forward(self, batch: VectorBatch) -> Sequences:
        """As `TextReader.forward`."""
        null_NC = self.null_vectors[-batch.vectors_BNC.shape[1] :]  # from the right, as vectors are padded
        vectors_BNC = torch.where(batch.null_B[:, None, None], null_NC, batch.vectors_BNC.to(null_NC.dtype))
        return self.layout.vector_prefix(self.projection(vectors_BNC), batch.real_BN)

    def collate(self, conditions: Sequence[Vectors], device: torch.device, *, whole: bool = False) -> VectorBatch:
        """As `TextReader.collate`."""
        config = self.layout.condition
        length = config.n_vectors if whole else max(vectors.n for vectors in conditions)
        vectors_BNC = np.zeros((len(conditions), length, config.width), np.float32)
        for row, (n, values) in enumerate(conditions):
            if values:
                vectors_BNC[row, length - n :] = np.frombuffer(values, np.float32).reshape(n, -1)
        n_B1 = torch.tensor([[vectors.n] for vectors in conditions], device=device)
        real_BN = torch.arange(length, device=device) >= length - n_B1
        null_B = torch.tensor([not vectors.values for vectors in conditions], device=device)
        return VectorBatch(torch.from_numpy(vectors_BNC).to(device), real_BN, null_B)

    def values(self, batch: VectorBatch) -> list[Vectors]:
        """As `TextReader.values`."""
        rows = zip(batch.vectors_BNC.float().cpu(), batch.real_BN.cpu(), batch.null_B.tolist(), strict=True)
        read = [(row_NC[real_N], null) for row_NC, real_N, null in rows]
        return [Vectors(len(row_NC), b"" if null else row_NC.numpy().tobytes()) for row_NC, null in read]

    def null(self, condition: Vectors) -> Vectors:
        """As `TextReader.null`; as many as the condition has."""
        return Vectors(condition.n)

    def dropped(self, batch: VectorBatch, dropped_B: Tensor) -> VectorBatch:
        """As `TextReader.dropped`."""
        return batch._replace(null_B=batch.null_B | dropped_B)


class LabelReader(nn.Module):
    """Labels by an id each, behind those of the image; the one after the last is the null."""

    def __init__(self, layout: SequenceLayout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, label_B: Tensor) -> Sequences:
        """As `TextReader.forward`."""
        return self.layout.label_prefix(label_B)

    def collate(self, conditions: Sequence[int], device: torch.device, *, whole: bool = False) -> Tensor:
        """As `TextReader.collate`."""
        return torch.tensor(list(conditions), device=device)

    def values(self, label_B: Tensor) -> list[int]:
        """As `TextReader.values`."""
        return label_B.tolist()

    def null(self, condition: int) -> int:
        """As `TextReader.null`."""
        return self.layout.condition.n_labels

    def dropped(self, label_B: Tensor, dropped_B: Tensor) -> Tensor:
        """As `TextReader.dropped`."""
        return label_B.masked_fill(dropped_B, self.layout.condition.n_labels)


class LowResolutionReader(TextReader):
    """Texts as `TextReader` reads them, and behind them codes of low resolution."""

    def forward(self, batch: LowResolutionBatch) -> Sequences:
        """As `TextReader.forward`."""
        return self.layout.low_resolution_prefix(*batch)

    def collate(
        self, conditions: Sequence[LowResolution], device: torch.device, *, whole: bool = False
    ) -> LowResolutionBatch:
        """As `TextReader.collate`."""
        text = super().collate([condition.text for condition in conditions], device, whole=whole)
        return LowResolutionBatch(text, torch.tensor([condition.codes for condition in conditions], device=device))

    def values(self, batch: LowResolutionBatch) -> list[LowResolution]:
        """As `TextReader.values`."""
        codes = map(tuple, batch.codes_BM.tolist())
        return [LowResolution(*both) for both in zip(super().values(batch.text), codes, strict=True)]

    def null(self, condition: LowResolution) -> LowResolution:
        """As `TextReader.null`; what is drawn from stays."""
        return condition._replace(text=super().null(condition.text))

    def dropped(self, batch: LowResolutionBatch, dropped_B: Tensor) -> LowResolutionBatch:
        """As `TextReader.dropped`."""
        return batch._replace(text=super().dropped(batch.text, dropped_B))


Reader = TextReader | VectorReader | LabelReader | LowResolutionReader


def build_reader(layout: SequenceLayout, width: int) -> Reader:
    """The reader of the layout's kind of condition, for a model of this width."""
    if isinstance(layout.condition, VectorCondition):
        return VectorReader(layout, width)
    readers = {TextCondition: TextReader, LabelCondition: LabelReader, LowResolutionCondition: LowResolutionReader}
    return readers[type(layout.condition)](layout)


def build_projection(config: Projection, n_in: int, n_out: int) -> nn.Module:
    """The projection that is configured, from vectors of width `n_in` to `n_out`."""
    linear = partial(nn.Linear, bias=config.bias)
    if config.kind == "linear":
        return linear(n_in, n_out)
    return nn.Sequential(linear(n_in, config.width), nn.GELU(approximate="tanh"), linear(config.width, n_out))

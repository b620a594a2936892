"""Several texts in one tensor.

B batch, S longest text
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TextBatch(NamedTuple):
    """ids_BS: right-padded with zeros, (B, S) long. n_ids_B: how many count, (B,) long."""

    ids_BS: Tensor
    n_ids_B: Tensor


def pad_texts(texts: list[list[int]], text_length: int) -> TextBatch:
    """Stack texts of different length; longer ones keep their first `text_length` ids."""
    ids_BS = torch.zeros(len(texts), text_length, dtype=torch.long)
    for row, ids in enumerate(texts):
        kept = ids[:text_length]
        ids_BS[row, : len(kept)] = torch.tensor(kept, dtype=torch.long)
    return TextBatch(ids_BS, torch.tensor([min(len(ids), text_length) for ids in texts]))

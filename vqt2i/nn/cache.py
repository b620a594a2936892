"""What decoding keeps of the positions it has seen: the only state that generation mutates.

A prefix is read once into a `PrefixCache`. The rows that continue it, `n_each` for each of its rows, are `Branches`:
they look at the prefix where it lies, and have room of their own for what they add. A step may serve several of them
(`BranchedCache`), for each may have prefixes of its own length and its own number of branches. `StaticBranches` are
branches whose every tensor keeps its shape and its place, so that steps can be compiled and recorded.

B batch, G prefixes, N heads, L sequence (queries), K keys, P prefix length, S length of what was added, H head width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqt2i.nn.attention import attention, attention_after_prefix

if TYPE_CHECKING:
    from vqt2i.nn.transformer import TransformerConfig


class PrefixCache:
    """Keys and values of every layer for up to `length` positions; `n_filled` positions are valid."""

    def __init__(self, config: TransformerConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, 2, batch, config.n_heads, length, config.head_width)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.n_filled = 0

    def append(self, layer: int, k_BNLH: Tensor, v_BNLH: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of one layer; returns all valid ones, (B, N, n_filled + L, H) each."""
        end = self.n_filled + k_BNLH.shape[2]
        self.kv[layer, 0, :, :, self.n_filled : end] = k_BNLH
        self.kv[layer, 1, :, :, self.n_filled : end] = v_BNLH
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def attend(
        self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, mask_B1LK: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Store new keys and values and return what the queries find in all."""
        return attention(q_BNLH, *self.append(layer, k_BNLH, v_BNLH), mask_B1LK, causal=causal)

    def advance(self, n: int) -> None:
        """Count `n` positions, stored by every layer, as valid."""
        self.n_filled += n


class Branches:
    """Rows that continue a cached prefix, `n_each` side by side for each of its rows, by up to `length` positions.

    Args:
        real_GP: false for the prefix's padding.
    """

    def __init__(self, prefix: PrefixCache, real_GP: Tensor, n_each: int, length: int) -> None:
        n_layers, _, n_prefixes, n_heads, _, head_width = prefix.kv.shape
        self.n_rows = n_prefixes * n_each
        self.n_filled = 0
        self.prefix_kv = prefix.kv[..., : prefix.n_filled, :].to(_dtype_of_branches(prefix))
        self.hidden_GP = None if real_GP.all() else ~real_GP
        self.kv = self.prefix_kv.new_zeros(n_layers, 2, self.n_rows, n_heads, length, head_width)

    def attend(self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
        """Store new keys and values; what each query finds in its prefix and among its row's positions up to it."""
        end = self.n_filled + k_BNLH.shape[2]
        own_kv = self.kv[layer, :, :, :, :end]
        own_kv[0, :, :, self.n_filled :] = k_BNLH
        own_kv[1, :, :, self.n_filled :] = v_BNLH
        slot_S = torch.arange(end, device=q_BNLH.device)
        hidden_LS = slot_S > slot_S[self.n_filled :, None] if end - self.n_filled > 1 else None
        return attention_after_prefix(q_BNLH, *self.prefix_kv[layer], self.hidden_GP, *own_kv, hidden_LS)

    def advance(self, n: int) -> None:
        """Count `n` positions, stored by every layer, as valid."""
        self.n_filled += n


class StaticBranches:
    """As `Branches`, with room made before there is a prefix: every query is multiplied with all of the room, and what
    is not filled yet is hidden from it.

    `n_filled` is a tensor, (1,), on the device: a recorded step finds it where it was and moves it on.

    Args:
        like: a prefix whose device, precision and widths these have.
    """

    def __init__(self, like: PrefixCache, n_prefixes: int, n_each: int, prefix_length: int, length: int) -> None:
        n_layers, _, _, n_heads, _, head_width = like.kv.shape
        self.n_rows = n_prefixes * n_each
        dtype = _dtype_of_branches(like)

        def room(n_rows: int, n: int) -> list[Tensor]:
            # a tensor for each layer: inductor would write into a part of a larger one by copying all of it
            return [like.kv.new_zeros(2, n_rows, n_heads, n, head_width, dtype=dtype) for _ in range(n_layers)]

        self.prefix_kv, self.kv = room(n_prefixes, prefix_length), room(self.n_rows, length)
        self.hidden_GP = like.kv.new_zeros(n_prefixes, prefix_length, dtype=torch.bool)
        self.n_filled = like.kv.new_zeros(1, dtype=torch.long)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*self.prefix_kv, *self.kv, self.hidden_GP, self.n_filled]

    def restart(self, prefix: PrefixCache, real_GP: Tensor, rows_G: Tensor) -> None:
        """Continue other prefixes, those rows of `prefix`, from their ends."""
        for room, kv in zip(self.prefix_kv, prefix.kv, strict=True):
            room.copy_(kv[:, rows_G])
        self.hidden_GP.copy_(~real_GP[rows_G])
        self.n_filled.zero_()

    def attend(self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
        """As `Branches.attend`."""
        kv, new_kv = self.kv[layer], torch.stack((k_BNLH, v_BNLH))
        slot_L = self.n_filled + torch.arange(q_BNLH.shape[2], device=kv.device)
        kv.index_copy_(3, slot_L, new_kv.to(kv.dtype))
        hidden_LS = torch.arange(kv.shape[3], device=kv.device) > slot_L[:, None]
        return attention_after_prefix(q_BNLH, *self.prefix_kv[layer], self.hidden_GP, *kv, hidden_LS)

    def advance(self, n: int) -> None:
        """Count `n` positions, stored by every layer, as valid."""
        self.n_filled.add_(n)


class BranchedCache:
    """Branches stepped together, rows in their order. Others may hold the same branches, to step some of them alone."""

    def __init__(self, branches: Sequence[Branches] | Sequence[StaticBranches]) -> None:
        self.branches = tuple(branches)

    @property
    def n_filled(self) -> int | Tensor:
        """How many positions each row has added; of static branches a tensor, (1,)."""
        return self.branches[0].n_filled

    def attend(
        self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, mask_B1LK: None, *, causal: bool
    ) -> Tensor:
        """As `Branches.attend`, which needs no mask."""
        sizes = [branches.n_rows for branches in self.branches]
        rows = zip(self.branches, *(x.split(sizes) for x in (q_BNLH, k_BNLH, v_BNLH)), strict=True)
        return torch.cat([branches.attend(layer, q, k, v) for branches, q, k, v in rows])

    def advance(self, n: int) -> None:
        """Count `n` positions, stored by every layer, as valid."""
        for branches in self.branches:
            branches.advance(n)

    def rewind(self, n: int) -> None:
        """Forget the last `n` positions of every row."""
        self.advance(-n)


def _dtype_of_branches(prefix: PrefixCache) -> torch.dtype:
    """fp32 on CPUs: PyTorch's products of bf16 are slow there for a few rows, and round the scores."""
    return torch.float32 if prefix.kv.device.type == "cpu" else prefix.kv.dtype

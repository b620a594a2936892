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
        self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, mask_B1LK: Tensor | None, **how: bool
    ) -> Tensor:
        """Store new keys and values and return what the queries find in all; `how`: as `attention` takes it."""
        return attention(q_BNLH, *self.append(layer, k_BNLH, v_BNLH), mask_B1LK, **how)

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
        self.prefix_kv = prefix.kv[..., : prefix.n_filled, :]
        self.hidden_GP = None if real_GP.all() else ~real_GP
        self.kv = self.prefix_kv.new_zeros(n_layers, 2, self.n_rows, n_heads, length, head_width)

    @property
    def n_before_B(self) -> Tensor:
        """How many real positions each row has: its prefix's and its own."""
        length = self.prefix_kv.shape[-2]
        if self.hidden_GP is None:
            return torch.full((self.n_rows,), length + self.n_filled, device=self.kv.device)
        return _real_positions(self.hidden_GP, self.n_rows) + self.n_filled

    def attend(
        self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, seen_LI: Tensor | None, *, relaxed: bool
    ) -> Tensor:
        """Store new keys and values; what each query finds in its prefix and among its row's positions up to it.

        Args:
            seen_LI: true for those of the positions that a row may ever add that a query may see, none after it; None
                is all up to it.
        """
        end = self.n_filled + k_BNLH.shape[2]
        own_kv = self.kv[layer, :, :, :, :end]
        own_kv[0, :, :, self.n_filled :] = k_BNLH
        own_kv[1, :, :, self.n_filled :] = v_BNLH
        if seen_LI is not None:
            seen_LS = seen_LI[:, :end]
        elif end - self.n_filled > 1:
            slot_S = torch.arange(end, device=q_BNLH.device)
            seen_LS = slot_S <= slot_S[self.n_filled :, None]
        else:
            seen_LS = None
        return attention_after_prefix(q_BNLH, *self.prefix_kv[layer], self.hidden_GP, *own_kv, seen_LS, relaxed=relaxed)

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

        def room(n_rows: int, n: int) -> list[Tensor]:
            # a tensor for each layer: inductor would write into a part of a larger one by copying all of it
            return [like.kv.new_zeros(2, n_rows, n_heads, n, head_width) for _ in range(n_layers)]

        self.prefix_kv, self.kv = room(n_prefixes, prefix_length), room(self.n_rows, length)
        self.hidden_GP = like.kv.new_zeros(n_prefixes, prefix_length, dtype=torch.bool)
        self.n_filled = like.kv.new_zeros(1, dtype=torch.long)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*self.prefix_kv, *self.kv, self.hidden_GP, self.n_filled]

    @property
    def n_before_B(self) -> Tensor:
        """As `Branches.n_before_B`."""
        return _real_positions(self.hidden_GP, self.n_rows) + self.n_filled

    def restart(self, prefix: PrefixCache, real_GP: Tensor, rows_G: Tensor) -> None:
        """Continue other prefixes, those rows of `prefix`, from their ends."""
        for room, kv in zip(self.prefix_kv, prefix.kv, strict=True):
            room.copy_(kv[:, rows_G])
        self.hidden_GP.copy_(~real_GP[rows_G])
        self.n_filled.zero_()

    def attend(
        self, layer: int, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, seen_LI: Tensor | None, *, relaxed: bool
    ) -> Tensor:
        """As `Branches.attend`."""
        kv, new_kv = self.kv[layer], torch.stack((k_BNLH, v_BNLH))
        slot_L = self.n_filled + torch.arange(q_BNLH.shape[2], device=kv.device)
        kv.index_copy_(3, slot_L, new_kv.to(kv.dtype))
        if seen_LI is None:
            seen_LS = torch.arange(kv.shape[3], device=kv.device) <= slot_L[:, None]
        else:
            seen_LS = seen_LI[:, : kv.shape[3]]
        return attention_after_prefix(q_BNLH, *self.prefix_kv[layer], self.hidden_GP, *kv, seen_LS, relaxed=relaxed)

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

    @property
    def n_before_B(self) -> Tensor:
        """How many real positions stand before the next one of each row."""
        return torch.cat([branches.n_before_B for branches in self.branches])

    def attend(
        self,
        layer: int,
        q_BNLH: Tensor,
        k_BNLH: Tensor,
        v_BNLH: Tensor,
        mask_B1LK: Tensor | None,
        *,
        causal: bool,
        relaxed: bool,
    ) -> Tensor:
        """As `Branches.attend`; the mask is of the rows' own positions, (1, 1, L, I), as many in each."""
        sizes = [branches.n_rows for branches in self.branches]
        seen_LI = None if mask_B1LK is None else mask_B1LK[0, 0]
        rows = zip(self.branches, *(x.split(sizes) for x in (q_BNLH, k_BNLH, v_BNLH)), strict=True)
        return torch.cat([branches.attend(layer, q, k, v, seen_LI, relaxed=relaxed) for branches, q, k, v in rows])

    def advance(self, n: int) -> None:
        """Count `n` positions, stored by every layer, as valid."""
        for branches in self.branches:
            branches.advance(n)

    def follow(self, rows_B: Tensor) -> None:
        """Let each row go on from what row `rows_B` of it has added; both must continue one row of a prefix."""
        start = 0
        for branches in self.branches:
            own_B, n = rows_B[start : start + branches.n_rows] - start, branches.n_filled
            branches.kv[..., :n, :] = branches.kv[:, :, own_B, :, :n]
            start += branches.n_rows

    def rewind(self, n: int) -> None:
        """Forget the last `n` positions of every row."""
        self.advance(-n)


def _real_positions(hidden_GP: Tensor, n_rows: int) -> Tensor:
    """Of each row's prefix, (n_rows,)."""
    real_G = hidden_GP.shape[1] - hidden_GP.sum(1)
    return real_G.repeat_interleave(n_rows // len(real_G))

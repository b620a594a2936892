"""Attention: of sequences, of causal ones in bf16 on CPUs, of rows that share a prefix.

For bf16 PyTorch's CPU kernel is slow where the CPU has no AMX, and computes whole rows of scores, hidden or not. Here a
block of queries is multiplied with the keys that it can see, in fp32, and the probabilities are computed again for the
backward pass as in FlashAttention (Dao et al. 2022, arXiv 2205.14135, §3.1), so that memory stays linear in L. Forward
and backward pass of 4 x 12 heads at 376 positions on one thread of an AVX512-BF16 Xeon: 58 ms instead of 119. In fp32
PyTorch's is as fast: 63 ms against 53 on one thread, 37 against 38 on two.

B batch, G prefixes, N heads, L sequence (queries), K keys, P prefix length, S length after the prefix, H head width
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

RELAXATION = 32.0  # α of PB-relax, CogView's
FLEX_HEAD_WIDTH = 16  # the least that FlexAttention has kernels for
BLOCK = 64  # queries; of 48, 64, 96 and 128 the fastest for 98, 160 and 376 positions, one thread of an AVX512 CPU


def attention(
    q_BNLH: Tensor,
    k_BNKH: Tensor,
    v_BNKH: Tensor,
    mask_B1LK: Tensor | BlockMask | None,
    *,
    causal: bool,
    relaxed: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ / √H) v, for a mask (bool, true where a query may look); every query must see at least one key.

    Args:
        causal: whether the mask is square and hides every position behind a query's block of `BLOCK`, so that kernels
            may leave those out.
        relaxed: by `relaxed_attention`.
    """
    if not isinstance(mask_B1LK, Tensor | None):
        return _flex_attention()(q_BNLH, k_BNKH, v_BNKH, block_mask=mask_B1LK)
    if relaxed:
        return relaxed_attention(q_BNLH, k_BNKH, v_BNKH, mask_B1LK, dropout=dropout)
    if causal and q_BNLH.device.type == "cpu" and q_BNLH.dtype == torch.bfloat16 and not dropout:
        return causal_attention(q_BNLH, k_BNKH, v_BNKH, mask_B1LK)
    return F.scaled_dot_product_attention(q_BNLH, k_BNKH, v_BNKH, attn_mask=mask_B1LK, dropout_p=dropout)


def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)  # without, FlexAttention would hold all scores


def block_mask(mask_B1LL: Tensor) -> BlockMask:
    """The mask for FlexAttention, which leaves out blocks of 128 x 128 in which nothing is seen.

    Of 256 + 32 x 32 positions these are 66 % for rows, 45 % for columns and 60 % for 11 x 11 convolutions, where
    causality alone makes it 45 %. For training on CUDA (where it has not been run) only: on CPUs FlexAttention has no
    backward pass, though its forward pass of 4 heads takes 22, 35 and 23 ms where masked attention takes 36, 45 and 38.
    """
    # here, for the import takes a second
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_B1LL[b, 0, q, k]

    batch, _, length, _ = mask_B1LL.shape
    return create_block_mask(seen, batch, None, length, length, device=mask_B1LL.device)


def relaxed_attention(
    q_BNLH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask_B1LK: Tensor | None, *, dropout: float = 0.0
) -> Tensor:
    """The same function by Precision Bottleneck Relaxation (CogView, Ding et al. 2021, arXiv 2105.13290, §2.4).

    softmax((s - max s) α) v with s = (q / (α √H)) kᵀ: what is multiplied is α times smaller, so that scores that 16
    bits cannot hold never are. It is for products that are kept in 16 bits, as here (and costs their memory); kernels
    that keep scores in fp32, such as PyTorch's for plain attention, need none of it.
    """
    with torch.autocast(q_BNLH.device.type, enabled=False):  # it would keep the probabilities in fp32 too
        scores = (q_BNLH * (q_BNLH.shape[-1] ** -0.5 / RELAXATION)) @ k_BNKH.mT
        if mask_B1LK is not None:
            scores = torch.where(mask_B1LK, scores, -torch.inf)
        p = _relaxed(scores).softmax(-1)  # sums in fp32 inside
        return F.dropout(p, dropout) @ v_BNKH


def _relaxed(scores: Tensor) -> Tensor:
    """The scores as they would be without division by α, but for a constant in each row: at most 0."""
    return (scores - scores.detach().amax(-1, keepdim=True)) * RELAXATION


def attention_after_prefix(
    q_BNLH: Tensor,
    k_GNPH: Tensor,
    v_GNPH: Tensor,
    hidden_GP: Tensor | None,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    seen_LS: Tensor | None,
    *,
    relaxed: bool = False,
) -> Tensor:
    """Attention of rows that share prefixes, B / G rows side by side for each.

    One softmax over a row's prefix and its own positions. The queries of a prefix's rows are stacked, so that its keys
    and values are read once for all of them. The dtype of q is kept, the computation is in that of the keys.

    Args:
        hidden_GP: true for the padding of the prefixes; None if there is none.
        seen_LS: true for those of its row's own positions that a query may see; None if each sees all.
        relaxed: scores as in `relaxed_attention`.
    """
    n_prefixes, n_queries, n_own = len(k_GNPH), q_BNLH.shape[2], k_BNSH.shape[2]
    stack, unstack = "(g c) n l x -> g n (c l) x", "g n (c l) x -> (g c) n l x"
    with torch.autocast(q_BNLH.device.type, enabled=False):
        q = q_BNLH.to(k_BNSH.dtype) * (q_BNLH.shape[-1] ** -0.5 / (RELAXATION if relaxed else 1.0))
        shared = rearrange(q, stack, g=n_prefixes) @ k_GNPH.mT
        if hidden_GP is not None:
            shared.masked_fill_(hidden_GP[:, None, None], -torch.inf)
        own = q @ k_BNSH.mT
        if seen_LS is not None:
            own.masked_fill_(~seen_LS, -torch.inf)
        scores = torch.cat((rearrange(shared, unstack, l=n_queries), own), dim=-1)
        if relaxed:
            scores = _relaxed(scores)
        shared, own = scores.softmax(-1, dtype=torch.float32).to(q.dtype).split((k_GNPH.shape[2], n_own), dim=-1)
        y = rearrange(rearrange(shared, stack, g=n_prefixes) @ v_GNPH, unstack, l=n_queries) + own @ v_BNSH
    return y.to(q_BNLH.dtype)


@library.custom_op("vqt2i::causal_attention", mutates_args=())
def causal_attention(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, mask_B1LL: Tensor) -> Tensor:
    """softmax(q kᵀ / √H) v, for a mask (bool, true where a query may look) that hides all behind a query's block.

    The dtype of q is kept, the computation is fp32. Every query must see at least one key.
    """
    q, k, v = _rows(q_BNLH), _rows(k_BNLH), _rows(v_BNLH)
    hidden_B1LL = ~mask_B1LL
    out = torch.empty_like(q)
    with torch.autocast("cpu", enabled=False):
        for block, seen in _blocks(q.shape[1]):
            p = _probabilities(q[:, block], k[:, seen], hidden_B1LL[..., block, seen])
            torch.bmm(p, v[:, seen], out=out[:, block])
    return out.view(q_BNLH.shape).to(q_BNLH.dtype)


@library.custom_op("vqt2i::causal_attention_backward", mutates_args=())
def _backward(
    grad_BNLH: Tensor, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, mask_B1LL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = _rows(grad_BNLH), _rows(q_BNLH), _rows(k_BNLH), _rows(v_BNLH)
    hidden_B1LL = ~mask_B1LL
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with torch.autocast("cpu", enabled=False):
        for block, seen in _blocks(q.shape[1]):
            p = _probabilities(q[:, block], k[:, seen], hidden_B1LL[..., block, seen])
            grad_v[:, seen].baddbmm_(p.mT, grad[:, block])
            grad_p = torch.bmm(grad[:, block], v[:, seen].mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, torch.float32)
            scale = q.shape[-1] ** -0.5
            torch.baddbmm(grad_q[:, block], grad_scores, k[:, seen], beta=0, alpha=scale, out=grad_q[:, block])
            grad_k[:, seen].baddbmm_(grad_scores.mT, q[:, block], alpha=scale)
    return tuple(grad.view(q_BNLH.shape).to(q_BNLH.dtype) for grad in (grad_q, grad_k, grad_v))


def _rows(x_BNLH: Tensor) -> Tensor:
    """fp32 (B * N, L, H)."""
    return x_BNLH.float().flatten(0, 1).contiguous()


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys up to its last query."""
    starts = range(0, length, BLOCK)
    return [(slice(start, min(start + BLOCK, length)), slice(0, min(start + BLOCK, length))) for start in starts]


def _probabilities(q: Tensor, k: Tensor, hidden_B1QK: Tensor) -> Tensor:
    batch, _, *size = hidden_B1QK.shape
    scores = torch.empty(len(q), *size)
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    scores.view(batch, len(q) // max(batch, 1), *size).masked_fill_(hidden_B1QK, -torch.inf)
    return torch.softmax(scores, -1, out=scores)


@causal_attention.register_fake
def _(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, mask_B1LL: Tensor) -> Tensor:
    return torch.empty(q_BNLH.shape, dtype=q_BNLH.dtype, device=q_BNLH.device)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


@register_flop_formula([torch.ops.vqt2i.causal_attention, torch.ops.vqt2i.causal_attention_backward])
def _flops(*shapes: torch.Size, out_shape: object, **_: object) -> int:
    """Two products forward and four backward, over whole rows: what counts as useful work for MFU."""
    is_backward = len(shapes) == 5
    batch, heads, length, head_width = shapes[0]
    return (8 if is_backward else 4) * batch * heads * length**2 * head_width


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_BNLH: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_BNLH, *ctx.saved_tensors), None


causal_attention.register_autograd(_differentiate, setup_context=_save)

"""Transformer parts shared by the GPT and the scorer: pre-norm blocks, SwiGLU, qk-norm, rotary positions.

B batch, L sequence (queries), K keys, D width, N heads, H head width, A axes of a position
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqt2i.config import Config
from vqt2i.nn.attention import attention
from vqt2i.nn.cache import BranchedCache, PrefixCache


class TransformerConfig(Config):
    """Pre-norm blocks: RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), qk-norm (Henry et al. 2020)."""

    width: PositiveInt = 256
    n_layers: PositiveInt = 6
    n_heads: PositiveInt = 4
    mlp_width: PositiveInt = 640
    qk_norm: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TransformerConfig":
        if self.width % self.n_heads or (self.width // self.n_heads) % 4:
            raise ValueError(f"width {self.width} must be n_heads ({self.n_heads}) times a multiple of 4")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads


class Rotary(nn.Module):
    """Rotary positions over several axes (Su et al. 2021; axes side by side as in Heo et al. 2024, arXiv 2403.13298).

    The pairs of a head are dealt to the axes; an axis with base b and n pairs turns pair i by position * b^(-i/n).
    """

    def __init__(self, n_pairs_per_axis: Sequence[int], bases: Sequence[float]) -> None:
        super().__init__()
        rows = torch.zeros(len(bases), sum(n_pairs_per_axis))
        start = 0
        for axis, (n_pairs, base) in enumerate(zip(n_pairs_per_axis, bases, strict=True)):
            rows[axis, start : start + n_pairs] = base ** (-torch.arange(n_pairs) / n_pairs)
            start += n_pairs
        self.register_buffer("frequencies_AP", rows, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """What `.to` and `.bfloat16` call. Frequencies stay fp32: rounded ones would turn by other angles."""
        exact_AP = self.frequencies_AP
        super()._apply(fn, recurse)
        self.frequencies_AP = exact_AP.to(self.frequencies_AP.device)
        return self

    def forward(self, positions_BLA: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 (B, 1, L, H/2) each, for integer positions."""
        with torch.autocast(positions_BLA.device.type, enabled=False):  # it would turn by angles rounded to bf16
            angles = positions_BLA.float() @ self.frequencies_AP
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(x_BNLH: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + H/2]) of every head; keeps the dtype."""
    cos, sin = (t.to(x_BNLH.dtype) for t in cos_sin)
    a, b = x_BNLH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with optional qk-norm, rotary positions and cache."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.layer = config.n_heads, config.dropout, layer
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_B1LK: Tensor | None,
        causal: bool = False,
        cos_sin: tuple[Tensor, Tensor] | None,
        cache: PrefixCache | BranchedCache | None,
    ) -> Tensor:
        qkv = self.qkv(x_BLD)
        q, k, v = rearrange(qkv, "b l (three n h) -> three b n l h", three=3, n=self.n_heads)
        # the norms compute in fp32 under autocast; attention wants one dtype
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cos_sin is not None:
            q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        if cache is None:
            y = attention(q, k, v, mask_B1LK, causal=causal, dropout=self.dropout if self.training else 0.0)
        else:
            y = cache.attend(self.layer, q, k, v, mask_B1LK, causal=causal)
        return self.out(rearrange(y, "b n l h -> b l (n h)"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, **attention: Any) -> Tensor:
        """attention: what `Attention` takes besides its input."""
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD), **attention))
        return x_BLD + self.dropout(self.mlp(self.mlp_norm(x_BLD)))


class Transformer(nn.Module):
    """Blocks and a final norm; what sees what is the mask's matter.

    activation_checkpointing: set by training. Blocks keep no activations but their input, and compute them again for
        the backward pass (Chen et al. 2016).
    """

    activation_checkpointing = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self._initialise(config)

    def _initialise(self, config: TransformerConfig) -> None:
        # GPT-2: residual outputs shrink with depth so that the stream's variance does not grow with it
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                out = name.endswith(("out.weight", "down.weight"))
                std = config.width**-0.5 * ((2 * config.n_layers) ** -0.5 if out else 1.0)
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_B1LK: Tensor | None = None,
        causal: bool = False,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        cache: PrefixCache | BranchedCache | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) after the last norm.

        Args:
            mask_B1LK: bool, true where a query may look; every query must see at least one key. A `BranchedCache` has
                its own and takes None.
            causal: whether the mask is square and hides every later position, so that kernels may leave those out.
        """
        attention = {"mask_B1LK": mask_B1LK, "causal": causal, "cos_sin": cos_sin, "cache": cache}
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x_BLD = checkpoint(block, x_BLD, **attention, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, **attention)
        if cache is not None:
            cache.advance(x_BLD.shape[1])
        return self.norm(x_BLD)

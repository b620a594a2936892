"""Transformer parts shared by the GPT and the scorer: norms, attention, MLPs, blocks, rotary positions.

B batch, L sequence (queries), K keys, D width, N heads, H head width, A axes of a position
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqt2i.config import Config
from vqt2i.nn.attention import attention
from vqt2i.nn.cache import BranchedCache, PrefixCache

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class TransformerConfig(Config):
    """The defaults are RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020) and qk-norm (Henry et al. 2020).

    norm: "layer" is LayerNorm (Ba et al. 2016), "scaled_layer" LayerNorm of x / max|x| (see `ScaledLayerNorm`).
    norm_placement: "pre" has a norm before attention and MLP, "sandwich" one behind them too, at the end of the
        residual branch (Sandwich-LN: CogView, Ding et al. 2021, arXiv 2105.13290, §2.4).
    mlp: "gelu" is exact, "gelu_tanh" its approximation by tanh, "gelu_quick" x * sigmoid(1.702 x) (Hendrycks & Gimpel
        2016, arXiv 1606.08415).
    bias: of all linear maps; LayerNorms always have one.
    pb_relax: attention scores that fit 16 bits (see `relaxed_attention`).
    """

    width: PositiveInt = 256
    n_layers: PositiveInt = 6
    n_heads: PositiveInt = 4
    norm: Literal["rms", "layer", "scaled_layer"] = "rms"
    norm_eps: PositiveFloat = 1e-6
    norm_placement: Literal["pre", "sandwich"] = "pre"
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "gelu_quick"] = "swiglu"
    mlp_width: PositiveInt = 640
    bias: bool = False
    qk_norm: bool = True
    pb_relax: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerConfig:
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} must be n_heads ({self.n_heads}) times the width of a head")
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
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


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm(x / max|x|), so that no square of x leaves the range of 16 bits (CogView, arXiv 2105.13290, §2.4).

    LayerNorm does not see the scale of its input but for `eps`. The maximum is that of each position, where CogView's
    code takes an eighth (as an `eps` 64 times smaller) of that of the whole batch: a row depends on no neighbour.
    """

    def forward(self, x_BLD: Tensor) -> Tensor:
        top_BL1 = x_BLD.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x_BLD.dtype).tiny)
        return super().forward(x_BLD / top_BL1)


NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "scaled_layer": ScaledLayerNorm}


def build_norm(config: TransformerConfig) -> nn.Module:
    """A norm over the model's width."""
    return NORMS[config.norm](config.width, eps=config.norm_eps)


class Attention(nn.Module):
    """Multi-head self-attention with optional qk-norm, PB-relax, rotary positions and cache."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.layer = config.n_heads, config.dropout, layer
        self.relaxed = config.pb_relax
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_B1LK: Tensor | BlockMask | None,
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
        how = {"causal": causal, "relaxed": self.relaxed}
        if cache is None:
            y = attention(q, k, v, mask_B1LK, dropout=self.dropout if self.training else 0.0, **how)
        else:
            y = cache.attend(self.layer, q, k, v, mask_B1LK, **how)
        return self.out(rearrange(y, "b n l h -> b l (n h)"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): CLIP's."""
    return x * torch.sigmoid(1.702 * x)


GELUS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu_quick": quick_gelu}


class GELUMLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.gelu = GELUS[config.mlp]
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with a norm around each branch too if they are sandwiched."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        sandwich = config.norm_placement == "sandwich"
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer)
        self.attention_out_norm = build_norm(config) if sandwich else nn.Identity()
        self.mlp_norm = build_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELUMLP(config)
        self.mlp_out_norm = build_norm(config) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, **attention: Any) -> Tensor:
        """attention: what `Attention` takes besides its input."""
        branch = self.attention(self.attention_norm(x_BLD), **attention)
        x_BLD = x_BLD + self.dropout(self.attention_out_norm(branch))
        return x_BLD + self.dropout(self.mlp_out_norm(self.mlp(self.mlp_norm(x_BLD))))


class Transformer(nn.Module):
    """Blocks and a final norm; what sees what is the mask's matter.

    activation_checkpointing: set by training. Blocks keep no activations but their input, and compute them again for
        the backward pass (Chen et al. 2016).
    """

    activation_checkpointing = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = build_norm(config)
        self._initialise(config)

    def _initialise(self, config: TransformerConfig) -> None:
        # GPT-2: residual outputs shrink with depth so that the stream's variance does not grow with it
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                out = name.endswith(("out.weight", "down.weight"))
                std = config.width**-0.5 * ((2 * config.n_layers) ** -0.5 if out else 1.0)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_B1LK: Tensor | Sequence[Tensor | BlockMask] | None = None,
        causal: bool = False,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        cache: PrefixCache | BranchedCache | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) after the last norm.

        Args:
            mask_B1LK: bool, true where a query may look; every query must see at least one key. One for all layers or
                one for each. With a `BranchedCache` it is as that takes it.
            causal: see `attention`.
        """
        attention = {"causal": causal, "cos_sin": cos_sin, "cache": cache}
        one_for_all = mask_B1LK is None or isinstance(mask_B1LK, Tensor)
        masks = [mask_B1LK] * len(self.blocks) if one_for_all else mask_B1LK
        for block, mask in zip(self.blocks, masks, strict=True):
            if self.activation_checkpointing and self.training:
                x_BLD = checkpoint(block, x_BLD, mask_B1LK=mask, **attention, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, mask_B1LK=mask, **attention)
        if cache is not None:
            cache.advance(x_BLD.shape[1])
        return self.norm(x_BLD)

"""A transformer on CPUs as one call into compiled code (native.cpp), with matrices of 32, 16 or 8 bits.

A step of decoding multiplies a few rows with every matrix, so reading the matrices is what takes the time; PyTorch's
products read them at a fraction of the memory's rate, and around them stand hundreds of small operations. Here the
matrices lie in the order in which they are read, in as few bytes as the precision has.

B batch (sequences), L positions of each, D width, V vocabulary, O outputs, I inputs, H head width
"""

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_float, c_int32, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.errors import ConfigError
from vqt2i.nn.cache import BranchedCache
from vqt2i.nn.compiler import load_library
from vqt2i.nn.transformer import Transformer, TransformerConfig

NativePrecision = Literal["fp32", "bf16", "int8"]
# what native.cpp has under the same names
FORMATS = {"fp32": 0, "bf16": 1, "int8": 2}
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
NORMS = {"rms": 0, "layer": 1, "scaled_layer": 2}
ACTIVATIONS = {"swiglu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_quick": 3}
LANES, PANEL, TILE_ROWS = 16, 64, 32
HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 128)
RESIDUAL, NORMED, WIDE, NARROW, LOGITS = 0, 1, 2, 3, -1
EMBED, NORM, LINEAR, ATTEND, ACTIVATE = range(5)
ROWS_AT_ONCE = 512  # of whole sequences: inputs that stay in the CPU's cache beside a panel of a matrix


class Operation(ctypes.Structure):
    """One of a list that a call runs through; the fields are explained in native.cpp."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "format", "source", "target", "n_in", "n_out", "adds", "layer")),
        ("eps", c_float), ("padding", c_float),
        *((name, c_void_p) for name in ("weight", "bias", "scale", "visible")),
    )  # fmt: skip


class _Branches(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("n_rows", "n_each", "n_prefix", "capacity")),
        *((name, c_void_p) for name in ("prefix", "hidden", "n_before", "own")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in (
            "n_operations", "n_branches", "n_sequences", "n_tokens", "first", "n_scored", "n_heads", "head_width",
            "n_threads", "cache_format", "n_positions", "causal",
        )),
        ("operations", POINTER(Operation)), ("branches", POINTER(_Branches)),
        *((name, c_void_p) for name in ("ids", "cos_sin", "buffers", "packed", "row_scales", "scores", "logits")),
    )  # fmt: skip


class NativeTransformer(nn.Module):
    """Does what a `Transformer` does, in a precision. It follows no later change of the weights.

    fp32 gives what the transformer gives within rounding. bf16 rounds matrices, their inputs, keys and values to bf16.
    int8 rounds each row of a matrix and of its inputs to 8 bits by a scale of its own, and keys and values to bf16; of
    whole sequences both keep keys and values in fp32. Sums are fp32 or whole numbers. What comes out of a row does not
    depend on the rows beside it, bit by bit.

    Args:
        visible: for each layer which of a row's own positions each of them may see, (I, I); None is all before it.

    Raises:
        ConfigError: the weights are not on a CPU, this machine has no C++ compiler, or native.cpp lacks a part of the
            model.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: TransformerConfig,
        precision: NativePrecision,
        visible: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        device = next(transformer.parameters()).device
        if device.type != "cpu":
            raise ConfigError(f"the model is on {device}, expected cpu; take the engine plain or compiled")
        if config.head_width not in HEAD_WIDTHS:
            raise ConfigError(f"heads are {config.head_width} wide, expected one of "
                              f"{', '.join(map(str, HEAD_WIDTHS))}; take the engine plain")  # fmt: skip
        self.config, self.precision, self.visible = config, precision, visible
        self.cache_format: NativePrecision = "fp32" if precision == "fp32" else "bf16"
        self._library, self._transformer = load_library("native.cpp"), [transformer]  # in a list: no submodule
        self._kept: list[Tensor] = []  # what operations point to
        self._packed_matrices: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._whole = (Operation * self._n_operations)(*self.list_operations(keeps=False))
        self._n_rows = 0

    @torch.inference_mode()
    def forward(self, x_BLD: Tensor, *, causal: bool = False, cos_sin: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Hidden states (B, L, D) after the last norm, of whole sequences without padding.

        Args:
            causal: whether a position sees only itself and those before it; else all of its sequence.
            cos_sin: of the positions, alike for all sequences.
        """
        parts = x_BLD.split(max(1, ROWS_AT_ONCE // x_BLD.shape[1]))
        return torch.cat([self._forward(part, causal, cos_sin) for part in parts])

    def _forward(self, x_BLD: Tensor, causal: bool, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, width = x_BLD.shape
        config, table_LH = self.config, None if cos_sin is None else as_table(cos_sin)
        self._reserve(batch * length)
        self._buffers[RESIDUAL][: batch * length] = x_BLD.flatten(0, 1)
        # keys and values of one layer: the next one writes over them
        kv = torch.empty(2, batch, config.n_heads, length, config.head_width)
        branches = (_Branches * 1)(_Branches(batch, 1, 0, length, None, None, None, kv.data_ptr()))
        self._call(self._whole, branches, batch, length, 0, "fp32", causal=causal, cos_sin_LH=table_LH)
        return self._buffers[NORMED][: batch * length].view(batch, length, width).clone()

    def step(
        self,
        operations: ctypes.Array,
        ids_BL: Tensor,
        cache: BranchedCache,
        logits_BLV: Tensor,
        *,
        cos_sin_LH: Tensor | None,
        from_start: bool,
    ) -> None:
        """Append rows' next positions to a cache whose keys and values have the dtype of `cache_format`.

        Args:
            operations: an EMBED, `list_operations(keeps=True)`, and a product that writes to LOGITS.
            logits_BLV: takes the logits of the last of the L positions, as many as it has.
            cos_sin_LH: of all positions that a row may add.
            from_start: whether EMBED's table of positions counts from the start of a row's prefix, without padding.
        """
        (n_sequences, n_tokens), first = ids_BL.shape, cache.n_filled
        self._reserve(n_sequences * n_tokens)
        n_before = [b.n_before_B - first for b in cache.branches] if from_start else None
        branches = _as_structures(cache, n_before)
        self._call(operations, branches, n_sequences, n_tokens, first, self.cache_format, causal=True,
                   cos_sin_LH=cos_sin_LH, ids_BL=ids_BL.contiguous(), logits_BLV=logits_BLV)  # fmt: skip
        cache.advance(n_tokens)

    def read_on(
        self,
        operations: Sequence[Operation],
        x_BLD: Tensor,
        cache: BranchedCache,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Append what `x_BLD` embeds to the rows of a cache; hidden states (B, L, D) after the last norm.

        Args:
            operations: those of `list_operations(keeps=True)`.
            cos_sin: of the new positions, alike for all rows.
        """
        (batch, length, width), first = x_BLD.shape, cache.n_filled
        self._reserve(batch * length)
        self._buffers[RESIDUAL][: batch * length] = x_BLD.flatten(0, 1)
        table_LH = None if cos_sin is None else F.pad(as_table(cos_sin), (0, 0, first, 0))  # by number in the row
        self._call((Operation * len(operations))(*operations), _as_structures(cache, None), batch, length, first,
                   self.cache_format, causal=True, cos_sin_LH=table_LH)  # fmt: skip
        cache.advance(length)
        return self._buffers[NORMED][: batch * length].view(batch, length, width).clone()

    def _call(
        self, operations: ctypes.Array, branches: ctypes.Array, n_sequences: int, n_tokens: int, first: int,
        cache_format: NativePrecision, *, causal: bool, cos_sin_LH: Tensor | None, ids_BL: Tensor | None = None,
        logits_BLV: Tensor | None = None,
    ) -> None:  # fmt: skip
        longest = max(b.n_prefix for b in branches) + first + n_tokens
        n_positions, n_threads = -(-longest // LANES) * LANES + LANES, torch.get_num_threads()
        scores = torch.empty(n_threads, n_positions * (1 if ids_BL is not None else 1 + self.config.head_width))
        tensors = (ids_BL, cos_sin_LH, self._packed, self._row_scales, scores, logits_BLV)
        ids, cos_sin, *rest = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        call = _Call(
            len(operations), len(branches), n_sequences, n_tokens, first,
            0 if logits_BLV is None else logits_BLV.shape[1], self.config.n_heads, self.config.head_width, n_threads,
            FORMATS[cache_format], n_positions, causal, operations, branches, ids, cos_sin,
            ctypes.addressof(self._buffer_pointers), *rest,
        )  # fmt: skip
        self._library.vqt2i_run(ctypes.byref(call))

    def _reserve(self, n_rows: int) -> None:
        """Make room for the activations of so many rows."""
        if n_rows <= self._n_rows:
            return
        self._n_rows, config = n_rows, self.config
        widest = max(config.width, config.mlp_width)
        widths = {RESIDUAL: config.width, NORMED: config.width, WIDE: 3 * widest, NARROW: widest}
        self._buffers = [torch.empty(n_rows, widths[buffer]) for buffer in sorted(widths)]
        self._buffer_pointers = (c_void_p * len(widths))(*(buffer.data_ptr() for buffer in self._buffers))
        # whole tiles of rows (of AMX): products read those that are missing too, whatever they are
        self._packed = torch.empty(-(-n_rows // TILE_ROWS) * TILE_ROWS, max(widest, LANES), dtype=torch.int32)
        self._row_scales = torch.empty(n_rows, 2)

    @property
    def _n_operations(self) -> int:
        return self.config.n_layers * (10 if self.config.norm_placement == "sandwich" else 8) + 1

    def list_operations(self, *, keeps: bool) -> Iterator[Operation]:
        """Of the blocks and the last norm: from RESIDUAL to NORMED.

        Args:
            keeps: whether keys and values go to each layer's own part of a cache, or all to the same place.
        """
        config, (transformer,) = self.config, self._transformer
        sandwiched, gated = config.norm_placement == "sandwich", config.mlp == "swiglu"
        # what a branch gives goes to the residual, or first through a norm
        target, adds = (NORMED, 0) if sandwiched else (RESIDUAL, 1)
        for layer, block in enumerate(transformer.blocks):
            attention, mlp = block.attention, block.mlp
            gains = torch.stack((attention.q_norm.weight, attention.k_norm.weight)) if config.qk_norm else None
            seen_II = self.visible[layer] if self.visible else None
            yield self.norm(block.attention_norm)
            yield self.product(attention.qkv, NORMED, WIDE)
            yield self.operation(ATTEND, WIDE, NARROW, {"weight": gains, "visible": seen_II}, eps=config.norm_eps,
                                 layer=layer if keeps else 0, n_out=0 if seen_II is None else len(seen_II))  # fmt: skip
            yield self.product(attention.out, NARROW, target, adds)
            if sandwiched:
                yield self.norm(block.attention_out_norm, NORMED, RESIDUAL, 1)
            yield self.norm(block.mlp_norm)
            yield self.product(mlp.gate_up if gated else mlp.up, NORMED, WIDE)
            yield self.operation(ACTIVATE, WIDE, NARROW, format=ACTIVATIONS[config.mlp], n_out=config.mlp_width,
                                 n_in=config.mlp_width * (2 if gated else 1))  # fmt: skip
            yield self.product(mlp.down, NARROW, target, adds)
            if sandwiched:
                yield self.norm(block.mlp_out_norm, NORMED, RESIDUAL, 1)
        yield self.norm(transformer.norm)

    def norm(self, norm: nn.Module, source: int = RESIDUAL, target: int = NORMED, adds: int = 0) -> Operation:
        tensors = {"weight": norm.weight, "bias": getattr(norm, "bias", None)}
        sizes = {"n_in": norm.weight.numel(), "eps": norm.eps, "adds": adds}
        return self.operation(NORM, source, target, tensors, format=NORMS[self.config.norm], **sizes)

    def product(
        self, linear: nn.Linear, source: int, target: int, adds: int = 0, rows: slice = slice(None)
    ) -> Operation:
        """Inputs from one buffer, what a linear map makes of them into another; `rows`: of its matrix."""
        if linear not in self._packed_matrices:
            self._packed_matrices[linear] = pack(linear.weight[rows], self.precision)
        packed, scale_O = self._packed_matrices[linear]
        sizes = {"n_in": linear.in_features, "n_out": len(linear.weight[rows]), "adds": adds}
        bias = None if linear.bias is None else linear.bias[rows]
        operation = self.operation(LINEAR, source, target, {"scale": scale_O, "bias": bias}, **sizes)
        operation.format, operation.weight = FORMATS[self.precision], packed.data_ptr()
        return operation

    def operation(
        self, kind: int, source: int, target: int, tensors: dict[str, Tensor | None] | None = None, **numbers: float
    ) -> Operation:
        """tensors: by the name of the pointer that they become; bools, or else fp32."""
        operation = Operation(kind=kind, source=source, target=target, **numbers)
        for name, tensor in (tensors or {}).items():
            if tensor is not None:
                tensor = tensor.detach().contiguous()
                self._kept.append(tensor if tensor.dtype == torch.bool else tensor.float())
                setattr(operation, name, self._kept[-1].data_ptr())
        return operation


def pack(weight_OI: Tensor, precision: NativePrecision) -> tuple[Tensor, Tensor | None]:
    """A matrix in the order in which native.cpp reads it, and for int8 the scale of each output.

    Panels of 64 outputs; in a panel word by word of the inputs, of the smaller formats a multiple of 16 words; of a
    word the 64 outputs side by side. What is lacking is 0.
    """
    weight, scale_O = weight_OI.detach().float(), None
    n_inputs = PER_WORD[precision] * (1 if precision == "fp32" else LANES)
    if precision == "int8":
        scale_O = weight.abs().amax(1).clamp_min(1e-20) / 127
        weight = (weight / scale_O[:, None]).round() + 128
        scale_O = F.pad(scale_O, (0, -len(scale_O) % PANEL))
    weight = F.pad(weight, (0, -weight.shape[1] % n_inputs, 0, -len(weight) % PANEL))
    words = weight.to(DTYPES[precision]).unflatten(1, (-1, PER_WORD[precision])).unflatten(0, (-1, PANEL))
    return words.permute(0, 2, 1, 3).contiguous(), scale_O


def as_table(cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Cosines and sines of positions that are alike in all sequences, side by side, (L, H)."""
    return torch.cat([t[0, 0] for t in cos_sin], dim=-1)


def _as_structures(cache: BranchedCache, n_before: Sequence[Tensor] | None) -> ctypes.Array:
    rows = []
    for i, branches in enumerate(cache.branches):
        (n_prefixes, n_prefix), kv, hidden_GP = branches.prefix_kv.shape[2::2], branches.kv, branches.hidden_GP
        assert branches.prefix_kv.is_contiguous() and kv.is_contiguous()
        rows.append(_Branches(
            branches.n_rows, branches.n_rows // n_prefixes, n_prefix, kv.shape[4], branches.prefix_kv.data_ptr(),
            hidden_GP.data_ptr() if hidden_GP is not None else None, n_before[i].data_ptr() if n_before else None,
            kv.data_ptr(),
        ))  # fmt: skip
    return (_Branches * len(rows))(*rows)

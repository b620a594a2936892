"""Decoding steps of a GPT on CPUs as one call into compiled code (native.cpp), with matrices of 32, 16 or 8 bits.

A step of decoding multiplies a few rows with every matrix, so reading the matrices is what takes the time; PyTorch's
products read them at a fraction of the memory's rate, and around them stand hundreds of small operations. Here the
matrices lie in the order in which they are read, in as few bytes as the precision has.

B batch (sequences), L positions of each, V vocabulary, O outputs, I inputs, H head width
"""

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_float, c_int32, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.errors import ConfigError
from vqt2i.generation.compiler import load_library
from vqt2i.gpt import GPT, Sequences
from vqt2i.nn.cache import BranchedCache, PrefixCache

NativePrecision = Literal["fp32", "bf16", "int8"]
# what native.cpp has under the same names
FORMATS = {"fp32": 0, "bf16": 1, "int8": 2}
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
NORMS = {"rms": 0, "layer": 1, "scaled_layer": 2}
ACTIVATIONS = {"swiglu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_quick": 3}
LANES, PANEL = 16, 64
HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 128)
RESIDUAL, NORMED, WIDE, NARROW, LOGITS = 0, 1, 2, 3, -1
EMBED, NORM, LINEAR, ATTEND, ACTIVATE = range(5)


class _Operation(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "format", "source", "target", "n_in", "n_out", "adds", "layer")),
        ("eps", c_float), ("padding", c_float),
        *((name, c_void_p) for name in ("weight", "bias", "scale", "extra", "visible")),
    )  # fmt: skip


class _Branches(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("n_rows", "n_each", "n_prefix", "capacity")),
        *((name, c_void_p) for name in ("prefix", "hidden", "n_before", "own")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in (
            "n_operations", "n_branches", "n_sequences", "n_tokens", "first", "n_scored", "n_heads", "head_width",
            "n_threads", "cache_format", "n_positions", "padding",
        )),
        ("operations", POINTER(_Operation)), ("branches", POINTER(_Branches)),
        *((name, c_void_p) for name in ("ids", "buffers", "packed", "row_scales", "scores", "logits")),
    )  # fmt: skip


class NativeGPT:
    """Decodes as a GPT does, with `prefill` and `step` of its own. It follows no later change of the weights.

    fp32 has the GPT's logits within rounding. bf16 rounds matrices, their inputs, keys and values to bf16. int8 rounds
    each row of a matrix and of its inputs to 8 bits by a scale of its own, and keys and values to bf16. Sums are fp32
    or whole numbers. A row's logits do not depend on the rows beside it, bit by bit.

    Raises:
        ConfigError: the model is not on a CPU, this machine has no C++ compiler, or native.cpp lacks a part of the
            model.
    """

    def __init__(self, gpt: GPT, precision: NativePrecision) -> None:
        if gpt.device.type != "cpu":
            raise ConfigError(f"engine native: the model is on {gpt.device}, expected cpu; take engine plain")
        config = gpt.config.transformer
        if config.head_width not in HEAD_WIDTHS:
            raise ConfigError(f"engine native: heads are {config.head_width} wide, expected one of "
                              f"{', '.join(map(str, HEAD_WIDTHS))}; take engine plain")  # fmt: skip
        self.layout, self.device, self.precision = gpt.layout, gpt.device, precision
        self._gpt, self._library = gpt, load_library("native.cpp")
        self._cache_format: NativePrecision = "fp32" if precision == "fp32" else "bf16"
        self._kept: list[Tensor] = []  # what the operations point to
        operations = list(self._list_operations())
        self._operations = (_Operation * len(operations))(*operations)
        self._n_rows = 0

    def prefill(self, prefix: Sequences) -> tuple[Tensor, PrefixCache]:
        """As `GPT.prefill`, by the GPT itself; keys and values are kept as steps read them."""
        logits_BV, cache = self._gpt.prefill(prefix)
        cache.kv = cache.kv.to(DTYPES[self._cache_format])
        return logits_BV, cache

    def step(self, image_BL: Tensor, cache: BranchedCache, n_scored: int = 1) -> Tensor:
        """As `GPT.step`; the logits are fp32."""
        n_sequences, n_tokens = image_BL.shape
        config, first, n_threads = self._gpt.config.transformer, cache.n_filled, torch.get_num_threads()
        self._reserve(n_sequences * n_tokens)
        longest = max(branches.prefix_kv.shape[4] for branches in cache.branches) + first + n_tokens
        n_positions = -(-longest // LANES) * LANES
        scores = torch.empty(n_threads, n_positions)
        logits_BLV = torch.empty(n_sequences, n_scored, self.layout.config.n_image_ids)
        n_before = None
        if self._gpt.config.positions == "sequence":
            n_before = [branches.n_before_B - first for branches in cache.branches]
        ids_BL, branches = image_BL.contiguous(), _as_structures(cache, n_before)
        step = _Step(
            len(self._operations), len(branches), n_sequences, n_tokens, first, n_scored, config.n_heads,
            config.head_width, n_threads, FORMATS[self._cache_format], n_positions, 0, self._operations,
            branches, ids_BL.data_ptr(), ctypes.addressof(self._buffer_pointers), self._packed.data_ptr(),
            self._row_scales.data_ptr(), scores.data_ptr(), logits_BLV.data_ptr(),
        )  # fmt: skip
        self._library.vqt2i_step(ctypes.byref(step))
        cache.advance(n_tokens)
        return logits_BLV

    def _reserve(self, n_rows: int) -> None:
        """Make room for the activations of so many rows."""
        if n_rows <= self._n_rows:
            return
        self._n_rows, config = n_rows, self._gpt.config.transformer
        widest = max(config.width, config.mlp_width)
        widths = {RESIDUAL: config.width, NORMED: config.width, WIDE: 3 * widest, NARROW: widest}
        self._buffers = [torch.empty(n_rows, widths[buffer]) for buffer in sorted(widths)]
        self._buffer_pointers = (c_void_p * len(widths))(*(buffer.data_ptr() for buffer in self._buffers))
        self._packed = torch.empty(n_rows, widest, dtype=torch.int32)
        self._row_scales = torch.empty(n_rows, 2)

    def _list_operations(self) -> Iterator[_Operation]:
        gpt, config, first = self._gpt, self._gpt.config.transformer, self.layout.first_image_id
        sandwiched, visible = config.norm_placement == "sandwich", gpt.visible_by_layer()
        cos_sin, places_ID = self._positions()
        table_VD = gpt.embedding.weight[first : first + self.layout.config.n_image_ids]
        yield self._operation(EMBED, RESIDUAL, RESIDUAL, {"weight": table_VD, "bias": places_ID}, n_out=config.width)
        for layer, block in enumerate(gpt.transformer.blocks):
            attention, mlp = block.attention, block.mlp
            gains = torch.stack((attention.q_norm.weight, attention.k_norm.weight)) if config.qk_norm else None
            seen_II = visible[layer] if visible else None
            # what a branch gives goes to the residual, or first through a norm
            target, adds = (NORMED, 0) if sandwiched else (RESIDUAL, 1)
            yield self._norm(block.attention_norm)
            yield self._product(attention.qkv, NORMED, WIDE)
            yield self._operation(ATTEND, WIDE, NARROW, {"weight": gains, "extra": cos_sin, "visible": seen_II},
                                  layer=layer, eps=config.norm_eps, n_out=self.layout.image_length)  # fmt: skip
            yield self._product(attention.out, NARROW, target, adds)
            if sandwiched:
                yield self._norm(block.attention_out_norm, NORMED, RESIDUAL, 1)
            yield self._norm(block.mlp_norm)
            yield self._product(mlp.gate_up if config.mlp == "swiglu" else mlp.up, NORMED, WIDE)
            n_in = config.mlp_width * (2 if config.mlp == "swiglu" else 1)
            yield self._operation(ACTIVATE, WIDE, NARROW, format=ACTIVATIONS[config.mlp], n_in=n_in,
                                  n_out=config.mlp_width)  # fmt: skip
            yield self._product(mlp.down, NARROW, target, adds)
            if sandwiched:
                yield self._norm(block.mlp_out_norm, NORMED, RESIDUAL, 1)
        yield self._norm(gpt.transformer.norm)
        yield self._product(gpt.head, NORMED, LOGITS, rows=slice(first, None))

    def _positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Of each position that a row adds: cosines and sines, (I, H), or what is added to its embedding, (I, D)."""
        gpt = self._gpt
        if gpt.config.positions == "sequence":
            return None, gpt.position_embeddings[0].weight
        image = self.layout.image_part(torch.zeros(1, self.layout.image_length, dtype=torch.long))
        if gpt.config.positions == "rotary":
            return torch.cat([t[0, 0] for t in gpt.rotary(image.positions_BLA)], dim=-1), None
        embedded_1ID, _ = gpt.embed(image)
        return None, embedded_1ID[0] - gpt.embedding(image.ids_BL)[0]

    def _norm(self, norm: nn.Module, source: int = RESIDUAL, target: int = NORMED, adds: int = 0) -> _Operation:
        tensors = {"weight": norm.weight, "bias": getattr(norm, "bias", None)}
        sizes = {"n_in": norm.weight.numel(), "eps": norm.eps, "adds": adds}
        return self._operation(NORM, source, target, tensors, format=NORMS[self._gpt.config.transformer.norm], **sizes)

    def _product(
        self, linear: nn.Linear, source: int, target: int, adds: int = 0, rows: slice = slice(None)
    ) -> _Operation:
        """rows: of the matrix."""
        weight_OI = linear.weight[rows]
        packed, scale_O = pack(weight_OI, self.precision)
        self._kept.append(packed)
        sizes = {"n_in": weight_OI.shape[1], "n_out": weight_OI.shape[0], "adds": adds}
        operation = self._operation(LINEAR, source, target, {"scale": scale_O, "bias": linear.bias}, **sizes)
        operation.format, operation.weight = FORMATS[self.precision], packed.data_ptr()
        return operation

    def _operation(
        self, kind: int, source: int, target: int, tensors: dict[str, Tensor | None] | None = None, **numbers: float
    ) -> _Operation:
        """tensors: by the name of the pointer that they become."""
        operation = _Operation(kind=kind, source=source, target=target, **numbers)
        for name, tensor in (tensors or {}).items():
            if tensor is not None:
                tensor = tensor.detach().contiguous()
                self._kept.append(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor.float())
                setattr(operation, name, self._kept[-1].data_ptr())
        return operation


def pack(weight_OI: Tensor, precision: NativePrecision) -> tuple[Tensor, Tensor | None]:
    """A matrix in the order in which native.cpp reads it, and for int8 the scale of each output.

    Panels of 64 outputs; in a panel word by word of the inputs; of a word the 64 outputs side by side. What a panel or
    a word lacks is 0.
    """
    weight, scale_O = weight_OI.detach().float(), None
    if precision == "int8":
        scale_O = weight.abs().amax(1).clamp_min(1e-20) / 127
        weight = (weight / scale_O[:, None]).round() + 128
        scale_O = F.pad(scale_O, (0, -len(scale_O) % PANEL))
    weight = F.pad(weight, (0, -weight.shape[1] % PER_WORD[precision], 0, -len(weight) % PANEL))
    words = weight.to(DTYPES[precision]).unflatten(1, (-1, PER_WORD[precision])).unflatten(0, (-1, PANEL))
    return words.permute(0, 2, 1, 3).contiguous(), scale_O


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

"""A GPT whose matrices are 8-bit integers, for decoding.

A step of decoding multiplies a few rows with every matrix, so reading the matrices is what takes the time, and bytes
are read four times as fast as fp32: the products of 8 blocks of width 768, on one thread of an AVX512-VNNI Xeon, take
3.6 ms instead of 16.5 for 2 rows, and 14.6 instead of 45.7 for 32.

B batch, L sequence, I inputs, O outputs
"""

import copy
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPT

LARGEST = 127

Rounded = Literal["weights and activations", "weights"]


class Int8Linear(nn.Module):
    """x Wᵀ with the weight's rows and each row of x rounded to 8 bits, every row by a scale of its own; fp32 out.

    A scale for all of x, as in PyTorch's dynamic quantization, would make an image depend on its neighbours.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        scale_O = _scales(weight_OI).double()
        zero_O = torch.zeros(len(scale_O), dtype=torch.long)
        with warnings.catch_warnings():
            # PyTorch 2.15 says that such tensors will go; its oneDNN products of plain ones took 2.6 times as long
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            rounded = torch.quantize_per_channel(weight_OI.float(), scale_O, zero_O, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)

    def forward(self, x: Tensor) -> Tensor:
        top = x.abs().amax(-1, keepdim=True).clamp_min(1e-20)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x.float() / top, 1 / LARGEST, LARGEST + 1, self.packed
        )
        return y.mul_(top)


class Int8WeightLinear(nn.Module):
    """x Wᵀ with the weight's rows rounded to 8 bits, each by a scale of its own; x and the product stay in x's dtype.

    Compiled, the weight is widened as it is read; in plain PyTorch it is widened in memory first, which takes longer
    than reading a weight that never was narrow.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        scale_O = _scales(weight_OI)
        self.register_buffer("rounded_OI", (weight_OI.float() / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded_OI.to(x.dtype)) * self.scale_O.to(x.dtype)


class Int8ImageHead(nn.Module):
    """The rows of a `SplitHead` that score image ids, as `linear` has them; it is asked for no others."""

    def __init__(self, first: int, linear: nn.Module) -> None:
        super().__init__()
        self.first, self.linear = first, linear

    def forward(self, hidden_BLD: Tensor, rows: slice) -> Tensor:
        assert rows == slice(self.first, None)
        return self.linear(hidden_BLD)


@torch.no_grad()
def to_int8(gpt: GPT, rounded: Rounded | None = None) -> GPT:
    """A twin with 8-bit matrices in its blocks and its image head, for `prefill` and `step`; the rest is shared.

    It follows no later change of the weights. At 111 M parameters making it takes about 2 s, so keep it.

    Args:
        rounded: what is rounded to 8 bits. Activations too is for CPUs, which multiply bytes; weights only is for
            compiled steps on GPUs. None is what the model's device is served with best.

    Raises:
        ConfigError: activations are to be rounded, but the model is not on a CPU, or this CPU has no kernels for it.
    """
    device, engine = gpt.device, torch.backends.quantized.engine
    rounded = rounded or ("weights and activations" if device.type == "cpu" else "weights")
    if rounded == "weights and activations":
        if device.type != "cpu":
            raise ConfigError(f"int8 activations: the model is on {device}, expected cpu; round the weights only")
        if engine not in ("x86", "fbgemm"):
            raise ConfigError(f"precision int8: PyTorch has the engine {engine!r} here, expected 'x86'; decode in fp32")
    linear = Int8Linear if rounded == "weights and activations" else Int8WeightLinear
    twin = copy.deepcopy(gpt, memo={id(parameter): parameter for parameter in gpt.parameters()})
    for module in list(twin.transformer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, linear(child.weight))
    first = gpt.layout.first_image_id
    twin.head = Int8ImageHead(first, linear(gpt.head.weight[first:]))
    return twin


def _scales(weight_OI: Tensor) -> Tensor:
    """What 1 stands for in each row when its largest weight is 127, fp32 (O,)."""
    return weight_OI.float().abs().amax(1).clamp_min(1e-20) / LARGEST

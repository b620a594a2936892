"""A GPT whose matrices are 8-bit integers, for decoding on CPUs.

A step of decoding multiplies a few rows with every matrix, so reading the matrices is what takes the time, and bytes
are read four times as fast as fp32: the products of 8 blocks of width 768, on one thread of an AVX512-VNNI Xeon, take
3.6 ms instead of 16.5 for 2 rows, and 14.6 instead of 45.7 for 32.

B batch, L sequence, I inputs, O outputs
"""

import copy
import warnings

import torch
from torch import Tensor, nn

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPT

LARGEST = 127


class Int8Linear(nn.Module):
    """x Wᵀ + b with the weight's rows and each row of x rounded to 8 bits, every row by a scale of its own; fp32 out.

    A scale for all of x, as in PyTorch's dynamic quantization, would make an image depend on its neighbours.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias_O is None else bias_O.float()
        scale_O = (weight_OI.float().abs().amax(1).clamp_min(1e-20) / LARGEST).double()
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
        y.mul_(top)
        return y if self.bias is None else y.add_(self.bias)


class Int8ImageHead(Int8Linear):
    """The rows of a `SplitHead` that score image ids; it is asked for no others."""

    def __init__(self, gpt: GPT) -> None:
        self.first = gpt.layout.first_image_id
        super().__init__(gpt.head.weight[self.first :])

    def forward(self, hidden_BLD: Tensor, rows: slice) -> Tensor:
        assert rows == slice(self.first, None)
        return super().forward(hidden_BLD)


@torch.no_grad()
def to_int8(gpt: GPT) -> GPT:
    """A twin with 8-bit matrices in its blocks and its image head, for `prefill` and `step`; the rest is shared.

    It follows no later change of the weights. At 111 M parameters making it takes about 2 s, so keep it.

    Raises:
        ConfigError: the model is not on a CPU, or this CPU has no kernels for it.
    """
    device, engine = gpt.device, torch.backends.quantized.engine
    if device.type != "cpu":
        raise ConfigError(f"precision int8: the model is on {device}, expected cpu; decode in fp32 or bf16 there")
    if engine not in ("x86", "fbgemm"):
        raise ConfigError(f"precision int8: PyTorch has the engine {engine!r} here, expected 'x86'; decode in fp32")
    twin = copy.deepcopy(gpt, memo={id(parameter): parameter for parameter in gpt.parameters()})
    for module in list(twin.transformer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
    twin.head = Int8ImageHead(gpt)
    return twin

"""A GPT whose matrices are 8-bit integers, for compiled steps on GPUs; on CPUs `NativeGPT` has such matrices.

B batch, L sequence, I inputs, O outputs
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.gpt import GPT

LARGEST = 127


class Int8Linear(nn.Module):
    """x Wᵀ + b with the weight's rows rounded to 8 bits, each by a scale of its own; all else stays in x's dtype.

    Compiled, the weight is widened as it is read; in plain PyTorch it is widened in memory first, which takes longer
    than reading a weight that never was narrow.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        scale_O = weight_OI.float().abs().amax(1).clamp_min(1e-20) / LARGEST
        self.register_buffer("rounded_OI", (weight_OI.float() / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O)
        self.bias_O = bias_O

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.rounded_OI.to(x.dtype)) * self.scale_O.to(x.dtype)
        return y if self.bias_O is None else y + self.bias_O.to(x.dtype)


class Int8ImageHead(Int8Linear):
    """The rows of a `SplitHead` that score image ids; it is asked for no others."""

    def __init__(self, gpt: GPT) -> None:
        self.first = gpt.layout.first_image_id
        bias = gpt.head.bias
        super().__init__(gpt.head.weight[self.first :], None if bias is None else bias[self.first :])
        self.norm = gpt.head.norm

    def forward(self, hidden_BLD: Tensor, rows: slice) -> Tensor:
        assert rows == slice(self.first, None)
        return super().forward(self.norm(hidden_BLD))


@torch.no_grad()
def to_int8(gpt: GPT) -> GPT:
    """A twin with 8-bit matrices in its blocks and its image head, for `prefill` and `step`; the rest is shared.

    It follows no later change of the weights.
    """
    twin = copy.deepcopy(gpt, memo={id(parameter): parameter for parameter in gpt.parameters()})
    for module in list(twin.transformer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
    twin.head = Int8ImageHead(gpt)
    return twin

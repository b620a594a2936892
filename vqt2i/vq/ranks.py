"""What the image tokenizer's statistics need of the other ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate the equally shaped `x` of all ranks along dimension 0, in rank order (no gradient)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of the equally shaped `x` of all ranks (no gradient)."""
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    dist.all_reduce(x)
    return x / dist.get_world_size()

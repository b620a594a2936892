"""Measures of a reconstruction and of how the codebook is used. Images are float in [-1, 1].

B batch, H height, W width, K codes
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vqt2i.errors import DataError

PEAK = 2.0  # largest difference of two pixels
WINDOW_PX, WINDOW_SIGMA = 11, 1.5


def psnr(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,); equal images count as 100 dB."""
    errors_B = (x_B3HW.float() - y_B3HW.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(PEAK**2 / errors_B.clamp_min(PEAK**2 * 1e-10))


def ssim(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), 1 for equal ones: mean over channels and window positions.

    Source: Wang et al. 2004 (IEEE TIP 13, 4): Gaussian window of 11 px, sigma 1.5, K1 = 0.01, K2 = 0.03, no padding.

    Raises:
        DataError: a side is shorter than the window.
    """
    height, width = x_B3HW.shape[-2:]
    if min(height, width) < WINDOW_PX:
        raise DataError(f"SSIM needs images of at least {WINDOW_PX} px, found {height} x {width}")
    x, y = x_B3HW.float(), y_B3HW.float()
    offsets = torch.arange(WINDOW_PX, device=x.device) - WINDOW_PX // 2
    window = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    window = window / window.sum()

    def blurred(z: Tensor) -> Tensor:
        z = F.conv2d(z, window.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
        return F.conv2d(z, window.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)

    with torch.autocast(x.device.type, enabled=False):  # in bf16 nothing would be left of a small variance
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean((1, 2, 3))


class Usage(NamedTuple):
    """usage: share of codes seen at least once. perplexity: effective number of codes, 1 to K. dead_codes: not seen."""

    usage: float
    perplexity: float
    dead_codes: int


class CodebookCounter:
    """Counts codes, on all ranks."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.reset()

    def reset(self) -> None:
        self.counts_K = torch.zeros(self.vocab_size, dtype=torch.long)

    def update(self, ids: Tensor) -> None:
        """Add ids of any shape."""
        counts_K = self.counts_K.to(ids.device)
        # not bincount: on a GPU it makes the host wait
        self.counts_K = counts_K.index_add(0, ids.flatten(), counts_K.new_ones(()).expand(ids.numel()))

    def total(self) -> Tensor:
        """Counts of all ranks since the last reset, (K,) long."""
        counts_K = self.counts_K.clone()
        if dist.is_initialized():
            dist.all_reduce(counts_K)
        return counts_K

    def compute(self) -> Usage:
        """Usage over the ids of all ranks since the last reset."""
        counts_K = self.total()
        shares_K = counts_K.double() / counts_K.sum().clamp_min(1)
        entropy = -torch.xlogy(shares_K, shares_K).sum()
        dead = int((counts_K == 0).sum())
        return Usage(1 - dead / self.vocab_size, float(entropy.exp()), dead)

"""The logit-Laplace distribution of pixel values, on the bounded range that pixels have.

Source: Ramesh et al. 2021 (arXiv 2102.12092), appendix A.3, with its map of pixels into (0, 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.1  # pixels are mapped into [MARGIN, 1 - MARGIN]: logits stay finite


def to_open_interval(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] to [MARGIN, 1 - MARGIN]."""
    return (1 - 2 * MARGIN) * (x + 1) / 2 + MARGIN


def location_of(decoded_B6HW: Tensor) -> Tensor:
    """The picture in the decoder's output: pixels whose logit is the location; unclamped, (B, 3, H, W)."""
    location_B3HW, _ = decoded_B6HW.float().chunk(2, dim=1)
    return 2 * (location_B3HW.sigmoid() - MARGIN) / (1 - 2 * MARGIN) - 1


def logit_laplace_loss(decoded_B6HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """Negative log-likelihood of pixels in [-1, 1] in nats, averaged over batch, channels and pixels (a scalar).

    decoded_B6HW: locations of the logits, then logarithms of their scales.
    """
    location_B3HW, log_scale_B3HW = decoded_B6HW.float().chunk(2, dim=1)
    pixel_B3HW = to_open_interval(target_B3HW.float())
    logit_B3HW = torch.logit(pixel_B3HW)
    error_B3HW = (logit_B3HW - location_B3HW).abs() * torch.exp(-log_scale_B3HW)
    # log x (1 - x) of a pixel, from its logit
    volume_B3HW = F.logsigmoid(logit_B3HW) + F.logsigmoid(-logit_B3HW)
    return (error_B3HW + log_scale_B3HW + volume_B3HW).mean() + math.log(2)

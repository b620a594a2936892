"""Pixel conventions, here and nowhere else: models see float CHW in [-1, 1], files and people see uint8 HWC RGB."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(image_HW3: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(image_HW3)).movedim(-1, -3)
    return x.float().div_(127.5).sub_(1.0)


def to_uint8(x_3HW: Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1] (clamped) to uint8 (..., H, W, 3), rounded to nearest."""
    x = x_3HW.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return x.movedim(-3, -1).contiguous().cpu().numpy()


def fit_square(image_HW3: np.ndarray, size_px: int) -> np.ndarray:
    """Centre-crop to a square and resample (Lanczos) to `size_px`; an image that fits already is returned as it is."""
    height, width = image_HW3.shape[:2]
    if (height, width) == (size_px, size_px):
        return image_HW3
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    image = Image.fromarray(image_HW3).resize(
        (size_px, size_px), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    return np.asarray(image)

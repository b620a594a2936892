"""Pixel conventions, here and nowhere else: models see float CHW in [-1, 1], files and people see uint8 HWC RGB."""

from io import BytesIO
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqt2i.errors import DataError

GREY = 128  # what is shown where a picture has nothing yet

Variants = Literal["centre", "flip", "five-crop", "ten-crop", "quarters"]
_CROPS_AND_MIRRORED = {
    "centre": (1, False), "flip": (1, True), "five-crop": (5, False), "ten-crop": (5, True), "quarters": (8, False),
}  # fmt: skip
_CORNER_SHARE = 1 / 1.1  # of the side of the centred square, as LlamaGen (arXiv 2406.06525) crops it


def to_tensor(image_HW3: np.ndarray | Tensor) -> Tensor:
    """uint8 (..., H, W, 3) to contiguous float32 (..., 3, H, W) in [-1, 1]; a tensor stays on its device."""
    x = image_HW3 if isinstance(image_HW3, Tensor) else torch.from_numpy(np.ascontiguousarray(image_HW3))
    x = x.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(127.5).sub_(1.0)


def to_uint8(x_3HW: Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1] (clamped) to uint8 (..., H, W, 3), rounded to nearest."""
    x = x_3HW.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return x.movedim(-3, -1).contiguous().cpu().numpy()


def halved(x_B3HW: Tensor) -> Tensor:
    """Images of half the height and width: the means of 2 x 2 pixels."""
    return F.avg_pool2d(x_B3HW, 2)


def png_bytes(image: Image.Image) -> bytes:
    """The image as the content of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def fit_square(image_HW3: np.ndarray, size_px: int) -> np.ndarray:
    """Centre-crop to a square and resample (Lanczos) to `size_px`; an image that fits already is returned as it is."""
    if image_HW3.shape[:2] == (size_px, size_px):
        return image_HW3
    return _resampled(image_HW3, size_px, 1.0, 0, 0)


def require_side(image_HW3: np.ndarray, side_px: int, name: str) -> None:
    """Raises DataError for an image with a shorter side: made larger, it would show nothing of that size."""
    height, width = image_HW3.shape[:2]
    if min(height, width) < side_px:
        raise DataError(f"{name}: {width} x {height} pixels; super-resolution learns from pictures of {side_px} x "
                        f"{side_px} and more: make the data set of larger ones, without smaller ones (make_dataset "
                        "--size, --min-side)")  # fmt: skip


def n_variants(variants: Variants) -> int:
    """How many pictures are made of one: 1, 2, 5, 10, or 8 with "quarters"."""
    n_crops, mirrored = _CROPS_AND_MIRRORED[variants]
    return n_crops * (1 + mirrored)


def fit_variant(image_HW3: np.ndarray, size_px: int, variants: Variants, index: int) -> np.ndarray:
    """Variant `index` of an image, uint8 (size_px, size_px, 3): the crops first, then the same mirrored.

    Crop 0 is `fit_square`, the others are the corners of that square, 1 / 1.1 of its side. Mirrored pictures need
    captions that do not tell left from right. "quarters" are the square, four times, and the quarters of it: for image
    tokenizers that are to know pictures in two sizes, both alike well.
    """
    n_crops, _ = _CROPS_AND_MIRRORED[variants]
    mirror, crop = divmod(index, n_crops)
    share, n_whole = (1 / 2, 4) if variants == "quarters" else (_CORNER_SHARE, 1)
    if crop >= n_whole:
        bottom, right = divmod(crop - n_whole, 2)
        image_HW3 = _resampled(image_HW3, size_px, share, bottom, right)
    else:
        image_HW3 = fit_square(image_HW3, size_px)
    return image_HW3[:, ::-1] if mirror else image_HW3


def _resampled(image_HW3: np.ndarray, size_px: int, share: float, bottom: int, right: int) -> np.ndarray:
    """Of the centred square, the corner with `share` of its side (bottom, right: 0 or 1), resampled to `size_px`."""
    height, width = image_HW3.shape[:2]
    square = min(height, width)
    side = square * share
    left, top = (width - square) // 2 + right * (square - side), (height - square) // 2 + bottom * (square - side)
    image = Image.fromarray(image_HW3).resize(
        (size_px, size_px), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    return np.array(image)

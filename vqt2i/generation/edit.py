"""What of a given picture stays and what is drawn anew: in pixels, in cells of the model's grid, in fixed tokens.

The tokens of cells that stay are fixed: they are read and not drawn (`Job.fixed`). A token is drawn after those before
it in raster order, so that what stays below a hole cannot say what goes into it. It can say which of several candidates
fits: `likelihood_scores` (rerank.py) asks the GPT for the whole picture, with all that stays.

H, W pixels of a canvas, Y, X cells, I image ids
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vqt2i.data.images import GREY
from vqt2i.errors import DataError, PromptError
from vqt2i.generation.rows import FixedIds
from vqt2i.runtime import stream_seed


class Mask(NamedTuple):
    """Draw anew where a picture of the same size is white (bool, (height, width)), keep the rest."""

    redrawn_HW: np.ndarray


class Box(NamedTuple):
    """Draw a rectangle of pixels anew, keep the rest."""

    x: int
    y: int
    width: int
    height: int


class KeepTop(NamedTuple):
    """Keep this share of the picture, from its top, and complete it: 0 < share < 1."""

    share: float


class Extend(NamedTuple):
    """Draw so many pixels around the picture, and keep all of it."""

    left: int
    top: int
    right: int
    bottom: int


class Vary(NamedTuple):
    """Draw this share of the cells anew, others in each candidate: 0 < share <= 1."""

    share: float


Change = Mask | Box | KeepTop | Extend | Vary


class Paste(NamedTuple):
    """Put the kept pixels themselves back into what was drawn, which gets the size of the canvas.

    feather_px: over so many of them, beside what was redrawn, the one goes over into the other.
    """

    feather_px: int = 0


class Canvas(NamedTuple):
    """A picture, uint8 (H, W, 3), and where it is to be drawn anew, bool (H, W)."""

    image_HW3: np.ndarray
    redrawn_HW: np.ndarray

    def shown(self) -> np.ndarray:
        """The picture with what is to be drawn anew in GREY."""
        return np.where(self.redrawn_HW[..., None], np.uint8(GREY), self.image_HW3)

    def redrawn_cells(self, rows: int, columns: int) -> np.ndarray:
        """Bool (rows, columns): which cells of a grid hold a pixel that is to be drawn anew."""
        redrawn_1HW = torch.from_numpy(self.redrawn_HW.astype(np.float32))[None]
        return F.adaptive_max_pool2d(redrawn_1HW, (rows, columns))[0].bool().numpy()


def open_canvas(image: Image.Image | np.ndarray, change: Change) -> Canvas:
    """The picture, larger where it is extended, and which pixels of it the change redraws (of a `Vary` all).

    Raises:
        DataError: not a picture, or a mask of another size.
        PromptError: numbers out of range, or a box that is not inside the picture.
    """
    image_HW3 = pixels_of(image)
    height, width = image_HW3.shape[:2]
    redrawn_HW = np.zeros((height, width), dtype=bool)
    if isinstance(change, Mask):
        if change.redrawn_HW.shape != redrawn_HW.shape:
            found = " x ".join(str(side) for side in change.redrawn_HW.shape[::-1])
            raise DataError(f"mask: {found} pixels, the picture has {width} x {height}; expected as many")
        redrawn_HW = change.redrawn_HW.astype(bool)
    elif isinstance(change, Box):
        x, y, box_width, box_height = change
        if min(x, y) < 0 or min(box_width, box_height) < 1 or x + box_width > width or y + box_height > height:
            raise PromptError(f"box {x} {y} {box_width} {box_height} (x, y, width, height): expected one inside the "
                              f"picture's {width} x {height} pixels")  # fmt: skip
        redrawn_HW[y : y + box_height, x : x + box_width] = True
    elif isinstance(change, KeepTop):
        if not 0 < change.share < 1:
            raise PromptError(f"share kept from the top: found {change.share:g}, expected more than 0, less than 1")
        redrawn_HW[round(change.share * height) :] = True
    elif isinstance(change, Extend):
        if min(change) < 0 or not any(change):
            raise PromptError(f"extend by {' '.join(map(str, change))} (left, top, right, bottom): expected pixels, "
                              "0 or more of each and some")  # fmt: skip
        left, top, right, bottom = change
        around = ((top, bottom), (left, right))
        # an encoder that sees beyond its cell is to see nothing unusual there
        image_HW3 = np.pad(image_HW3, (*around, (0, 0)), mode="edge")
        redrawn_HW = np.pad(redrawn_HW, around, constant_values=True)
    else:
        if not 0 < change.share <= 1:
            raise PromptError(f"share to vary: found {change.share:g}, expected more than 0 and at most 1")
        redrawn_HW[:] = True
    return Canvas(image_HW3, redrawn_HW)


def fit_grid(image_HW3: np.ndarray, rows: int, columns: int, cell_px: int) -> np.ndarray:
    """The picture resampled (Lanczos) to cells of a grid; stretched by half a cell at most.

    Raises:
        DataError: it has another shape than the grid.
    """
    height, width = image_HW3.shape[:2]
    if abs(width * rows / height - columns) > 0.5 and abs(height * columns / width - rows) > 0.5:
        longest, (down, across) = max(rows, columns), (height, width)
        fitting = [max(1, round(longest * side / max(down, across))) for side in (down, across)]
        raise DataError(f"picture of {width} x {height} pixels: expected the shape of the model's grid of {rows} rows "
                        f"of {columns} cells; crop it, or give a grid of its shape, such as {fitting[0]} "
                        f"{fitting[1]} (--grid)")  # fmt: skip
    if (height, width) == (rows * cell_px, columns * cell_px):
        return image_HW3
    return _resized(image_HW3, columns * cell_px, rows * cell_px)


def varied_cells(share: float, rows: int, columns: int, seed: int, index: int) -> np.ndarray:
    """Bool (rows, columns): which cells candidate `index` redraws, at least one: a function of (seed, index) alone."""
    n_cells = rows * columns
    order = np.random.default_rng(stream_seed("vary", seed, index)).permutation(n_cells)
    return (order < max(1, round(share * n_cells))).reshape(rows, columns)


def fix_kept(ids_HW: torch.Tensor, redrawn_YX: np.ndarray) -> FixedIds:
    """The ids, row by row, with None for those of redrawn cells; () where nothing is kept.

    A cell has as many ids, side by side, as the rows of ids are longer than those of cells.
    """
    redrawn_HW = redrawn_YX.repeat(ids_HW.shape[1] // redrawn_YX.shape[1], axis=1)
    pairs = zip(ids_HW.flatten().tolist(), redrawn_HW.flatten().tolist(), strict=True)
    return () if redrawn_YX.all() else tuple(None if redrawn else id for id, redrawn in pairs)


def paste(canvas: Canvas, drawn_HW3: np.ndarray, how: Paste) -> np.ndarray:
    """The canvas with what was drawn, resampled to its size, where it was redrawn; uint8 (H, W, 3)."""
    height, width = canvas.image_HW3.shape[:2]
    drawn_HW3 = drawn_HW3 if drawn_HW3.shape == canvas.image_HW3.shape else _resized(drawn_HW3, width, height)
    share_1HW = torch.from_numpy(canvas.redrawn_HW.astype(np.float32))[None]
    for _ in range(how.feather_px):
        share_1HW = torch.maximum(share_1HW, F.max_pool2d(share_1HW, 3, 1, 1) - 1 / (how.feather_px + 1))
    share_HW1 = share_1HW[0, ..., None].numpy()
    return np.rint(canvas.image_HW3 * (1 - share_HW1) + drawn_HW3 * share_HW1).astype(np.uint8)


def pixels_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3). Raises DataError for what is no picture."""
    pixels = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise DataError(f"picture: expected uint8 (height, width, 3), found {pixels.dtype} {pixels.shape}")
    return pixels


def _resized(image_HW3: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(image_HW3).resize((width, height), Image.Resampling.LANCZOS))

"""Pictures of twice the height and width, drawn window by window (super-resolution of CogView, Ding et al. 2021, arXiv
2105.13290, §3.2).

The GPT draws a window of as many ids as it was trained to, from the ids of that part of the small picture. Windows
overlap by half, and what other windows have drawn is fixed (`Job.fixed`), so that each goes on what stands around it.
What a window draws beside an edge that is not the picture's is drawn without a look behind that edge; it is left to the
window that sees further there.

B pictures, H, W grid of a small one, R, C of a large one, Y, X of a window
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqt2i.errors import DataError, PromptError
from vqt2i.generation.decode import Start, decode_image_ids
from vqt2i.generation.rows import Job
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, LowResolution
from vqt2i.runtime import stream_seed
from vqt2i.vq import AnyImageTokenizer


class Small(NamedTuple):
    """A picture to be drawn in twice its size: its ids, (H, W), and its text's.

    negative: ids of a text that guidance leads away from; None is of no text. The indices are those of a `Job`.
    """

    ids_HW: Tensor
    text: tuple[int, ...]
    prompt_index: int
    image_index: int
    negative: tuple[int, ...] | None = None


class Window(NamedTuple):
    """Where a window of the large grid begins, and which of the ids that it draws are kept, bool (Y, X)."""

    top: int
    left: int
    kept_YX: np.ndarray


def plan_windows(rows: int, columns: int, height: int, width: int, unit: tuple[int, int]) -> list[Window]:
    """Windows of height x width ids over a grid of rows x columns, in the order of drawing: row by row.

    Each id is kept by the first window in which it is `unit` ids, rows and columns, from all edges that are not the
    grid's, or as far as it is in any.

    Args:
        unit: rows and columns of ids that stand for one cell of the small picture; all other sizes are multiples.
    """
    tops, lefts = _starts(rows, height, unit[0]), _starts(columns, width, unit[1])
    places = [(top, left) for top in tops for left in lefts]
    deepest_RC, drawn_by_RC = np.full((rows, columns), -1), np.zeros((rows, columns), int)
    for number, (top, left) in enumerate(places):
        at = slice(top, top + height), slice(left, left + width)
        down, across = _depths(top, height, rows, unit[0]), _depths(left, width, columns, unit[1])
        depth_YX = np.minimum(down[:, None], across)
        drawn_by_RC[at][depth_YX > deepest_RC[at]] = number
        deepest_RC[at] = np.maximum(deepest_RC[at], depth_YX)
    return [
        Window(top, left, drawn_by_RC[top : top + height, left : left + width] == number)
        for number, (top, left) in enumerate(places)
    ]


def _starts(whole: int, size: int, unit: int) -> list[int]:
    step = max(unit, size // 2 // unit * unit)
    return [*range(0, whole - size, step), whole - size]


def _depths(start: int, size: int, whole: int, unit: int) -> np.ndarray:
    """How many units from the window's edges each place is, at most 1; the edges of the whole are none."""
    place = np.arange(size) // unit
    from_start = place if start > 0 else np.full(size, 1)
    from_end = place[::-1] if start + size < whole else np.full(size, 1)
    return np.minimum(np.minimum(from_start, from_end), 1)


def require_upscaler(gpt: GPT) -> None:
    """Raises PromptError for a GPT that does not draw from half the resolution."""
    if not gpt.layout.is_upscaling:
        raise PromptError(f"this GPT reads a {gpt.layout.condition.kind} and cannot upscale; take one that "
                          "configs/gpt/superres_tiny.yaml or the like trains")  # fmt: skip


def require_upscalable(height_px: int, width_px: int, gpt: GPT, vq: AnyImageTokenizer) -> None:
    """Raises DataError for a picture that is not made of whole cells, or smaller than what a window is drawn from."""
    cell_px, layout = vq.config.downsample, gpt.layout.config
    columns = layout.grid_width // vq.config.ids_per_cell
    least = layout.grid_height // 2 * cell_px, columns // 2 * cell_px
    if height_px % cell_px or width_px % cell_px or height_px < least[0] or width_px < least[1]:
        raise DataError(f"picture of {width_px} x {height_px} pixels: expected sides that {cell_px} divides, and "
                        f"{least[1]} x {least[0]} or more; crop or resize it")  # fmt: skip


def upscale_ids(
    gpt: GPT,
    small: Sequence[Small],
    sampling: SamplingConfig,
    seed: int,
    *,
    ids_per_cell: int = 1,
    start: Start | None = None,
    rows_at_once: int = 64,
    on_progress: Callable[[float], None] | None = None,
) -> list[Tensor]:
    """The ids of each large picture, (2H, 2W) on the CPU. One depends on its `Small` and the seed alone.

    Args:
        gpt: of a condition of low resolution, or what stands for it, as `decode_image_ids` takes it.
        ids_per_cell: of the image tokenizer.
        start, rows_at_once: as `decode_image_ids` takes them.
        on_progress: called after each step with how much was drawn in it, in pictures.
    """
    of_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, one in enumerate(small):
        of_shape[one.ids_HW.shape].append(index)
    large: dict[int, Tensor] = {}
    for shape, indices in of_shape.items():
        layout = gpt.layout.config
        unit = 2, 2 * ids_per_cell
        windows = plan_windows(2 * shape[0], 2 * shape[1], layout.grid_height, layout.grid_width, unit)
        n_tokens = len(windows) * gpt.layout.image_length
        draw = partial(
            decode_image_ids, gpt, sampling=sampling, start=start, rows_at_once=rows_at_once,
            on_token=on_progress and (lambda n, whole=n_tokens: on_progress(n / whole)),
        )  # fmt: skip
        drawn_BRC = _draw_windows(draw, [small[index] for index in indices], windows, seed)
        large |= dict(zip(indices, drawn_BRC, strict=True))
    return [large[index] for index in range(len(small))]


def _draw_windows(draw: Callable[..., Tensor], small: Sequence[Small], windows: Sequence[Window], seed: int) -> Tensor:
    """The ids of large pictures of one shape, (B, R, C); `draw`: jobs and a seed to ids."""
    height, width = small[0].ids_HW.shape
    large_BRC = torch.full((len(small), 2 * height, 2 * width), -1)
    for number, window in enumerate(windows):
        kept_YX = torch.from_numpy(window.kept_YX)
        rows, columns = kept_YX.shape
        at = slice(window.top, window.top + rows), slice(window.left, window.left + columns)
        half = tuple(slice(part.start // 2, part.stop // 2) for part in at)
        n_needed = int(kept_YX.flatten().nonzero().max()) + 1 if kept_YX.any() else 0
        jobs = [
            _job(one, tuple(one.ids_HW[half].flatten().tolist()), ids_YX, n_needed)
            for one, ids_YX in zip(small, large_BRC[:, *at], strict=True)
        ]
        drawn_BYX = draw(jobs, seed=stream_seed("window", seed, number))
        large_BRC[:, *at] = torch.where(kept_YX, drawn_BYX, large_BRC[:, *at])
    return large_BRC


def _job(small: Small, codes: tuple[int, ...], ids_YX: Tensor, n_needed: int) -> Job:
    """The window with these codes in half the resolution, of whose first ids those below 0 are to be drawn."""
    negative = None if small.negative is None else LowResolution(small.negative, codes)
    fixed = [None if id < 0 else id for id in ids_YX.flatten().tolist()]
    fixed[n_needed:] = [0] * (len(fixed) - n_needed)  # whatever stands there, it is not looked at
    return Job(LowResolution(small.text, codes), small.prompt_index, small.image_index, negative, fixed=tuple(fixed))

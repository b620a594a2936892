"""What `generate` leaves on disk: a PNG per kept picture, a labelled grid, `scores.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from vqt2i.files import write_json
from vqt2i.generation.pipeline import Sample

TILE_PX, MARGIN_PX, LABEL_PX = 128, 8, 16
# fonts that hold Chinese, by the file names under which systems install them
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)


def next_folder(parent: Path) -> Path:
    """The first of `parent/0001`, `parent/0002`, ... that is not there yet."""
    taken = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:04d}"


def write_outputs(
    folder: Path, groups: Sequence[Sequence[Sample]], n: int, settings: dict[str, Any], fingerprints: dict[str, str]
) -> list[Path]:
    """Write the first `n` samples of each prompt's candidates, the grid of them, and the scores of all candidates.

    Returns the paths of the pictures, the grid first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, rows = [folder / "grid.png"], []
    for group in groups:
        prompt = {"prompt": group[0].prompt, "n_truncated_ids": group[0].n_truncated, "candidates": []}
        for rank, sample in enumerate(group):
            name = f"{sample.prompt_index:03d}-{rank:02d}.png" if rank < n else None
            prompt["candidates"].append({"index": sample.image_index, "file": name, "scores": sample.scores})
            if name:
                write_picture(folder / name, sample, settings, fingerprints)
                paths.append(folder / name)
        rows.append(prompt)
    labelled_grid([group[:n] for group in groups]).save(paths[0])
    write_json(folder / "scores.json", {"settings": settings, "models": fingerprints, "prompts": rows})
    return paths


def write_picture(path: Path, sample: Sample, settings: dict[str, Any], fingerprints: dict[str, str]) -> None:
    """A PNG whose text chunk `vqt2i` (JSON) says how to draw it again."""
    facts = {
        "prompt": sample.prompt, "prompt_index": sample.prompt_index, "image_index": sample.image_index,
        "seed": sample.seed, "settings": settings, "models": fingerprints, "scores": sample.scores,
    }  # fmt: skip
    info = PngInfo()
    info.add_itxt("vqt2i", json.dumps(facts, ensure_ascii=False))
    Image.fromarray(sample.image_HW3).save(path, pnginfo=info)


def labelled_grid(groups: Sequence[Sequence[Sample]]) -> Image.Image:
    """A row per prompt, its text above, pictures enlarged without smoothing; scores beneath."""
    columns = max(len(group) for group in groups)
    row_px = TILE_PX + 2 * LABEL_PX + MARGIN_PX
    # wide enough for a sentence above a single picture
    width = max(columns * (TILE_PX + MARGIN_PX), 3 * TILE_PX) + MARGIN_PX
    grid = Image.new("RGB", (width, len(groups) * row_px + MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(grid), _font(12)
    for row, group in enumerate(groups):
        y = MARGIN_PX + row * row_px
        draw.text((MARGIN_PX, y), _shortened(draw, group[0].prompt, font, width - 2 * MARGIN_PX), "black", font)
        for column, sample in enumerate(group):
            x = MARGIN_PX + column * (TILE_PX + MARGIN_PX)
            grid.paste(_enlarged(sample.image_HW3), (x, y + LABEL_PX))
            score = "  ".join(f"{name} {value:.2f}" for name, value in sample.scores.items())
            draw.text((x, y + LABEL_PX + TILE_PX + 1), score, "#777", _font(8))
    return grid


def _enlarged(image_HW3: np.ndarray) -> Image.Image:
    image = Image.fromarray(image_HW3)
    method = Image.Resampling.NEAREST if image.width < TILE_PX else Image.Resampling.LANCZOS
    return image.resize((TILE_PX, TILE_PX), method)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size_px)
        except OSError:
            continue
    return ImageFont.load_default(size_px)  # Latin only: other letters appear as boxes


def _shortened(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    line = " ".join(text[:300].split()) or "(no prompt)"
    while draw.textlength(line, font) > width_px:
        line = line[:-2].rstrip() + "…"
    return line

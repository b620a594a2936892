"""What `generate` leaves on disk, written prompt by prompt, so that a stopped job can be gone on with.

`request.json`: what was asked for. A PNG per kept picture. `scores.jsonl`: a line for each finished prompt, with all
its candidates. `grid.png`, of more prompts than fit one `grid-000.png` and so on: the pictures with prompt and scores.

Several processes may draw: each writes pictures itself, and the first alone the rest. `finished/` has the lines of
prompts that were drawn before those that stand before them in `scores.jsonl`; at the end it is gone.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from vqt2i.data.images import png_bytes
from vqt2i.errors import UserError
from vqt2i.files import PARTIAL_PREFIX, require_free, write_atomic, write_json
from vqt2i.generation.samples import Preview, Sample

REQUEST, SCORES, FINISHED = "request.json", "scores.jsonl", "finished"
TILE_PX, MARGIN_PX, LABEL_PX = 128, 8, 16
GRID_COLUMNS, GRID_PROMPTS, GRID_PICTURES = 16, 32, 128  # the most of each in one grid
GALLERY_COLUMNS, GALLERY_LINES = 7, 2  # of single pictures above their prompts
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


@dataclass(frozen=True)
class Request:
    """All that the pictures of a folder depend on.

    n: pictures kept of each prompt. settings: of sampling and ranking, and the seed. models: each part's fingerprint.
    """

    prompts: list[str]
    n: int
    settings: dict[str, Any]
    models: dict[str, str]


class OutputFolder:
    """A folder of pictures, filled prompt by prompt. Use it as a context; leaving it draws the grid of the last ones.

    The first process has one; others put what they draw into the folder by `write_group` and `set_aside`.

    Attributes:
        n_done: how many prompts stand in `scores.jsonl`, those of earlier calls included.
        missing: the prompts that were not drawn yet, neither these nor those that wait for their turn, when the folder
            was looked at.
        truncated: prompt and number of ids left out, of the prompts of this call that were too long.
        n_passes: of the GPT for each image of this call.
    """

    def __init__(self, path: Path, request: Request) -> None:
        """Look at what is there already; nothing is written yet, but what a killed process left is removed.

        Raises:
            UserError: the folder holds something else, what another request drew, or not all that it says.
        """
        self.path, self.request = path, request
        self._new = not (path / REQUEST).is_file()
        if self._new:
            require_free(path)
        else:
            _require_same(path, request)
        records = [] if self._new else read_records(path)
        self.n_done = len(records)
        for partial in [] if self._new else path.rglob(PARTIAL_PREFIX + "*"):
            partial.unlink()  # left by a process that was killed
        waiting = set()
        for record in self._finished():
            if int(record.stem) >= self.n_done and _is_whole(path, record):
                waiting.add(int(record.stem))
            else:
                record.unlink()  # stands in SCORES already, or is damaged
        self.missing = [p for p in range(self.n_done, len(request.prompts)) if p not in waiting]
        self.truncated: list[tuple[str, int]] = []
        self.n_passes: list[int] = []
        self._per_grid = max(1, min(GRID_PROMPTS, GRID_PICTURES // request.n))
        self._ungridded = records[self.n_done - self.n_done % self._per_grid :]

    def __enter__(self) -> "OutputFolder":
        if self._new:
            write_json(self.path / REQUEST, asdict(self.request))
        self.collect()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._ungridded:
            self._write_grid()

    @property
    def grids(self) -> list[Path]:
        """The paths of all grids, once they are drawn."""
        n_grids = -(-len(self.request.prompts) // self._per_grid)
        names = ["grid.png"] if n_grids == 1 else [f"grid-{_number(i, n_grids)}.png" for i in range(n_grids)]
        return [self.path / name for name in names]

    @property
    def n_drawn(self) -> int:
        """How many prompts are drawn, those that wait for their turn included."""
        return self.n_done + len(self._finished())

    def write(self, group: Sequence[Sample], facts: dict[str, Any] | None = None) -> None:
        """Write the first `n` of a prompt's candidates as pictures, then the scores of all of them."""
        record = write_group(self.path, self.request, group, facts)
        if group[0].prompt_index == self.n_done:
            self._append(record)
            self.collect()
        else:
            set_aside(self.path, self.request, group[0].prompt_index, record)

    def collect(self) -> None:
        """Take what others have put into the folder, as far as its turn has come."""
        while (path := _finished_path(self.path, self.request, self.n_done)).is_file():
            self._append(json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        if self.n_done == len(self.request.prompts) and (self.path / FINISHED).is_dir():
            (self.path / FINISHED).rmdir()

    def _append(self, record: dict[str, Any]) -> None:
        self.n_passes += [candidate["n_passes"] for candidate in record["candidates"]]
        self._ungridded.append(record)
        if len(self._ungridded) == self._per_grid:
            self._write_grid()
            self._ungridded = []
        if record["n_truncated_ids"]:
            self.truncated.append((record["prompt"][:40], record["n_truncated_ids"]))
        # last, because it says that all else is there
        with open(self.path / SCORES, "a", encoding="utf-8") as file:
            file.write(_line(record))
        self.n_done += 1

    def _finished(self) -> list[Path]:
        return list((self.path / FINISHED).glob("*.json"))

    def _write_grid(self) -> None:
        path = self.grids[self.n_done // self._per_grid]
        write_atomic(path, png_bytes(labelled_grid(self.path, self._ungridded)))


def write_group(
    folder: Path, request: Request, group: Sequence[Sample], facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the first `n` of a prompt's candidates as pictures; returns its record, with the scores of all of them.

    facts: more that the record is to hold.
    """
    folder.mkdir(parents=True, exist_ok=True)  # another process may come first
    number, candidates = _number(group[0].prompt_index, len(request.prompts)), []
    for rank, sample in enumerate(group):
        name = f"{number}-{rank:02d}.png" if rank < request.n else None
        candidates.append({
            "index": sample.image_index, "file": name, "scores": sample.scores, "n_passes": sample.n_passes,
        })  # fmt: skip
        if name:
            write_picture(folder / name, sample, request)
    record = {"prompt": group[0].prompt, "n_truncated_ids": group[0].n_truncated, "candidates": candidates}
    return record | (facts or {})


def set_aside(folder: Path, request: Request, prompt_index: int, record: dict[str, Any]) -> None:
    """Leave a record for the first process, which takes it when its turn has come."""
    write_atomic(_finished_path(folder, request, prompt_index), _line(record))


def _finished_path(folder: Path, request: Request, prompt_index: int) -> Path:
    return folder / FINISHED / f"{_number(prompt_index, len(request.prompts))}.json"


def _is_whole(folder: Path, record: Path) -> bool:
    """Whether all pictures that it names are there."""
    try:
        candidates = json.loads(record.read_text(encoding="utf-8"))["candidates"]
        return all((folder / c["file"]).is_file() for c in candidates if c["file"])
    except (ValueError, KeyError, TypeError):
        return False


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


class PreviewFile:
    """A picture of the images that are being drawn, written over and over as their tokens come; pass it `on_preview`.

    As a context it leaves no file behind.
    """

    def __init__(self, path: Path, seconds: float = 1.0) -> None:
        """seconds: from one picture to the next; more where making one takes over a quarter of that."""
        self.path, self.seconds = path, seconds
        self._next = 0.0

    def __enter__(self) -> "PreviewFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)

    def __call__(self, preview: Preview) -> None:
        """Write the picture if it is time for one."""
        start = time.monotonic()
        if start < self._next:
            return
        write_atomic(self.path, png_bytes(_tiled(preview.images())))
        end = time.monotonic()
        self._next = end + max(self.seconds, 4 * (end - start))


def _tiled(image_BHW3: np.ndarray) -> Image.Image:
    columns = min(len(image_BHW3), GRID_COLUMNS // 2)
    rows, tile_px = -(-len(image_BHW3) // columns), TILE_PX + MARGIN_PX
    tiled = Image.new("RGB", (columns * tile_px + MARGIN_PX, rows * tile_px + MARGIN_PX), "white")
    for i, image_HW3 in enumerate(image_BHW3):
        at = MARGIN_PX + i % columns * tile_px, MARGIN_PX + i // columns * tile_px
        tiled.paste(enlarged(Image.fromarray(image_HW3)), at)
    return tiled


def write_picture(path: Path, sample: Sample, request: Request) -> None:
    """A PNG whose text chunk `vqt2i` (JSON) says how to draw it again."""
    facts = {
        "prompt": sample.prompt, "prompt_index": sample.prompt_index, "image_index": sample.image_index,
        "seed": sample.seed, "settings": request.settings, "models": request.models, "scores": sample.scores,
    }  # fmt: skip
    info = PngInfo()
    info.add_itxt("vqt2i", json.dumps(facts, ensure_ascii=False))
    sample.image.save(path, pnginfo=info)


def read_prompt(path: Path) -> str:
    """The prompt of a picture that `write_picture` wrote; of other files the empty one."""
    try:
        with Image.open(path) as picture:
            return str(json.loads(picture.text["vqt2i"])["prompt"])
    except (OSError, AttributeError, ValueError, KeyError, TypeError):
        return ""


def labelled_grid(folder: Path, records: Sequence[dict[str, Any]]) -> Image.Image:
    """For each line of scores its prompt, below it its kept pictures (enlarged without smoothing), their scores.

    Of a prompt the first GRID_PICTURES are shown, GRID_COLUMNS in a row. Single pictures of several prompts stand side
    by side, each above its prompt.
    """
    kept = [[c for c in record["candidates"] if c["file"]][:GRID_PICTURES] for record in records]
    most = max(len(candidates) for candidates in kept)
    if most == 1 and len(records) > 1:
        return _gallery(
            folder, [(record["prompt"], files[0]["file"]) for record, files in zip(records, kept, strict=True)]
        )
    columns, line_px = min(most, GRID_COLUMNS), TILE_PX + LABEL_PX
    row_px = LABEL_PX + -(-most // columns) * line_px + MARGIN_PX
    # wide enough for a sentence above a single picture
    width = max(columns * (TILE_PX + MARGIN_PX), 3 * TILE_PX) + MARGIN_PX
    grid = Image.new("RGB", (width, len(records) * row_px + MARGIN_PX), "white")
    draw, font, small = ImageDraw.Draw(grid), _font(12), _font(8)
    for row, (record, candidates) in enumerate(zip(records, kept, strict=True)):
        top = MARGIN_PX + row * row_px
        draw.text((MARGIN_PX, top), _shortened(draw, record["prompt"], font, width - 2 * MARGIN_PX), "black", font)
        for i, candidate in enumerate(candidates):
            x, y = MARGIN_PX + i % columns * (TILE_PX + MARGIN_PX), top + LABEL_PX + i // columns * line_px
            with Image.open(folder / candidate["file"]) as picture:
                grid.paste(enlarged(picture), (x, y))
            score = "  ".join(f"{name} {value:.2f}" for name, value in candidate["scores"].items())
            draw.text((x, y + TILE_PX + 1), score, "#777", small)
    return grid


def _gallery(folder: Path, pictures: Sequence[tuple[str, str]]) -> Image.Image:
    """Pictures in rows, the prompt of each below it in up to GALLERY_LINES lines."""
    columns, tile_px = min(len(pictures), GALLERY_COLUMNS), TILE_PX + MARGIN_PX
    row_px = tile_px + GALLERY_LINES * LABEL_PX
    size = columns * tile_px + MARGIN_PX, -(-len(pictures) // columns) * row_px + MARGIN_PX
    gallery = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(gallery), _font(12)
    for i, (prompt, name) in enumerate(pictures):
        x, y = MARGIN_PX + i % columns * tile_px, MARGIN_PX + i // columns * row_px
        with Image.open(folder / name) as picture:
            gallery.paste(enlarged(picture), (x, y))
        for number, line in enumerate(_wrapped(draw, prompt, font, TILE_PX, GALLERY_LINES)):
            draw.text((x, y + TILE_PX + 2 + number * LABEL_PX), line, "black", font)
    return gallery


def enlarged(image: Image.Image) -> Image.Image:
    """The image as a tile whose longer side is TILE_PX."""
    longer = max(image.size)
    method = Image.Resampling.NEAREST if longer < TILE_PX else Image.Resampling.LANCZOS
    return image.resize([max(1, round(side * TILE_PX / longer)) for side in image.size], method)


def strip(tiles: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures side by side, their labels below."""
    tile_px = TILE_PX + MARGIN_PX
    image = Image.new("RGB", (len(tiles) * tile_px + MARGIN_PX, TILE_PX + LABEL_PX + 2 * MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(image), _font(10)
    for column, (label, picture) in enumerate(tiles):
        x = MARGIN_PX + column * tile_px
        image.paste(enlarged(picture), (x, MARGIN_PX))
        draw.text((x, MARGIN_PX + TILE_PX + 1), _shortened(draw, label, font, TILE_PX), "#777", font)
    return image


def _require_same(path: Path, request: Request) -> None:
    """Raise UserError with the differences if `path` was asked for otherwise."""
    try:
        there = Request(**json.loads((path / REQUEST).read_text(encoding="utf-8")))
        now = Request(**json.loads(json.dumps(asdict(request))))  # as a file has it: lists for tuples
        differences = list(_differences(there, now))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path / REQUEST}: damaged ({error}); give another --out") from error
    if differences:
        raise UserError(f"{path}: was begun with {'; '.join(differences)}. Give what it was begun with to go on, "
                        "or another --out")  # fmt: skip


def _differences(there: Request, now: Request) -> Iterator[str]:
    if there.prompts != now.prompts:
        counts = len(there.prompts), len(now.prompts)
        same = next((i for i in range(min(counts)) if there.prompts[i] != now.prompts[i]), min(counts))
        first = [repr(r.prompts[same][:60]) if same < len(r.prompts) else "none" for r in (there, now)]
        yield f"other prompts ({counts[0]:,}, now {counts[1]:,}; number {same + 1:,} is {first[0]}, now {first[1]})"
    before = {"n": there.n} | there.settings | {f"{part} model": name[:8] for part, name in there.models.items()}
    after = {"n": now.n} | now.settings | {f"{part} model": name[:8] for part, name in now.models.items()}
    for key in before | after:
        if before.get(key) != after.get(key):
            yield f"{key} {before.get(key)}, now {after.get(key)}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of scores in `path`; one that was cut off in the writing is removed, its prompt was not finished.

    Raises:
        UserError: a line is damaged, or a picture that it names is gone.
    """
    scores = path / SCORES
    content = scores.read_bytes() if scores.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_atomic(scores, whole)
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
            files = [candidate["file"] for candidate in records[-1]["candidates"] if candidate["file"]]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{scores}: line {number} is damaged ({error}); give another --out") from error
        for name in files:
            if not (path / name).is_file():
                raise UserError(f"{path / name}: gone, but {SCORES} names it; put it back or give another --out")
    return records


def _number(index: int, count: int) -> str:
    """The index with so many digits that names sort as numbers do."""
    return f"{index:0{max(3, len(str(count - 1)))}d}"


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size_px)
        except OSError:
            continue
    return ImageFont.load_default(size_px)  # Latin only: other letters appear as boxes


def _wrapped(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width_px: int, n_lines: int
) -> list[str]:
    """Lines of whole words where they fit, the last one shortened; a text without spaces breaks anywhere."""
    rest, lines = " ".join(text[:300].split()) or "(no prompt)", []
    while rest and len(lines) < n_lines - 1:
        end = next((n for n in range(len(rest), 1, -1) if draw.textlength(rest[:n], font) <= width_px), 1)
        if end < len(rest) and rest[end] != " " and " " in rest[:end]:
            end = rest.rindex(" ", 0, end)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, _shortened(draw, rest, font, width_px)] if rest else lines


def _shortened(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    line = " ".join(text[:300].split()) or "(no prompt)"
    while draw.textlength(line, font) > width_px:
        line = line[:-2].rstrip() + "…"
    return line

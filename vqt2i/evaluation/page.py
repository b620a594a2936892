"""A result for people: one HTML page that needs no file beside it."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqt2i.data.report import Section, data_uri, page_html, section_html
from vqt2i.evaluation.plot import Line, Point, best_front, front_chart, line_chart
from vqt2i.evaluation.result import Result, Row, Where
from vqt2i.generation.output import read_records

PAGE, SAMPLES, RECONSTRUCTIONS, NEAREST = "report.html", "samples", "reconstructions.png", "nearest"
ALL = "all prompts"
SHOWN_PROMPTS = 32
# of names that are not plain words; what is a share is told in per cent
LABELS = {
    "fid": "FID (Inception)", "kid": "KID (Inception)", "inception_score": "inception score",
    "clip_frechet_distance": "Fréchet distance (CLIP image tower, no FID)",
    "clip_kernel_distance": "kernel distance (CLIP image tower, no KID)",
    "clip_precision": "precision (CLIP image tower)", "clip_recall": "recall (CLIP image tower)",
    "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (VGG16)",
    "code_usage": "codes used", "code_perplexity": "perplexity of codes", "clip_score": "CLIP score (cosine)",
    "caption_score": "caption score, nats per token", "r_precision": "R-precision", "right": "all right",
    "colour_shape": "colours and shapes", "sentence": "a sentence of the shapes",
    "sharpness": "sharpness, share of the real", "same_ids": "ids of the real", "in_style": "in the style",
    "wanted": "as asked for", "nearest_rmse": "distance to the nearest training picture, of 255",
    "own_picture": "nearest to the prompt's own picture",
}  # fmt: skip
SHARES = {
    "precision", "recall", "clip_precision", "clip_recall", "code_usage", "r_precision", "right", "count", "colour",
    "shape", "size", "fill", "relation", "background", "colour_shape", "sentence", "same_ids",
    "in_style", "wanted", "own_picture",
}  # fmt: skip
CHOSEN = {
    "random": "unreranked", "clip": "by CLIP", "caption": "by caption score", "both": "by both", "any": "any of them",
}  # fmt: skip


def label_of(name: str) -> str:
    """What a value is called, with its unit."""
    return LABELS.get(name, name.replace("_", " ")) + (", %" if name in SHARES else "")


def shown(row: Row, *, interval: bool = True) -> str:
    """The value as it is told, in the unit of its label, with its interval."""
    value = _shown(row.name, row.value)
    if not interval or row.low is None:
        return value
    return f"{value} ({_shown(row.name, row.low)} to {_shown(row.name, row.high)})"


def _shown(name: str, value: float) -> str:
    if name in SHARES:
        return f"{100 * value:.1f}"
    if abs(value) < 0.01:
        return f"{value:.4f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def write_page(result: Result, folder: Path) -> str:
    """The page's text. folder: where the pictures are that it shows."""
    facts = " · ".join(f"{part} {fingerprint[:8]}" for part, fingerprint in result.fingerprints.items())
    body: list[str] = []
    for name, measured in result.measures.items():
        body.append(f"<h2>{name.capitalize()}</h2><div class=tables>")
        body += [*map(section_html, sections_of(name, measured.rows)), "</div>"]
        if name == "alignment":
            body += [*_curves(measured.rows), *_pictures(folder / SAMPLES)]
        if name == "memorisation":
            body += _beside_nearest(folder)
        if name == "sweep":
            body += _fronts(measured.rows)
        if name == "reconstruction" and (folder / RECONSTRUCTIONS).is_file():
            body += [f"<div class=strip>{_image(folder / RECONSTRUCTIONS)}</div>"]
            body += ["<p>images of the data set, below them what the image tokenizer makes of them</p>"]
    body += ["<h2>How it was measured</h2>", *_protocols(result)]
    return page_html(f"Measured: {result.model}", facts, body, _MORE_CSS)


def sections_of(measure: str, rows: Sequence[Row], *, intervals: bool = True) -> list[Section]:
    """The tables of a measure."""
    if measure == "alignment":
        return list(_alignment(rows, intervals))
    if measure == "sweep":
        title = f"One picture of each prompt at each setting ({', '.join(rows[0].where)}); intervals: result.json"
        return [_table(title, rows, lambda row: label_of(row.name), lambda row: _cell(row.where), intervals=False)]
    if measure == "style":
        title = "Prompts with the style's words and without, of objects that the pictures of the style do not show"
        return [_table(title, rows, _style_line, lambda row: f"{label_of(row.name)}, {_chosen(row.where)}", intervals)]
    heads = {
        "memorisation": (
            "The best picture of each prompt and what it was trained on",
            lambda row: row.where["pictures"],
        ),
        "fidelity": ("Drawn pictures beside the data set's", lambda row: _chosen(row.where)),
        "reconstruction": ("What the image tokenizer keeps", lambda row: "value"),
        "captions": ("Captions of rendered scenes", lambda row: str(row.where["scenes"])),
        "upscaling": ("Halved pictures in twice their size, beside the real ones", lambda row: str(row.where["way"])),
    }
    title, head_of = heads[measure]
    return [_table(title, rows, lambda row: label_of(row.name), head_of, intervals)]


def _style_line(row: Row) -> str:
    return f"{row.where['prompts']}, {row.where['words']}"


def _table(
    title: str,
    rows: Sequence[Row],
    line_of: Callable[[Row], str],
    column_of: Callable[[Row], str],
    intervals: bool,
) -> Section:
    """Rows put into lines and columns by what these functions call them."""
    columns = list(dict.fromkeys(map(column_of, rows)))
    lines = {line: [""] * len(columns) for line in map(line_of, rows)}
    counts: dict[str, dict[int, None]] = {}
    for row in rows:
        lines[line_of(row)][columns.index(column_of(row))] = shown(row, interval=intervals)
        counts.setdefault(line_of(row), {})[row.n] = None
    bracket = "in brackets: 95 %" if intervals else ""
    return Section(
        title, ("", "n", *columns), [(k, _counted(counts[k]), *cells) for k, cells in lines.items()], remark=bracket
    )


def _counted(numbers: Iterable[int]) -> int | str:
    """Of how many a line's values are; where its columns differ, of how many each, in their order."""
    first, *others = numbers
    return ", ".join(f"{n:,}" for n in (first, *others)) if others else first


# --- alignment ---


def _alignment(rows: Sequence[Row], intervals: bool) -> Iterator[Section]:
    told = told_rows(rows)
    most = max(row.where["of"] for row in told)
    beside = f", the best of {most} by each ranking" if most > 1 else ""
    of_all = [row for row in told if row.where["group"] == ALL]
    yield _table(f"All prompts: unreranked{beside}", of_all, lambda row: label_of(row.name), _choice, intervals)
    grouped = [row for row in told if row.where["group"] != ALL]
    if grouped:
        title = f"By kind of prompt: {label_of(grouped[0].name)}"
        yield _table(title, grouped, lambda row: str(row.where["group"]), _choice, intervals)
    if most > 1:
        yield _costs(rows, most)


def told_rows(rows: Sequence[Row]) -> list[Row]:
    """What is told in tables: unreranked values, those of the most candidates, and what was never ranked."""
    most = max((row.where["of"] for row in rows if "of" in row.where), default=1)
    return [
        row for row in rows
        if row.name != "seconds" and (row.where.get("chosen by", "random") == "random" or row.where["of"] == most)
    ]  # fmt: skip


def _choice(row: Row) -> str:
    return CHOSEN[row.where["chosen by"]]


def _chosen(where: Where) -> str:
    return CHOSEN[where["chosen by"]] + (f", best of {where['of']}" if where["of"] > 1 else "")


def _costs(rows: Sequence[Row], most: int) -> Section:
    steps = {row.where["step"]: row.value for row in rows if row.name == "seconds"}
    by = {"random": (), "clip": ("clip",), "caption": ("caption",), "both": ("clip", "caption")}
    lines = []
    for choice, scores in by.items():
        if set(scores) <= steps.keys():
            each = steps["drawing"] + sum(steps[score] for score in scores)
            lines.append((CHOSEN[choice], f"{1e3 * each:.1f}", f"{each * (1 if choice == 'random' else most):.2f}"))
    columns = ("", "ms a candidate", f"s a prompt (unreranked: 1, else {most})")
    return Section("What reranking costs", columns, lines, remark="on the machine that measured")


def _curves(rows: Sequence[Row]) -> Iterator[str]:
    of_all = [row for row in rows if row.where.get("group") == ALL]
    numbers = sorted({row.where["of"] for row in of_all})
    if len(numbers) == 1:
        return
    yield "<h3>What reranking is worth</h3><div class=plots>"
    for name in dict.fromkeys(row.name for row in of_all):
        lines, scale = [], _scale(name)
        of_name = [row for row in of_all if row.name == name]
        for choice in dict.fromkeys(row.where["chosen by"] for row in of_name):
            found = [row for row in of_name if row.where["chosen by"] == choice]
            found = found * len(numbers) if choice == "random" else found  # the same however many are drawn
            y, low, high = ([scale * getattr(row, end) for row in found] for end in ("value", "low", "high"))
            lines.append(Line(CHOSEN[choice].removeprefix("by "), numbers, y, low, high))
        yield line_chart(label_of(name), lines, "candidates drawn")
    yield "</div><p>The best of so many candidates by each ranking; bands are 95 % intervals. A ranking makes the very "
    yield "score that it ranks by better, whatever it is worth.</p>"


def _pictures(folder: Path) -> Iterator[str]:
    """Of some prompts the first candidate and the one ranked best."""
    records = read_records(folder)
    every = _every(records)
    reranked = len(records[0]["candidates"]) > 1
    which = "the first candidate, and beside it the one ranked best" if reranked else "the pictures"
    yield f"<h3>Pictures</h3><p>{which}; every {_ordinal(every)} prompt</p><div class=sheet>"
    for record in (records[index] for index in shown_of(records)):
        files = [first_drawn(record), record["candidates"][0]["file"]] if reranked else [first_drawn(record)]
        images = "".join(_image(folder / name) for name in files)
        yield f"<figure>{images}<figcaption><p>{escape(record['prompt'])}</p></figcaption></figure>"
    yield "</div>"


def _beside_nearest(folder: Path) -> Iterator[str]:
    records = read_records(folder / SAMPLES)
    yield "<p>the picture of a prompt, the best where several were drawn, and beside it the nearest training picture; "
    yield f"every {_ordinal(_every(records))} prompt</p><div class=sheet>"
    for index in shown_of(records):
        best = folder / SAMPLES / records[index]["candidates"][0]["file"]
        images = _image(best) + _image(folder / NEAREST / f"{index:06d}.png")
        yield f"<figure>{images}<figcaption><p>{escape(records[index]['prompt'])}</p></figcaption></figure>"
    yield "</div>"


def shown_of(records: Sequence[dict[str, Any]]) -> range:
    """Which prompts have their pictures on the page."""
    return range(0, len(records), _every(records))


def _every(records: Sequence[dict[str, Any]]) -> int:
    return -(-len(records) // SHOWN_PROMPTS)


def first_drawn(record: dict[str, Any]) -> str:
    """The file of a prompt's first candidate, whatever its rank."""
    return next(c["file"] for c in record["candidates"] if c["index"] == 0)


def _ordinal(n: int) -> str:
    return {1: "single", 2: "second", 3: "third"}.get(n, f"{n}th")


# --- the others ---


def _fronts(rows: Sequence[Row]) -> Iterator[str]:
    found = {(row.name, _cell(row.where)): row.value for row in rows}
    cells = list(dict.fromkeys(_cell(row.where) for row in rows))
    names = {row.name for row in rows}
    distance = next((name for name in ("fid", "clip_frechet_distance") if name in names), None)
    if distance is None:
        yield "<p>No front: without a data set there is no distance to its pictures.</p>"
        return
    yield "<div class=plots>"
    for name in ("right", "r_precision", "clip_score", "caption_score"):
        if name in names:
            points = [Point(cell, found[distance, cell], _scale(name) * found[name, cell]) for cell in cells]
            yield front_chart(label_of(name), points, best_front(points), label_of(distance))
    yield f"</div><p>At each point: {escape(', '.join(rows[0].where))}. Better is up and to the left; red: nothing is "
    yield "better in both.</p>"


def _cell(where: Where) -> str:
    return ", ".join(f"{value:g}" for value in where.values())


def _scale(name: str) -> int:
    return 100 if name in SHARES else 1


def _protocols(result: Result) -> Iterator[str]:
    for name, measured in result.measures.items():
        origin = measured.origin
        text = json.dumps(measured.protocol, indent=1, ensure_ascii=False)
        versions = ", ".join(f"{library} {version}" for library, version in origin.versions.items())
        yield f"<details><summary>{name}, {measured.seconds:.0f} s</summary><pre>{escape(text)}</pre>"
        yield f"<p>{escape(origin.command)} · {escape(origin.time)} · {escape(versions)}</p></details>"


def _image(path: Path) -> str:
    with Image.open(path) as image:
        return f'<img alt="" src="{data_uri(np.array(image))}">'


_MORE_CSS = """
h2 { border-top: 1px solid #ccc; padding-top: .8rem } h3 { font-size: .95rem; margin: 1rem 0 .3rem }
.tables section { padding-bottom: .8rem } .tables section h2 { border: 0; padding: 0; font-size: .95rem }
.tables { overflow-x: auto } .tables table { width: auto } .tables td, .tables th { padding-right: 1.1rem }
.tables td:first-child { white-space: nowrap }
.plots { display: flex; flex-wrap: wrap; gap: .6rem } .plots svg { max-width: 100%; height: auto }
.sheet { grid-template-columns: repeat(auto-fill, minmax(206px, 1fr)) }
.sheet img { width: 96px; height: 96px; margin-right: 6px }
.strip { overflow-x: auto } .strip img { width: auto; height: 128px }
details { margin: .3rem 0 } summary { cursor: pointer } pre { font-size: .78rem; overflow-x: auto }
"""

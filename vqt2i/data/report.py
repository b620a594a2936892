"""What came of making a data set, for people: `report.txt`, `report.html` and `rejected.csv`."""

import csv
import random
from base64 import b64encode
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vqt2i.data.images import png_bytes
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSpec
from vqt2i.data.sources import Rejection
from vqt2i.files import write_atomic

SHEET_SIZE = 60  # pictures shown of each split
THUMB_PX = 128
NO_SPACES = ("ja", "km", "lo", "my", "th", "zh")  # languages whose words are not told apart by spaces
LENGTH_EDGES = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 500, 1000)


@dataclass(frozen=True)
class TokenCount:
    """A text tokenizer as the report needs it: how many ids a caption has, and how many a model will see."""

    name: str
    count: Callable[[str], int]
    text_length: int


class Section(NamedTuple):
    """A table of the report. `bars`: draw the last column, a number, as a bar as well."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | float, ...]]
    bars: bool = False
    remark: str = ""


class Report:
    """Counts what passes. Rejections go straight to `rejected.csv` in `folder`; the rest waits for `write`.

    Use as a context manager, so that the file is closed.
    """

    def __init__(self, folder: Path, token_count: TokenCount | None = None) -> None:
        self.folder = folder
        self.token_count = token_count
        self.rejections: Counter[str] = Counter()
        self.first_rejection: Rejection | None = None
        self.notes: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self._sizes: Counter[tuple[int, int]] = Counter()  # (width, height)
        self._images_with: Counter[str] = Counter()  # language -> images
        self._chars: defaultdict[str, Counter[int]] = defaultdict(Counter)  # language -> length -> captions
        self._words: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._truncated: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self._sheets: dict[str, list[Pair]] = {}
        self._n_samples: Counter[str] = Counter()
        self._random = random.Random(0)
        # backslashreplace: file names are bytes and need not be UTF-8
        self._file = open(folder / "rejected.csv", "w", encoding="utf-8", errors="backslashreplace", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(("key", "source", "reason", "detail"))

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def reject(self, rejection: Rejection) -> None:
        self.rejections[rejection.reason] += 1
        self.first_rejection = self.first_rejection or rejection
        self._csv.writerow((rejection.key, rejection.name, rejection.reason, rejection.detail))

    def add(self, split: str, pair: Pair, size_px: tuple[int, int]) -> None:
        """Count a sample that was written; `size_px` is (width, height) before cropping and resizing."""
        self._sizes[size_px] += 1
        if pair.label is not None:
            self._labels[pair.label] += 1
        for language, captions in pair.captions.items():
            self._images_with[language] += 1
            for caption in captions:
                self._chars[language][len(caption)] += 1
                self._words[language][len(caption.split())] += 1
                if self.token_count and self.token_count.count(caption) > self.token_count.text_length:
                    self._truncated[language] += 1
        self._show(split, pair)

    def _show(self, split: str, pair: Pair) -> None:
        """Keep a uniform draw of SHEET_SIZE samples of each split (reservoir sampling)."""
        sheet = self._sheets.setdefault(split, [])
        place = len(sheet) if len(sheet) < SHEET_SIZE else self._random.randrange(self._n_samples[split] + 1)
        if place < SHEET_SIZE:
            sheet[place : place + 1] = [replace(pair, image_HW3=_thumbnail(pair.image_HW3), meta={})]
        self._n_samples[split] += 1

    def write(self, name: str, spec: DataSpec) -> None:
        """Write `report.txt` and `report.html`; `name` is what the data set is called."""
        sections = list(self._sections(spec))
        heading = f"Data set {name}"
        facts = f"fingerprint {spec.fingerprint[:16]} · source: {spec.source.get('kind', 'unknown')}"
        text = [heading, facts]
        text += [section_text(section) for section in sections]
        write_atomic(self.folder / "report.txt", _utf8("\n".join(text) + "\n"))
        body = ["<main>", *map(section_html, sections), "</main>"]
        body += [_sheet_html(split, self._n_samples[split], sheet) for split, sheet in self._sheets.items()]
        write_atomic(self.folder / "report.html", _utf8(page_html(heading, facts, body)))

    def _sections(self, spec: DataSpec) -> Iterator[Section]:
        counts = [(name, split.n_samples, len(split.shards)) for name, split in spec.splits.items()]
        n = sum(self._n_samples.values())
        yield Section("Splits", ("split", "samples", "shards"), [*counts, ("together", n, sum(c[2] for c in counts))])
        yield Section(
            "Rejected", ("reason", "count"), self.rejections.most_common(), bars=True,
            remark="each one is named in rejected.csv" if self.rejections else "nothing",
        )  # fmt: skip
        yield Section(
            "Duplicates", ("kind", "pictures"),
            [("same pixels as an earlier one", self.duplicates["exact"]), ("nearly the same", self.duplicates["near"])],
            remark="of all pictures that passed the other checks; those dropped are under Rejected",
        )  # fmt: skip
        if self.notes:
            yield Section("Made to fit", ("what", "count"), self.notes.most_common(), bars=True)
        yield self._size_section(spec)
        if self._labels:
            remark = f"{len(self._labels):,} classes"
            yield Section("Classes", ("class", "pictures"), self._labels.most_common(), bars=True, remark=remark)
        if not self._chars:
            yield Section("Captions", (), [], remark="none: pictures only")
            return
        yield self._language_section(n)
        yield _histogram("Caption length in characters", "characters", sum(self._chars.values(), Counter()))
        spaced = {language: words for language, words in self._words.items() if language[:2] not in NO_SPACES}
        if spaced:
            title = f"Caption length in words ({', '.join(spaced)})"
            yield _histogram(title, "words", sum(spaced.values(), Counter()))

    def _size_section(self, spec: DataSpec) -> Section:
        rows = [(f"{width} x {height}", count) for (width, height), count in self._sizes.most_common(8)]
        others = len(self._sizes) - len(rows)
        if others:
            rows.append((f"{others:,} other sizes", sum(self._sizes.values()) - sum(count for _, count in rows)))
        sides = sorted(min(size) for size in self._sizes)
        stored = f"{spec.image_size_px} x {spec.image_size_px}" if spec.image_size_px else "they are"
        remark = f"width x height in the source; smaller side {sides[0]} to {sides[-1]} px; stored as {stored}"
        return Section("Sizes", ("pixels", "pictures"), rows, bars=True, remark=remark)

    def _language_section(self, n_samples: int) -> Section:
        columns = ("language", "pictures", "captions", "characters: median", "95 %", "longest")
        if self.token_count:
            columns += ("truncated",)
        rows = []
        for language, lengths in self._chars.items():
            n_captions = lengths.total()
            quantiles = (_quantile(lengths, q) for q in (0.5, 0.95, 1.0))
            row = (language, self._images_with[language], n_captions, *quantiles)
            if self.token_count:
                row += (f"{self._truncated[language] / n_captions:.1%}",)
            rows.append(row)
        remark = f"of {n_samples:,} pictures"
        if self.token_count:
            remark += f"; truncated: more than {self.token_count.text_length} ids with {self.token_count.name}"
        else:
            remark += "; the share truncated is told with --tokenizer PATH"
        return Section("Languages", columns, rows, remark=remark)


def _quantile(counts: Counter[int], q: float) -> int:
    """The smallest value that a share `q` of the counted values does not exceed."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(below, q * below[-1]))]


def _histogram(title: str, unit: str, lengths: Counter[int]) -> Section:
    bins = Counter()
    for length, count in lengths.items():
        bins[bisect_right(LENGTH_EDGES, length) - 1] += count
    rows = []
    for i in range(min(bins), max(bins) + 1):
        first = LENGTH_EDGES[i]
        last = LENGTH_EDGES[i + 1] - 1 if i + 1 < len(LENGTH_EDGES) else None
        label = f"{first} and more" if last is None else str(first) if first == last else f"{first} to {last}"
        rows.append((label, bins[i]))
    return Section(title, (unit, "captions"), rows, bars=True)


def section_text(section: Section) -> str:
    """The table in letters of one width."""
    cells = [section.columns, *([_cell(value) for value in row] for row in section.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    most = max((row[-1] for row in section.rows), default=0) if section.bars else 0
    lines = ["", section.title + (f" ({section.remark})" if section.remark else "")]
    for i, row in enumerate(cells if section.rows else ()):
        line = "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        if i and section.bars:
            line += "  " + "#" * round(40 * section.rows[i - 1][-1] / most)
        lines.append(f"  {line}".rstrip())
    return "\n".join(lines)


def page_html(title: str, facts: str, body: Iterable[str], css: str = "") -> str:
    """A page that needs no file beside it. facts: a line below the title. css: beside that of all pages."""
    head = f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
    return "\n".join([
        head, f"<style>{CSS}{css}</style>", f"<h1>{escape(title)}</h1><p>{escape(facts)}</p>", *body, "</html>\n",
    ])  # fmt: skip


def section_html(section: Section) -> str:
    """The table, with its title above and its remark below."""
    most = max((row[-1] for row in section.rows), default=0) if section.bars else 0
    html = [f"<section><h2>{escape(section.title)}</h2>"]
    if section.rows:
        html.append("<table><tr>" + "".join(f"<th>{escape(column)}" for column in section.columns))
        for row in section.rows:
            cells = "".join(f"<td>{escape(_cell(value))}" for value in row)
            length = f'<i style="width:{100 * row[-1] / most:.1f}%"></i>' if section.bars and row[-1] else ""
            bar = f"<td class=bar>{length}" if section.bars else ""
            html.append(f"<tr>{cells}{bar}")
        html.append("</table>")
    return "\n".join([*html, f"<p>{escape(section.remark)}</p></section>"])


def _sheet_html(split: str, n: int, sheet: list[Pair]) -> str:
    title = f"{split}: {len(sheet)} of {n:,} samples" if len(sheet) < n else f"{split}: all {n:,} samples"
    html = [f"<h2>{escape(title)}</h2><div class=sheet>"]
    for pair in sheet:
        text = "" if pair.label is None else f"<p><b>{escape(pair.label)}</b></p>"
        text += "".join(_captions_html(language, captions) for language, captions in pair.captions.items())
        key = escape(pair.key)
        html.append(f'<figure><img alt="{key}" title="{key}" src="{data_uri(pair.image_HW3)}">')
        html.append(f"<figcaption>{text}</figcaption></figure>")
    return "\n".join([*html, "</div>"])


def _captions_html(language: str, captions: tuple[str, ...]) -> str:
    """The first caption; the others are told by a number, and shown where the pointer rests."""
    more = f" <small>+{len(captions) - 1}</small>" if len(captions) > 1 else ""
    return f'<p lang={escape(language)} title="{escape(" | ".join(captions))}">{escape(captions[0])}{more}</p>'


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _thumbnail(image_HW3: np.ndarray) -> np.ndarray:
    image = Image.fromarray(image_HW3)
    image.thumbnail((THUMB_PX, THUMB_PX))
    return np.asarray(image)


def data_uri(image_HW3: np.ndarray) -> str:
    """A picture, uint8 (H, W, 3), as the address of an <img> that needs no file beside the page."""
    return "data:image/png;base64," + b64encode(png_bytes(Image.fromarray(image_HW3))).decode()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


CSS = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
p { margin: .3rem 0; color: #666; font-size: .87rem }
main { margin-top: 1.2rem; columns: 30rem 2; column-gap: 3rem } section { break-inside: avoid; padding-bottom: 1.1rem }
section h2 { margin-top: 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 600; font-size: .8rem; color: #666; vertical-align: bottom }
td { text-align: right; border-top: 1px solid #e6e6e6; white-space: nowrap }
th, td { padding: .12rem .5rem .12rem 0 } th:first-child, td:first-child { text-align: left; white-space: normal }
.bar { width: 35% } .bar i { display: block; height: .7rem; background: #4c78a8; min-width: 1px }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .9rem }
figure { margin: 0; min-width: 0 }
figcaption p { color: #222; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere }
figcaption p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; overflow: hidden }
small { color: #888 }
img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; border: 1px solid #ddd }
"""

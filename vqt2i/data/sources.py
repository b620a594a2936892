"""What a source yields, and the sources that are files beside each other: a folder and a table.

A source checks nothing but what it needs to find its samples; `vqt2i.data.build` decodes, filters and counts.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vqt2i.data.decode import RefusedError, decode_image
from vqt2i.data.shards import is_language
from vqt2i.errors import DataError

IMAGE_SUFFIXES = frozenset(".avif .bmp .gif .j2k .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_FILE_BYTES = 1 << 28  # no picture of sensible size is larger, and the whole file goes into memory


@dataclass(frozen=True)
class Item:
    """A sample as its source gives it, unchecked.

    name: where people find it: a path, a table's row, a tar's member.
    key: what to call it, any text; made valid and unique later.
    image: file bytes, or pixels where the source drew them itself.
    captions: language to its texts; each text may hold several captions, one per line.
    split: where it must go; None lets the picture's hash decide.
    label: the name of its class, where the source has classes.
    """

    name: str
    key: str
    image: bytes | np.ndarray
    captions: dict[str, list[bytes | str]]
    meta: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    notes: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Rejection:
    """Something in a source that gave no sample, and why. `key` is empty where it never came to have one."""

    name: str
    reason: str
    detail: str = ""
    key: str = ""


Entries = Iterator[Item | Rejection]


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        RefusedError: it cannot be read or is larger than any picture.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RefusedError("file too large", f"{size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise RefusedError("missing file", str(path)) from None
    except (OSError, ValueError) as error:
        raise RefusedError("unreadable file", str(error)) from None


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of an image file, upright, as data sets have it.

    Raises:
        DataError: no such file, or not a picture.
    """
    try:
        return decode_image(read_file(path)).image_HW3
    except RefusedError as refused:
        told = f"{refused.reason}{f' ({refused.detail})' if refused.detail else ''}"
        raise DataError(f"{path}: {told}; expected a picture such as a PNG or JPEG file") from None


# --- a folder of images with text files beside them ---


def folder_items(folder: Path, *, language: str, labelled: bool = False) -> Entries:
    """Images below `folder`, by name, with the captions of `STEM.txt` (in `language`) and `STEM.LANG.txt` beside them.

    labelled: the class of an image is the folder below `folder` that it lies in, however deep.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with images and, beside each, a .txt file of captions")

    unlistable: list[OSError] = []
    for place, subfolders, names in os.walk(folder, onerror=unlistable.append):
        subfolders.sort()
        here = Path(place)
        for link in (here / name for name in subfolders if (here / name).is_symlink()):
            yield Rejection(link.relative_to(folder).as_posix(), "link to a folder", "not followed")
        classes = here.relative_to(folder).parts if labelled else ()
        for entry in _items_of_one_folder(here, sorted(names), folder, language):
            yield replace(entry, label=classes[0]) if classes and isinstance(entry, Item) else entry
    for error in unlistable:
        yield Rejection(str(error.filename), "unreadable folder", str(error))


def _items_of_one_folder(here: Path, names: list[str], top: Path, language: str) -> Entries:
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    texts = _texts_by_stem(names, {Path(name).stem for name in images}, language)
    for name in images:
        path = here / name
        relative = path.relative_to(top).as_posix()
        captions: dict[str, list[bytes | str]] = {}
        try:
            for spoken, text_name in texts.get(path.stem, []):
                captions.setdefault(spoken, []).append(read_file(here / text_name))
            image = read_file(path)
        except RefusedError as refused:
            yield Rejection(relative, refused.reason, refused.detail)
            continue
        yield Item(relative, str(Path(relative).with_suffix("")), image, captions, {"file": relative})
    used = set(images) | {name for files in texts.values() for _, name in files}
    for name in names:
        if name not in used:
            reason = "text without image" if name.lower().endswith(".txt") else "neither image nor caption"
            yield Rejection((here / name).relative_to(top).as_posix(), reason)


def _texts_by_stem(names: list[str], stems: set[str], language: str) -> dict[str, list[tuple[str, str]]]:
    """Image stem to the (language, file name) of its texts."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() != ".txt":
            continue
        before, _, code = stem.rpartition(".")
        if stem in stems:
            found.setdefault(stem, []).append((language, name))
        elif before in stems and is_language(code):
            found.setdefault(before, []).append((code, name))
    return found


# --- a table with a row for each image ---


def table_items(
    table: Path, *, image_column: str, caption_columns: dict[str, str], label_column: str | None = None
) -> Entries:
    """The rows of a CSV, TSV, JSON Lines or Parquet file.

    image_column: a path relative to the table, the file's bytes, or Parquet's {"bytes", "path"}.
    caption_columns: language to column; a cell is one caption, or a list of them.
    label_column: of the class's name or number.

    Raises:
        DataError: no such table, not of a known kind, or without one of the columns; the message lists what it has.
    """
    readers = dict(zip(TABLE_SUFFIXES, (_csv_rows, _tsv_rows, _jsonl_rows, _parquet_rows), strict=True))
    reader = readers.get(table.suffix.lower())
    if reader is None or not table.is_file():
        what = "no such file" if reader else f"unknown kind of table '{table.suffix}'"
        raise DataError(f"{table}: {what}; expected a file ending in {', '.join(TABLE_SUFFIXES)}")
    wanted = [image_column, *caption_columns.values(), *([label_column] if label_column else [])]
    for number, row in reader(table, wanted):
        name = f"{table.name} row {number}"
        if isinstance(row, Rejection):
            yield row
            continue
        absent = [column for column in wanted if column not in row]
        if absent:
            yield Rejection(name, "missing column", ", ".join(absent))
            continue
        try:
            image, path = _image_of_cell(row[image_column], table.parent)
            captions = {language: _texts_of_cell(row[column]) for language, column in caption_columns.items()}
        except RefusedError as refused:
            yield Rejection(name, refused.reason, refused.detail)
            continue
        key = str(Path(path).with_suffix("")) if path else f"row-{number:06d}"
        label = row[label_column] if label_column else None
        meta = {"row": number} | ({"file": path} if path else {})
        yield Item(name, key, image, captions, meta, label=None if label is None else str(label))


def _image_of_cell(cell: Any, folder: Path) -> tuple[bytes, str]:
    """The image file's bytes, and its path as the table gives it ("" for none)."""
    if isinstance(cell, dict):  # how Hugging Face stores images in Parquet
        cell, path = cell.get("bytes") or cell.get("path"), cell.get("path") or ""
    else:
        path = cell if isinstance(cell, str) else ""
    if isinstance(cell, bytes):
        return cell, path
    if not isinstance(cell, str) or not cell.strip():
        raise RefusedError("missing image", f"expected a path or bytes, found {cell!r:.60}")
    return read_file(folder / cell), path


def _texts_of_cell(cell: Any) -> list[bytes | str]:
    """The captions of a cell; a line break inside one is white space, not a border between two."""
    cells = cell if isinstance(cell, list) else [cell]
    return [re.sub(r"[\r\n]+", " ", str(text)) for text in cells if text is not None]


Rows = Iterator[tuple[int, dict[str, Any] | Rejection]]


def _check_columns(table: Path, wanted: Iterable[str], found: list[str]) -> None:
    for column in wanted:
        if column not in found:
            raise DataError(
                f"{table}: no column '{column}'; it has: {', '.join(map(str, found)) or 'none'}. "
                "Choose with --image-column NAME, --caption-column NAME or LANG=NAME, and --label-column NAME"
            )


def _csv_rows(table: Path, wanted: list[str]) -> Rows:
    # strict: without it one stray quotation mark swallows all rows up to the next one
    return _delimited_rows(table, wanted, strict=True)


def _tsv_rows(table: Path, wanted: list[str]) -> Rows:
    return _delimited_rows(table, wanted, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited_rows(table: Path, wanted: list[str], **dialect: Any) -> Rows:
    # surrogateescape: one caption that is not UTF-8 costs its own row and not the table
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, **dialect)
        header = next(rows, [])
        _check_columns(table, wanted, header)
        number = 0
        while True:
            number += 1
            name = f"{table.name} row {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, Rejection(name, "unreadable row", f"line {rows.line_num}: {error}")
                continue
            if len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif row:  # a blank line is no row
                yield number, Rejection(name, "unreadable row", f"{len(row)} cells under {len(header)} columns")


def _jsonl_rows(table: Path, wanted: list[str]) -> Rows:
    checked = False
    with open(table, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = error
            if not isinstance(row, dict):
                detail = str(row) if isinstance(row, Exception) else f"expected an object, found {line.strip():.60}"
                yield number, Rejection(f"{table.name} row {number}", "unreadable row", detail)
                continue
            if not checked:
                _check_columns(table, wanted, list(row))
                checked = True
            yield number, row


def _parquet_rows(table: Path, wanted: list[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table}: not a Parquet file ({error})") from None
    with file:
        _check_columns(table, wanted, file.schema_arrow.names)
        number = 0
        try:
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            name = f"{table.name} from row {number + 1}"
            yield number + 1, Rejection(name, "unreadable rows", f"the rest of the table is damaged: {error}")

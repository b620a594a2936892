"""Folders and tables: every file and every row is a sample or a named rejection."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vqt2i.data.sources import Item, Rejection, folder_items, table_items
from vqt2i.errors import DataError


def save_image(path: Path, value: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
    return path.read_bytes()


def items_of(entries: list[Item | Rejection]) -> dict[str, Item]:
    return {entry.name: entry for entry in entries if isinstance(entry, Item)}


def rejected(entries: list[Item | Rejection]) -> list[tuple[str, str]]:
    return [(entry.name, entry.reason) for entry in entries if isinstance(entry, Rejection)]


# --- folder ---


def test_a_folder_gives_images_with_the_texts_beside_them(tmp_path: Path) -> None:
    content = save_image(tmp_path / "b" / "cat.PNG")
    save_image(tmp_path / "a" / "deep" / "cat.png")
    (tmp_path / "b" / "cat.txt").write_text("a cat\none cat")
    (tmp_path / "b" / "cat.zh.TXT").write_text("猫")
    entries = list(folder_items(tmp_path, language="en"))
    assert entries == [
        Item("a/deep/cat.png", "a/deep/cat", entries[0].image, {}, {"file": "a/deep/cat.png"}),
        Item("b/cat.PNG", "b/cat", content, {"en": [b"a cat\none cat"], "zh": ["猫".encode()]}, {"file": "b/cat.PNG"}),
    ]


def test_what_is_no_sample_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "cat.png")
    for name in ("dog.txt", "cat.notes.here.txt", "LICENSE", ".hidden.png", "sub/page.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink(tmp_path / "absent", tmp_path / "gone.jpg")
    assert sorted(rejected(list(folder_items(tmp_path, language="en")))) == [
        (".hidden.png", "neither image nor caption"),
        ("LICENSE", "neither image nor caption"),
        ("cat.notes.here.txt", "text without image"),
        ("dog.txt", "text without image"),
        ("gone.jpg", "missing file"),
        ("loop", "link to a folder"),
        ("sub/page.html", "neither image nor caption"),
    ]


def test_a_file_too_large_to_be_a_picture_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    assert rejected(list(folder_items(tmp_path, language="en"))) == [("huge.png", "file too large")]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such folder"):
        list(folder_items(tmp_path / "absent", language="en"))


# --- tables ---

ROWS = [
    {"image": "img/0.png", "caption": 'a "quoted", red cat', "caption_zh": "红猫"},
    {"image": "img/1.png", "caption": "a blue cat", "caption_zh": "蓝猫"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        save_image(tmp_path / "img" / f"{i}.png", i)
    return tmp_path


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(row) for row in [rows[0].keys(), *(r.values() for r in rows)]))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_table(path: Path, image_column: str = "image", **columns: str) -> list[Item | Rejection]:
    return list(table_items(path, image_column=image_column, caption_columns=columns or {"en": "caption"}))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_samples(folder: Path, suffix: str) -> None:
    table = write_table(folder / f"t{suffix}", ROWS)
    entries = read_table(table, en="caption", zh="caption_zh")
    assert [(item.key, item.captions) for item in entries] == [
        ("img/0", {"en": ['a "quoted", red cat'], "zh": ["红猫"]}),
        ("img/1", {"en": ["a blue cat"], "zh": ["蓝猫"]}),
    ]
    assert [item.image for item in entries] == [(folder / "img" / f"{i}.png").read_bytes() for i in range(2)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_missing_column_lists_those_there_are(folder: Path, suffix: str) -> None:
    table = write_table(folder / f"t{suffix}", ROWS)
    with pytest.raises(DataError, match=r"no column 'text'; it has: image, caption, caption_zh.*--caption-column"):
        read_table(table, en="text")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_row_without_its_image_is_named(folder: Path, suffix: str) -> None:
    table = write_table(folder / f"t{suffix}", [ROWS[0], ROWS[1] | {"image": "absent.png"}, ROWS[1] | {"image": ""}])
    entries = read_table(table)
    assert list(items_of(entries)) == [f"t{suffix} row 1"]
    assert rejected(entries) == [(f"t{suffix} row 2", "missing file"), (f"t{suffix} row 3", "missing image")]


def test_a_damaged_csv_row_costs_that_row(folder: Path) -> None:
    (folder / "t.csv").write_bytes(
        b"\xef\xbb\xbfimage,caption\nimg/0.png,fine\nimg/1.png,too,many\nimg/1.png\n\n"
        b'img/1.png,"a"b"\nimg/1.png,nul\0 in it\nimg/2.png,caf\xe9\nimg/2.png,fine too\n'
    )
    entries = read_table(folder / "t.csv")
    assert [item.captions["en"] for item in items_of(entries).values()] == [
        ["fine"], ["nul\0 in it"], ["caf\udce9"], ["fine too"],
    ]  # fmt: skip
    assert rejected(entries) == [(f"t.csv row {n}", "unreadable row") for n in (2, 3, 5)]


def test_a_stray_quotation_mark_does_not_swallow_rows_silently(folder: Path) -> None:
    (folder / "t.csv").write_text('image,caption\nimg/0.png,"never closed\nimg/1.png,fine\n')
    assert rejected(read_table(folder / "t.csv")) == [("t.csv row 1", "unreadable row")]


def test_a_damaged_json_line_costs_that_line(folder: Path) -> None:
    (folder / "t.jsonl").write_text(
        '{"image": "img/0.png", "caption": ["one", "two", null]}\n{"image": \n[1]\n{"image": "img/1.png"}\n'
        '{"image": 7, "caption": "x"}\n{"image": "img/2.png", "caption": 3}\n'
    )
    entries = read_table(folder / "t.jsonl")
    assert [item.captions["en"] for item in items_of(entries).values()] == [["one", "two"], ["3"]]
    assert [reason for _, reason in rejected(entries)] == [
        "unreadable row", "unreadable row", "missing column", "missing image",
    ]  # fmt: skip


def test_parquet_may_hold_the_images_themselves(folder: Path) -> None:
    content = (folder / "img" / "0.png").read_bytes()
    plain = write_table(folder / "bytes.parquet", [{"image": content, "caption": "a"}])
    nested = write_table(folder / "nested.parquet", [{"image": {"bytes": content, "path": "x.png"}, "caption": "a"}])
    assert [(item.key, item.image) for item in read_table(plain)] == [("row-000001", content)]
    assert [(item.key, item.image) for item in read_table(nested)] == [("x", content)]


def test_a_damaged_parquet_keeps_what_was_read(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"image": "img/0.png", "caption": rng.bytes(2000).hex()} for _ in range(200)]
    table = folder / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=100, use_dictionary=False)
    content = bytearray(table.read_bytes())
    start = pyarrow.parquet.ParquetFile(table).metadata.row_group(1).column(1).data_page_offset
    content[start : start + 4000] = bytes(4000)
    table.write_bytes(content)
    entries = read_table(table)
    assert len(items_of(entries)) >= 64
    assert [reason for _, reason in rejected(entries)] == ["unreadable rows"]
    (folder / "no.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"no\.parquet: not a Parquet file"):
        read_table(folder / "no.parquet")


def test_a_table_of_unknown_kind_or_place_is_an_error(folder: Path) -> None:
    (folder / "t.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"unknown kind of table '\.xlsx'.*\.csv, \.tsv, \.jsonl, \.parquet"):
        read_table(folder / "t.xlsx")
    with pytest.raises(DataError, match="no such file"):
        read_table(folder / "absent.csv")
    (folder / "empty.csv").write_text("")
    with pytest.raises(DataError, match="no column 'image'; it has: none"):
        read_table(folder / "empty.csv")

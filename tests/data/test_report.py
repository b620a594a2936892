"""The report counts right, stands alone and shows text as text."""

import base64
import csv
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.data.pairs import Pair
from vqt2i.data.report import SHEET_SIZE, Report, TokenCount
from vqt2i.data.shards import DataSpec, ShardSpec, SplitSpec
from vqt2i.data.sources import Rejection

SPEC = DataSpec(
    image_size_px=8,
    languages=("en", "zh"),
    source={"kind": "test"},
    splits={"train": SplitSpec(shards=(ShardSpec(name="train-000000.tar", n_samples=2, sha256="0"),))},
)


def pair(captions: dict[str, tuple[str, ...]], value: int = 0, size_px: int = 8) -> Pair:
    return Pair("a<b", np.full((size_px, size_px, 3), value, np.uint8), captions)


def written(folder: Path, *pairs: Pair, **options: TokenCount) -> tuple[str, str]:
    with Report(folder, **options) as report:
        for one in pairs:
            report.add("train", one, (16, 12))
        report.write("the set", SPEC)
    return (folder / "report.txt").read_text(), (folder / "report.html").read_text()


def row(text: str, *cells: str | int) -> bool:
    return re.search(r"^ +" + r" +".join(re.escape(str(cell)) for cell in cells) + r"( +#*)?$", text, re.M) is not None


def test_counts_lengths_and_languages(tmp_path: Path) -> None:
    pairs = [pair({"en": ("a cat", "one small red cat"), "zh": ("猫",)}), pair({"en": ("x",)})]
    text, _ = written(tmp_path, *pairs)
    assert row(text, "train", 2, 1)
    assert row(text, "16 x 12", 2)
    assert row(text, "en", 2, 3, 5, 17, 17)
    assert row(text, "zh", 1, 1, 1, 1, 1)
    characters, words = text.split("Caption length in characters")[1].split("Caption length in words (en)")
    assert row(characters, "1", 2) and row(characters, "5 to 7", 1) and row(characters, "12 to 19", 1)
    assert row(words, "1", 1) and row(words, "2", 1) and row(words, "3 to 4", 1)


def test_the_share_truncated_is_what_the_tokenizer_says(tmp_path: Path) -> None:
    letters = TokenCount("letters.model", len, 3)
    text, _ = written(tmp_path, pair({"en": ("abc", "abcd", "abcde", "ab")}), token_count=letters)
    assert row(text, "en", 1, 4, 3, 5, 5, "50.0%")
    assert "more than 3 ids with letters.model" in text


def test_rejections_are_counted_and_named(tmp_path: Path) -> None:
    with Report(tmp_path) as report:
        report.add("train", pair({}), (8, 8))
        report.reject(Rejection("x/1.png", "empty file", "", "x__1"))
        report.reject(Rejection('x/"2",\udcff.png', "not an image", "two\nlines", "x__2"))
        report.reject(Rejection("x/3.png", "not an image"))
        report.write("the set", SPEC)
    text = (tmp_path / "report.txt").read_text()
    assert row(text, "not an image", 2) and row(text, "empty file", 1)
    with open(tmp_path / "rejected.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["key", "source", "reason", "detail"],
            ["x__1", "x/1.png", "empty file", ""],
            ["x__2", 'x/"2",\\udcff.png', "not an image", "two\nlines"],
            ["", "x/3.png", "not an image", ""],
        ]


def test_the_page_stands_alone_and_shows_text_as_text(tmp_path: Path) -> None:
    _, html = written(tmp_path, pair({"en": ("<script>alert('x')</script> & \"more\"",)}, value=9))
    assert "<script" not in html and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;more&quot;" in html
    assert "a&lt;b" in html
    assert not re.search(r"(src|href)=\"?(?!data:)", html.replace('src="data:', "")) and "@import" not in html
    picture = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', html)[1])
    assert np.asarray(Image.open(BytesIO(picture))).tolist() == np.full((8, 8, 3), 9).tolist()


def test_pictures_without_captions_have_a_report_too(tmp_path: Path) -> None:
    text, html = written(tmp_path, pair({}))
    assert "Captions (none: pictures only)" in text and "figure" in html


def test_the_contact_sheet_is_an_even_draw_of_bounded_size(tmp_path: Path) -> None:
    with Report(tmp_path) as report:
        for i in range(40 * SHEET_SIZE):
            report.add("train", Pair(str(i), np.zeros((2, 2, 3), np.uint8), {}), (2, 2))
        report.write("the set", SPEC)
    html = (tmp_path / "report.html").read_text()
    shown = [int(key) for key in re.findall(r'alt="(\d+)"', html)]
    assert len(shown) == len(set(shown)) == SHEET_SIZE
    assert np.mean(shown) == pytest.approx(20 * SHEET_SIZE, rel=0.3)
    assert f"{SHEET_SIZE} of {40 * SHEET_SIZE:,} samples" in html

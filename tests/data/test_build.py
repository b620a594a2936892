"""From entries to a data set: what is kept, where it goes, and that nothing is lost without a word."""

import csv
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.data import build
from vqt2i.data.build import BuildConfig, build_dataset, build_shapes, ensure_default_dataset, plain_key, shapes_items
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.data.sources import Item, Rejection
from vqt2i.errors import DataError, UserError
from vqt2i.files import sha256_of_file


def picture(seed: int, width: int = 12, height: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image_HW3: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def item(seed: int, *captions: bytes | str, key: str = "", **facts: object) -> Item:
    name = f"{key or seed}.png"
    return Item(name, key or str(seed), png(picture(seed)), {"en": list(captions or (f"picture {seed}",))}, **facts)


def made(tmp_path: Path, *entries: Item | Rejection, **options: object) -> DataSet:
    config = BuildConfig(**({"val_share": 0.0} | options))
    return build_dataset(tmp_path / "set", entries, config, source={"kind": "test"})


def rejections(data: DataSet) -> list[tuple[str, str]]:
    with open(data.folder / "rejected.csv", newline="") as file:
        return [(row["source"], row["reason"]) for row in csv.DictReader(file)]


def test_every_entry_is_a_sample_or_a_named_rejection(tmp_path: Path) -> None:
    bad = [
        Item("empty.png", "e", b"", {"en": ["x"]}),
        Item("text.png", "t", b"no image", {"en": ["x"]}),
        Item("cut.png", "c", png(picture(0))[:200], {"en": ["x"]}),
        Rejection("tar", "damaged shard"),
        item(1, "\x00"), item(2, b"\xff"), item(3, " \n "), Item("4.png", "4", png(picture(4)), {}),
    ]  # fmt: skip
    data = made(tmp_path, item(100, "kept"), *bad, item(101, "kept too"))
    assert [pair.captions for pair in data.split("train")] == [{"en": ("kept",)}, {"en": ("kept too",)}]
    assert rejections(data) == [
        ("empty.png", "empty file"), ("text.png", "not an image"), ("cut.png", "truncated image"),
        ("tar", "damaged shard"), ("1.png", "caption holds a NUL"), ("2.png", "caption is not UTF-8"),
        ("3.png", "empty caption"), ("4.png", "missing caption"),
    ]  # fmt: skip
    assert {path.name for path in data.folder.iterdir()} == {
        "data.json", "rejected.csv", "report.html", "report.txt", "train-000000.tar",
    }  # fmt: skip


def test_pixels_captions_and_meta_are_kept_exactly(tmp_path: Path) -> None:
    source = item(0, "one\ntwo", "three", meta={"k": ["v", 1]})
    source.captions["zh"] = ["猫"]
    (pair,) = made(tmp_path, source).split("train")
    np.testing.assert_array_equal(pair.image_HW3, picture(0))
    assert (pair.captions, pair.meta) == ({"en": ("one", "two", "three"), "zh": ("猫",)}, {"k": ["v", 1]})


def test_pictures_are_fitted_to_the_size_asked_for(tmp_path: Path) -> None:
    wide = Item("wide", "wide", png(picture(0, 40, 20)), {"en": ["x"]})
    data = made(tmp_path, wide, item(1), size_px=8)
    assert data.spec.image_size_px == 8
    assert [pair.image_HW3.shape for pair in data.split("train")] == [(8, 8, 3)] * 2


def test_sides_aspect_and_pixels_are_limited_at_the_value_given(tmp_path: Path) -> None:
    sizes = [(10, 10), (9, 10), (30, 10), (31, 10), (40, 20), (41, 20)]
    entries = [Item(f"{w}x{h}", "k", png(picture(w * h, w, h)), {"en": ["x"]}) for w, h in sizes]
    data = made(tmp_path, *entries, min_side_px=10, max_aspect=3.0, max_pixels=800)
    assert [pair.image_HW3.shape[1::-1] for pair in data.split("train")] == [(10, 10), (30, 10), (40, 20)]
    assert rejections(data) == [("9x10", "side too short"), ("31x10", "too elongated"), ("41x20", "too many pixels")]


def test_captions_outside_the_limits_are_left_out_one_by_one(tmp_path: Path) -> None:
    entries = [item(0, "ab", "abc", "abcde", "abcdef"), item(1, "a")]
    data = made(tmp_path, *entries, min_caption_chars=3, max_caption_chars=5)
    assert [pair.captions for pair in data.split("train")] == [{"en": ("abc", "abcde")}]
    assert rejections(data) == [("1.png", "no caption as wanted")]
    assert "caption left out: too short      1" in (data.folder / "report.txt").read_text()


def test_captions_without_the_pattern_are_left_out_one_by_one(tmp_path: Path, fails) -> None:
    entries = [item(0, "a cat", "the dog", "catalogue"), item(1, "dog")]
    data = made(tmp_path, *entries, caption_pattern=r"cat\b|the")
    assert [pair.captions for pair in data.split("train")] == [{"en": ("a cat", "the dog")}]
    assert rejections(data) == [("1.png", "no caption as wanted")]
    told = fails("make_dataset", "shapes", "--caption-pattern", "(", "--out", tmp_path / "bad")
    assert "caption_pattern" in told and "expected a regular expression" in told


def test_pictures_without_captions_are_kept_on_request(tmp_path: Path) -> None:
    data = made(tmp_path, item(0, " "), Item("1", "1", png(picture(1)), {}), captions_required=False)
    assert [pair.captions for pair in data.split("train")] == [{}, {}]
    assert data.languages == ()


def test_same_named_files_of_different_folders_stay_apart(tmp_path: Path) -> None:
    keys = ["a/cat", "b/cat", "a__cat", "a/cat", "a cat", "a-cat", "猫", "", "x" * 200, "y" + "x" * 199]
    data = made(tmp_path, *(item(i, key=key) for i, key in enumerate(keys)))
    found = [pair.key for pair in data.split("train")]
    assert len(set(found)) == len(keys)
    assert found[:2] == ["a__cat", "b__cat"]
    assert [pair.captions["en"] for pair in data.split("train")] == [(f"picture {i}",) for i in range(len(keys))]


@pytest.mark.parametrize("drop, kept", [("none", 4), ("exact", 3), ("near", 2)])
def test_duplicates_are_counted_and_dropped_as_asked(tmp_path: Path, drop: str, kept: int) -> None:
    nearly = picture(0).copy()
    nearly[0, 0, 0] ^= 1
    entries = [item(0), item(0, key="again"), Item("nearly", "n", png(nearly), {"en": ["x"]}), item(1)]
    data = made(tmp_path, *entries, drop_duplicates=drop)
    assert len(data.split("train")) == kept
    report = (data.folder / "report.txt").read_text()
    assert "same pixels as an earlier one         1" in report and "nearly the same                       1" in report
    dropped = {"none": [], "exact": [("again.png", "exact duplicate")]}
    assert rejections(data) == dropped.get(drop, [("again.png", "exact duplicate"), ("nearly", "near duplicate")])


@pytest.mark.parametrize("drop", ["none", "exact"])
def test_no_picture_is_in_two_splits(tmp_path: Path, drop: str) -> None:
    named = [item(0, split="train"), item(0, key="leak", split="val"), item(1, split="val")]
    copies = [item(i % 50, key=f"copy{i}") for i in range(2, 150)]
    for i, entries in enumerate((named, copies)):
        (tmp_path / str(i)).mkdir()
        data = made(tmp_path / str(i), *entries, drop_duplicates=drop, val_share=0.3)
        train, val = ({pair.image_HW3.tobytes() for pair in data.split(split)} for split in ("train", "val"))
        assert train and val and not train & val
        if entries is named:
            assert rejections(data) == [("leak.png", "in another split")]


def test_val_gets_its_share_whatever_the_order_or_the_names(tmp_path: Path) -> None:
    entries = [item(i) for i in range(300)]
    vals = []
    for i, order in enumerate((entries, entries[::-1], [item(i, key=f"other{i}") for i in range(300)])):
        (tmp_path / str(i)).mkdir()
        data = made(tmp_path / str(i), *order, val_share=0.1)
        vals.append({pair.image_HW3.tobytes() for pair in data.split("val")})
        assert len(data.split("val")) + len(data.split("train")) == 300
    assert vals[0] == vals[1] == vals[2]
    assert 15 <= len(vals[0]) <= 45


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_small_set_has_a_val_split_too(tmp_path: Path, n: int) -> None:
    data = made(tmp_path, *(item(i) for i in range(n)), val_share=0.001)
    assert (len(data.split("train")), len(data.split("val"))) == (n - 1, 1)


def test_one_picture_is_for_training(tmp_path: Path) -> None:
    data = made(tmp_path, item(0), val_share=0.5)
    assert list(data.spec.splits) == ["train"]


def test_equal_sources_make_equal_bytes(tmp_path: Path) -> None:
    entries = [item(i) for i in range(20)]
    first = made(tmp_path, *entries, val_share=0.2)
    (tmp_path / "again").mkdir()
    second = made(tmp_path / "again", *entries, val_share=0.2)
    for path in first.folder.glob("*.tar"):
        assert sha256_of_file(path) == sha256_of_file(second.folder / path.name)


def test_nothing_usable_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing usable; rejected: empty file \(2\)\. The first: a\.png: empty file"):
        made(tmp_path, *(Item(f"{name}.png", name, b"", {}) for name in "ab"))
    with pytest.raises(DataError, match="nothing usable: the source is empty"):
        made(tmp_path)
    with pytest.raises(DataError, match="nothing usable for train"):
        made(tmp_path, item(0, split="val"), item(1, " ", split="train"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield item(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(tmp_path / "set", failing(), BuildConfig(), source={})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_data_set_is_not_touched(tmp_path: Path) -> None:
    data = made(tmp_path, item(0))
    with pytest.raises(UserError, match="exists already"):
        made(tmp_path, item(1))
    assert DataSet.open(data.folder).fingerprint == data.fingerprint


def test_names_that_are_not_utf_8_do_not_end_the_run(tmp_path: Path) -> None:
    odd = Item("\udcff.png", "\udcff", png(picture(0)), {"en": ["x"]})
    data = made(tmp_path, odd, Item("\udcfe.png", "\udcfe", b"", {}))
    assert len(data.split("train")) == 1 and rejections(data) == [("\\udcfe.png", "empty file")]


def test_plain_keys_are_keys() -> None:
    assert plain_key("a/b c.d/é_1-2") == "a__b-c-d__-_1-2"
    assert plain_key("…") == "sample"


# --- the embedded set ---

FEW = {"train": 12, "val": 4, "unseen": 4}


def test_the_embedded_set_holds_what_the_shapes_source_draws(tmp_path: Path) -> None:
    data = build_shapes(tmp_path / "set", counts=FEW, seed=3)
    assert (data.spec.image_size_px, data.languages) == (32, ("en", "zh"))
    drawn = list(shapes_items(FEW, 3, 32))
    assert Counter(one.split for one in drawn) == {name: split.n_samples for name, split in data.spec.splits.items()}
    found = [pair for name in FEW for pair in data.split(name)]
    for pair, one in zip(found, drawn, strict=True):
        assert (pair.key, pair.meta) == (one.key, one.meta)
        assert pair.captions == {language: tuple(texts) for language, texts in one.captions.items()}
        np.testing.assert_array_equal(pair.image_HW3, one.image)


def draw_one(folder: Path) -> DataSet:
    return write_dataset(folder, {"train": [Pair("a", picture(0), {})]})


def test_the_default_is_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(build, "build_shapes", draw_one)
    first = ensure_default_dataset(tmp_path / "shapes")
    assert "no data set there yet" in capsys.readouterr().err
    again = ensure_default_dataset(tmp_path / "shapes")
    assert again.fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""


def test_other_ranks_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")

    def first_rank() -> None:
        time.sleep(0.2)
        draw_one(tmp_path / "shapes")

    thread = threading.Thread(target=first_rank)
    thread.start()
    assert len(ensure_default_dataset(tmp_path / "shapes").split("train")) == 1
    thread.join()

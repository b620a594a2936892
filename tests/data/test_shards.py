"""The data set on disk: what is written is what is read, and damage is named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, is_key, is_language, write_dataset
from vqt2i.errors import DataError, UserError
from vqt2i.files import sha256_of_file


def make_pairs(n: int, size_px: int = 8, prefix: str = "k") -> list[Pair]:
    rng = np.random.default_rng(n)
    return [
        Pair(
            f"{prefix}{i:03d}",
            rng.integers(0, 256, (size_px, size_px, 3), dtype=np.uint8),
            {"en": ("a red cat", f"cat {i}"), "zh": (f"第{i}只红猫",)},
            {"index": i},
        )
        for i in range(n)
    ]


def assert_equal(found: Pair, expected: Pair) -> None:
    assert (found.key, found.captions, found.meta) == (expected.key, expected.captions, expected.meta)
    np.testing.assert_array_equal(found.image_HW3, expected.image_HW3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", {"train": make_pairs(7)}, shard_size=3)
    return tmp_path / "set"


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    splits = {"train": make_pairs(7), "val": make_pairs(2, prefix="v")}
    data = write_dataset(tmp_path / "set", splits, shard_size=3, source={"kind": "test"})
    assert sorted(path.name for path in data.folder.iterdir()) == [
        "data.json",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "val-000000.tar",
    ]
    assert (data.spec.image_size_px, data.languages, data.spec.source) == (8, ("en", "zh"), {"kind": "test"})
    for name, pairs in splits.items():
        split = data.split(name)
        assert len(split) == data.spec.splits[name].n_samples == len(pairs)
        for found, expected in zip(split, pairs, strict=True):
            assert_equal(found, expected)


def test_samples_are_read_in_any_order(folder: Path) -> None:
    split, pairs = DataSet.open(folder).split("train"), make_pairs(7)
    for i in (6, 0, 3, -1, 2, -7, np.int64(5)):
        assert_equal(split[i], pairs[i])
        assert split.captions(i) == pairs[i].captions
    for i in (7, -8):
        with pytest.raises(IndexError):
            split[i]


def test_equal_samples_give_equal_bytes_and_fingerprint(folder: Path, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", {"train": make_pairs(7)}, shard_size=3, source={"made": "elsewhere"})
    for path in folder.glob("*.tar"):
        assert sha256_of_file(path) == sha256_of_file(again.folder / path.name)
    assert again.fingerprint == DataSet.open(folder).fingerprint
    other = write_dataset(tmp_path / "other", {"train": make_pairs(6)}, shard_size=3)
    assert other.fingerprint != again.fingerprint


def test_the_first_language_is_the_primary_one_and_others_may_lack(tmp_path: Path) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    pairs = [Pair("a", image, {"fr": ("un chat",)}), Pair("b", image, {"zh": ("猫",)}), Pair("c", image, {})]
    data = write_dataset(tmp_path / "set", {"train": pairs}, primary_language="zh")
    assert data.languages == ("zh", "fr")
    assert data.spec.image_size_px is None
    assert [pair.captions for pair in data.split("train")] == [pair.captions for pair in pairs]


def test_jpeg_shards_are_close_to_the_pixels(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 64, 3))
    data = write_dataset(tmp_path / "set", {"train": [Pair("a", ramp, {})]}, image_format="jpg")
    assert np.abs(data.split("train")[0].image_HW3.astype(int) - ramp).max() <= 4


def test_a_split_survives_pickling(folder: Path) -> None:
    split = pickle.loads(pickle.dumps(DataSet.open(folder).split("train")))
    assert_equal(split[4], make_pairs(7)[4])


@pytest.mark.parametrize(
    ("key", "captions"),
    [("a.b", {}), ("", {}), ("x" * 81, {}), ("ok", {"English": ("a",)}), ("ok", {"en": ("two\nlines",)}),
     ("ok", {"en": (" ",)}), ("ok", {"en": ()})],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, key: str, captions: dict) -> None:
    with pytest.raises(ValueError, match=r"expected|one line"):
        write_dataset(tmp_path / "set", {"train": [Pair(key, np.zeros((2, 2, 3), np.uint8), captions)]})
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k000"):
        write_dataset(tmp_path / "set", {"train": make_pairs(1), "val": make_pairs(1)})


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing():
        yield from make_pairs(4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        write_dataset(tmp_path / "set", {"train": failing()}, shard_size=2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_not_overwritten(folder: Path) -> None:
    before = sha256_of_file(folder / "data.json")
    with pytest.raises(UserError, match="exists already"):
        write_dataset(folder, {"train": make_pairs(1)})
    assert sha256_of_file(folder / "data.json") == before


def test_an_unknown_split_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'vall'; it has train"):
        DataSet.open(folder).split("vall")


def test_opening_no_data_set_shows_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no data\.json in it.*make_dataset.*"shards"'):
        DataSet.open(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        DataSet.open(tmp_path / "absent")
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        DataSet.open(tmp_path)
    (tmp_path / "data.json").write_text('{"image_size": 64, "languages": [], "splits": {}}')
    with pytest.raises(DataError, match="did you mean 'image_size_px'"):
        DataSet.open(tmp_path)
    (tmp_path / "data.json").write_text("[1]")
    with pytest.raises(DataError, match=r"data\.json"):
        DataSet.open(tmp_path)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: missing"):
        DataSet.open(folder)


def test_a_shard_cut_anywhere_is_named(folder: Path) -> None:
    shard = folder / "train-000001.tar"
    whole = shard.read_bytes()
    for n_bytes in range(0, len(whole.rstrip(b"\0")) + 512, 256):
        shard.write_bytes(whole[:n_bytes])
        with pytest.raises(DataError, match=r"train-000001\.tar: .*copy the shard again"):
            DataSet.open(folder).split("train")


def test_a_wrong_count_is_named(folder: Path) -> None:
    spec = json.loads((folder / "data.json").read_text())
    spec["splits"]["train"]["shards"][0]["n_samples"] = 4
    (folder / "data.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"train-000000\.tar: holds 3 whole samples, data\.json says 4"):
        DataSet.open(folder).split("train")


def test_damaged_pixels_name_shard_and_key(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    content = shard.read_bytes().replace(b"IHDR", b"XXXX")
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'k001' is damaged"):
        DataSet.open(folder).split("train")[1]


def test_keys_and_languages_have_a_form() -> None:
    assert all(map(is_key, ("a", "A-1_b", "x" * 80))) and not any(map(is_key, ("", "a.b", "é", "a b", "x" * 81)))
    assert all(map(is_language, ("en", "zh", "pt-BR", "zh-Hans-CN")))
    assert not any(map(is_language, ("", "e", "EN", "a/b")))

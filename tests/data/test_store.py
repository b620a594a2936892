import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vqt2i.data.shards import ShardSpec, SplitSpec
from vqt2i.data.store import (
    SPEC_NAME,
    StoreSpec,
    TokenPart,
    TokenSplit,
    TokenStore,
    image_id_dtype,
    load_part,
    save_part,
    write_split,
)
from vqt2i.errors import DataError
from vqt2i.files import write_json

TEXTS = [[[1, 2], [3]], [], [[]], [[70_000], [4, 5, 6]]]  # of four samples: some without a caption, one empty caption


def part_of(texts: list[list[list[int]]], image_ids: np.ndarray) -> TokenPart:
    captions = [ids for sample in texts for ids in sample]
    lengths, counts = np.array([len(ids) for ids in captions], int), np.array([len(sample) for sample in texts], int)
    return TokenPart(image_ids, np.array([i for ids in captions for i in ids], int), lengths, counts)


def write(folder: Path, texts: list[list[list[int]]], n_image_ids: int = 512) -> np.ndarray:
    """A store of one split 'train' with two variants, written in two parts; returns its image ids."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, n_image_ids, (len(texts), 2, 3, 2))
    parts = [part_of(texts[:3], ids[:3]), part_of(texts[3:], ids[3:])]
    write_split(folder, "train", parts, (2, 3, 2), image_id_dtype(n_image_ids))
    shards = (ShardSpec(name="train-000000.tar", n_samples=len(texts), sha256="s"),)
    spec = StoreSpec(
        image_tokenizer="i", text_tokenizer="t", languages=("en",), variants="flip", grid_height=3, grid_width=2,
        splits={"train": SplitSpec(shards=shards)},
    )  # fmt: skip
    write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
    return ids


def captions_of(split: TokenSplit, index: int) -> list[list[int]]:
    part = split.part(index, index + 1)
    ends = np.cumsum(part.text_lengths)
    return [part.text_ids[end - n : end].tolist() for end, n in zip(ends, part.text_lengths, strict=True)]


@pytest.mark.parametrize(("n_image_ids", "dtype"), [(512, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_what_was_written_is_read(tmp_path: Path, n_image_ids: int, dtype: type) -> None:
    ids = write(tmp_path / "store", TEXTS, n_image_ids)
    store = TokenStore.open(tmp_path / "store")
    split = store.split("train")
    assert len(split) == 4 and split.n_variants == 2 and store.spec.image_shape == (2, 3, 2)
    index_B, variant_B = np.array([3, 0, 2, 1, 3]), np.array([0, 1, 0, 1, 1])
    found = split.image_ids(index_B, variant_B)
    assert np.array_equal(found, ids[index_B, variant_B]) and found.dtype == np.int64
    assert [captions_of(split, index) for index in range(4)] == TEXTS
    assert np.load(tmp_path / "store" / "train.image_ids.npy", mmap_mode="r").dtype == dtype


@pytest.mark.parametrize("text_length", [1, 2, 5])
def test_the_caption_that_the_draw_falls_on_is_truncated_or_padded(tmp_path: Path, text_length: int) -> None:
    write(tmp_path / "store", TEXTS)
    split = TokenStore.open(tmp_path / "store").split("train")
    index_B, draw_B = np.repeat(np.arange(4), 4), np.tile(np.array([0, 0.49, 0.5, 0.999], np.float32), 4)
    ids_BS, n_ids_B = split.texts(index_B, draw_B, text_length)
    assert ids_BS.shape == (16, text_length) and ids_BS.dtype == n_ids_B.dtype == np.int64
    for index, u, ids, n in zip(index_B, draw_B, ids_BS.tolist(), n_ids_B, strict=True):
        expected = TEXTS[index][int(u * len(TEXTS[index]))][:text_length] if TEXTS[index] else []
        assert n == len(expected) and ids == expected + [0] * (text_length - n)


def test_a_split_without_any_caption_is_allowed(tmp_path: Path) -> None:
    write(tmp_path / "store", [[], [], []])
    ids_BS, n_ids_B = TokenStore.open(tmp_path / "store").split("train").texts(np.array([2, 0]), np.array([0, 0.9]), 3)
    assert ids_BS.tolist() == [[0, 0, 0]] * 2 and n_ids_B.tolist() == [0, 0]


def test_a_split_goes_to_another_process_as_its_path(tmp_path: Path) -> None:
    ids = write(tmp_path / "store", TEXTS * 1000)
    pickled = pickle.dumps(TokenStore.open(tmp_path / "store").split("train"))
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).image_ids(np.array([7]), np.array([1])), ids[7:8, 1])


def test_samples_are_copied_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    ids = write(tmp_path / "store", TEXTS)
    part = TokenStore.open(tmp_path / "store").split("train").part(1, 4)
    save_part(tmp_path / "part.npz", part)
    for found in (part, load_part(tmp_path / "part.npz")):
        assert all(np.array_equal(a, b) for a, b in zip(found, part_of(TEXTS[1:], ids[1:]), strict=True))


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4", b"\0" * 100])
def test_a_missing_or_damaged_part_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "part.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"part\.npz: cannot be read"):
        load_part(tmp_path / "part.npz")


def test_the_files_are_those_that_numpy_writes(tmp_path: Path) -> None:
    write(tmp_path / "store", TEXTS)
    for path in (tmp_path / "store").glob("*.npy"):
        array = np.load(path)
        np.save(tmp_path / "again.npy", array)
        assert path.read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_an_unknown_split_lists_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "store", TEXTS)
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        TokenStore.open(tmp_path / "store").split("val")


@pytest.mark.parametrize("content", [None, "", "[]", '{"image_tokenizer": "d"}', "\x00", '{"format_version": 1}'])
def test_a_store_without_a_right_description_is_refused(tmp_path: Path, content: str | None) -> None:
    write(tmp_path / "store", TEXTS)
    (tmp_path / "store" / SPEC_NAME).unlink()
    if content is not None:
        (tmp_path / "store" / SPEC_NAME).write_text(content)
    with pytest.raises(DataError, match=r"store\.json: cannot be read as a token store"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("array", ["image_ids", "text_ids", "text_starts", "caption_starts"])
def test_missing_and_truncated_arrays_are_refused(tmp_path: Path, array: str) -> None:
    write(tmp_path / "store", TEXTS)
    path = tmp_path / "store" / f"train.{array}.npy"
    content = path.read_bytes()
    for damaged in (content[:-2], content[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged token store"):
            TokenStore.open(tmp_path / "store").split("train")
    path.unlink()
    with pytest.raises(DataError, match="damaged token store"):
        TokenStore.open(tmp_path / "store").split("train")


def test_another_number_of_samples_than_described_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "store", TEXTS)
    path = tmp_path / "store" / SPEC_NAME
    spec = json.loads(path.read_text())
    spec["splits"]["train"]["shards"][0]["n_samples"] = 5
    path.write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"'train' holds 4 samples, store\.json says 5"):
        TokenStore.open(tmp_path / "store").split("train")

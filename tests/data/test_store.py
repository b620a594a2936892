import json
from pathlib import Path

import numpy as np
import pytest

from vqt2i.data.store import SPEC_NAME, StoreSpec, TokenSplitWriter, TokenStore
from vqt2i.errors import DataError
from vqt2i.files import write_json

TEXTS = [[[1, 2], [3]], [], [[]], [[70_000], [4, 5, 6]]]  # of four samples: some without a caption, one empty caption


def write(folder: Path, texts: list[list[list[int]]], n_image_ids: int = 512) -> np.ndarray:
    """A store of one split 'train', written in two batches; returns its image ids."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, n_image_ids, (len(texts), 3, 2))
    writer = TokenSplitWriter(folder, "train", len(texts), (3, 2), n_image_ids)
    writer.add(ids[:3], texts[:3])
    writer.add(ids[3:], texts[3:])
    writer.finish()
    spec = StoreSpec(
        dataset="d", image_tokenizer="i", text_tokenizer="t", grid_height=3, grid_width=2, splits={"train": len(texts)}
    )
    write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
    return ids


@pytest.mark.parametrize(("n_image_ids", "dtype"), [(512, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_what_was_written_is_read(tmp_path: Path, n_image_ids: int, dtype: type) -> None:
    ids = write(tmp_path / "store", TEXTS, n_image_ids)
    store = TokenStore.open(tmp_path / "store")
    split = store.split("train")
    assert len(split) == 4 and (store.spec.grid_height, store.spec.grid_width) == (3, 2)
    for index in (3, 0, 2, 1):
        assert np.array_equal(split.image_ids(index), ids[index]) and split.image_ids(index).dtype == np.int64
        assert split.texts(index) == TEXTS[index]
    assert np.load(tmp_path / "store" / "train.image_ids.npy", mmap_mode="r").dtype == dtype


def test_a_split_without_any_caption_is_allowed(tmp_path: Path) -> None:
    write(tmp_path / "store", [[], [], []])
    assert TokenStore.open(tmp_path / "store").split("train").texts(2) == []


def test_an_unknown_split_lists_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "store", TEXTS)
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        TokenStore.open(tmp_path / "store").split("val")


@pytest.mark.parametrize("content", [None, "", "[]", '{"dataset": "d"}', "\x00"])
def test_a_store_without_a_right_description_is_refused(tmp_path: Path, content: str | None) -> None:
    write(tmp_path / "store", TEXTS)
    (tmp_path / "store" / SPEC_NAME).unlink()
    if content is not None:
        (tmp_path / "store" / SPEC_NAME).write_text(content)
    with pytest.raises(DataError, match=r"store\.json: cannot be read as a token store"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("array", ["image_ids", "text_ids", "text_ends", "caption_ends"])
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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": {"train": 5}}))
    with pytest.raises(DataError, match=r"'train' holds 4 samples, store\.json says 5"):
        TokenStore.open(tmp_path / "store").split("train")

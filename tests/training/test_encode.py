from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.data.images import to_tensor
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.data.store import TokenStore
from vqt2i.errors import DataError, UserError
from vqt2i.training.encode import encode_dataset, ensure_store, store_folder


def test_every_image_and_caption_is_encoded_in_order(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    store = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train", "val"), tmp_path / "store", batch_size=5)
    assert store.spec.splits == {"train": 24, "val": 7}
    for name in ("train", "val"):
        found = store.split(name)
        for index, pair in enumerate(tiny_dataset.split(name)):
            ids = tiny_vq.encode(to_tensor(pair.image_HW3)[None])[0]
            assert torch.equal(torch.from_numpy(found.image_ids(index)), ids)
            texts = [text for captions in pair.captions.values() for text in captions]
            assert found.texts(index) == [tiny_text.encode(text) for text in texts]


def test_a_store_names_what_it_was_made_of(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    spec = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("val",), tmp_path / "store").spec
    assert (spec.dataset, spec.image_tokenizer, spec.text_tokenizer) == (
        tiny_dataset.fingerprint, tiny_vq.fingerprint, tiny_text.fingerprint,
    )  # fmt: skip


def test_it_is_made_once_and_then_opened(tiny_dataset: DataSet, tiny_vq, tiny_text, monkeypatch) -> None:
    first = ensure_store(tiny_dataset, tiny_vq, tiny_text, ("train", "val"))
    assert first.folder == store_folder(tiny_dataset, tiny_vq, tiny_text)
    monkeypatch.setattr(type(tiny_vq), "encode", None)
    assert ensure_store(tiny_dataset, tiny_vq, tiny_text, ("train", "val")).spec == first.spec


def test_other_splits_than_asked_for_are_an_error(tiny_vq, tiny_text, tmp_path: Path) -> None:
    pair = Pair("a", np.zeros((16, 16, 3), np.uint8), {"en": ("x",)})
    dataset = write_dataset(tmp_path / "data", {"train": [pair]})
    ensure_store(dataset, tiny_vq, tiny_text, ("train",))
    with pytest.raises(DataError, match="no split 'val'"):
        ensure_store(dataset, tiny_vq, tiny_text, ("train", "val"))


def test_a_store_of_more_splits_will_do_and_one_of_fewer_will_not(tiny_vq, tiny_text, tmp_path: Path) -> None:
    images = {name: np.full((16, 16, 3), i, np.uint8) for i, name in enumerate(("train", "val", "unseen"))}
    dataset = write_dataset(tmp_path / "data", {name: [Pair(name, image, {})] for name, image in images.items()})
    whole = ensure_store(dataset, tiny_vq, tiny_text, ("train", "val"))
    assert ensure_store(dataset, tiny_vq, tiny_text, ("train",)).spec == whole.spec
    with pytest.raises(DataError, match="other splits"):
        ensure_store(dataset, tiny_vq, tiny_text, ("train", "unseen"))


def test_remade_data_is_not_read_from_the_old_store(tiny_vq, tiny_text, tmp_path: Path) -> None:
    old, new = (
        write_dataset(tmp_path / name, {"train": [Pair("a", np.full((16, 16, 3), value, np.uint8), {"en": ("x",)})]})
        for name, value in (("old", 0), ("new", 200))
    )
    store = ensure_store(old, tiny_vq, tiny_text, ("train",))
    store.folder.rename(store_folder(new, tiny_vq, tiny_text))
    with pytest.raises(DataError, match="encoded from another data set"):
        ensure_store(new, tiny_vq, tiny_text, ("train",))


def test_a_failure_leaves_no_store(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path, monkeypatch) -> None:
    def fail(images) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_vq, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").touch()
    with pytest.raises(UserError, match="exists already"):
        encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store")


def test_images_without_captions_can_be_encoded(tiny_vq, tiny_text, tmp_path: Path) -> None:
    pairs = [Pair(key, np.zeros((20, 18, 3), np.uint8), {}) for key in "ab"]
    dataset = write_dataset(tmp_path / "data", {"train": pairs})
    split = encode_dataset(dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store").split("train")
    assert split.texts(1) == [] and split.image_ids(1).shape == (4, 4)
    assert TokenStore.open(tmp_path / "store").spec.splits == {"train": 2}

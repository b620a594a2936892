import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.data.images import fit_variant, to_tensor
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, SplitSpec, write_dataset
from vqt2i.data.store import TokenStore
from vqt2i.errors import DataError, UserError
from vqt2i.files import PARTIAL_PREFIX, write_json
from vqt2i.training.encode import encode_dataset, ensure_store, store_folder


@pytest.fixture
def shards(tiny_dataset: DataSet, tmp_path: Path) -> DataSet:
    """The 24 train pictures of the tiny data set in six shards, and the val pictures in two."""
    splits = {name: list(tiny_dataset.split(name)) for name in ("train", "val")}
    return write_dataset(tmp_path / "shards", splits, shard_size=4)


def without(dataset: DataSet, split: str, keep: slice, folder: Path) -> DataSet:
    """A data set in `folder` of the same shards but for some of one split."""
    shutil.copytree(dataset.folder, folder)
    splits = dataset.spec.splits | {split: SplitSpec(shards=dataset.spec.splits[split].shards[keep])}
    write_json(folder / "data.json", dataset.spec.model_copy(update={"splits": splits}).model_dump(mode="json"))
    return DataSet.open(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def encoded(tiny_vq, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of images that went through the image tokenizer."""
    sizes, encode = [], tiny_vq.encode
    monkeypatch.setattr(tiny_vq, "encode", lambda images: sizes.append(len(images)) or encode(images))
    return sizes


@pytest.mark.parametrize(("variants", "n_variants"), [("centre", 1), ("ten-crop", 10)])
def test_every_image_variant_and_caption_is_encoded_in_order(
    variants: str, n_variants: int, tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path
) -> None:
    store = encode_dataset(
        tiny_dataset, tiny_vq, tiny_text, ("train", "val"), tmp_path / "store", variants=variants, batch_size=25
    )
    for name, n_samples in (("train", 24), ("val", 7)):
        found = store.split(name).part(0, n_samples)
        assert found.image_ids_NVHW.shape == (n_samples, n_variants, 4, 4)
        texts = []
        for ids, n_captions, pair in zip(
            found.image_ids_NVHW, found.n_captions_N, tiny_dataset.split(name), strict=True
        ):
            images = [to_tensor(fit_variant(pair.image_HW3, 16, variants, i)) for i in range(n_variants)]
            assert torch.equal(torch.from_numpy(ids.astype(int)), tiny_vq.encode(torch.stack(images)))
            texts += [tiny_text.encode(text) for captions in pair.captions.values() for text in captions]
            assert n_captions == 3
        assert found.text_ids.tolist() == [i for text in texts for i in text]
        assert found.text_lengths.tolist() == [len(text) for text in texts]


def test_a_store_names_what_it_was_made_of(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    spec = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("val",), tmp_path / "store").spec
    assert (spec.image_tokenizer, spec.text_tokenizer) == (tiny_vq.fingerprint, tiny_text.fingerprint)
    assert spec.splits == {"val": tiny_dataset.spec.splits["val"]} and spec.languages == ("en", "zh")


def test_workers_make_the_same_bytes(shards: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    stores = [encode_dataset(shards, tiny_vq, tiny_text, ("train", "val"), tmp_path / f"{n}", batch_size=3, n_workers=n)
              for n in (0, 2)]  # fmt: skip
    assert contents(stores[0].folder) == contents(stores[1].folder)


@pytest.mark.parametrize("n_batches", [1, 5, 8])
def test_killed_and_called_again_it_goes_on_to_the_same_bytes(
    n_batches: int, shards: DataSet, tiny_vq, tiny_text, tmp_path: Path, encoded: list[int], monkeypatch
) -> None:
    def run(out: Path) -> TokenStore:
        return encode_dataset(shards, tiny_vq, tiny_text, ("train", "val"), out, batch_size=3)

    whole = contents(run(tmp_path / "whole").folder)
    child = os.fork()
    if child == 0:
        calls, encode = iter(range(n_batches)), tiny_vq.encode

        def encode_or_die(images: torch.Tensor) -> torch.Tensor:
            return os.kill(os.getpid(), signal.SIGKILL) if next(calls, None) is None else encode(images)

        try:
            monkeypatch.setattr(tiny_vq, "encode", encode_or_die)
            run(tmp_path / "store")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    encoded.clear()
    assert contents(run(tmp_path / "store").folder) == whole
    assert list(tmp_path.glob(f"{PARTIAL_PREFIX}*")) == []
    n_done = n_batches // 2 * 4  # shards of four pictures take two batches of up to three
    assert sum(encoded) == 31 - n_done


def test_a_grown_data_set_costs_what_is_new(
    shards: DataSet, tiny_vq, tiny_text, tmp_path: Path, encoded: list[int]
) -> None:
    whole = contents(encode_dataset(shards, tiny_vq, tiny_text, ("train", "val"), tmp_path / "whole").folder)
    before = without(shards, "train", slice(1, 4), tmp_path / "before")  # grows in front and behind
    out = encode_dataset(before, tiny_vq, tiny_text, ("train", "val"), tmp_path / "store").folder
    encoded.clear()
    assert contents(encode_dataset(shards, tiny_vq, tiny_text, ("train",), out).folder) == whole
    assert sum(encoded) == 3 * 4
    encoded.clear()
    encode_dataset(shards, tiny_vq, tiny_text, ("train",), out)
    assert encoded == []


def test_a_failure_while_a_store_grows_leaves_the_old_one(shards: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    before = without(shards, "train", slice(3), tmp_path / "before")
    out = encode_dataset(before, tiny_vq, tiny_text, ("train",), tmp_path / "store").folder
    old = contents(out)
    name = shards.spec.splits["train"].shards[5].name
    (shards.folder / name).write_bytes(b"\0" * 2048)
    with pytest.raises(DataError, match=name):
        encode_dataset(DataSet.open(shards.folder), tiny_vq, tiny_text, ("train",), out)
    assert contents(out) == old


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_damaged_image_is_named(n_workers: int, shards: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    path = shards.folder / shards.spec.splits["train"].shards[2].name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x89PNG", b"\0\0\0\0", 1))
    with pytest.raises(DataError, match=rf"\A{path}: sample 's008' is damaged \(.*\Z"):
        encode_dataset(shards, tiny_vq, tiny_text, ("train",), tmp_path / "store", n_workers=n_workers)


def test_it_is_made_once_and_then_opened(tiny_dataset: DataSet, tiny_vq, tiny_text, monkeypatch) -> None:
    first = ensure_store(tiny_dataset, tiny_vq, tiny_text, ("train", "val"))
    assert first.folder == store_folder(tiny_dataset, tiny_vq, tiny_text)
    monkeypatch.setattr(type(tiny_vq), "encode", None)
    assert ensure_store(tiny_dataset, tiny_vq, tiny_text, ("train", "val")).spec == first.spec
    monkeypatch.setenv("RANK", "1")
    assert ensure_store(tiny_dataset, tiny_vq, tiny_text, ("train",)).spec == first.spec


def test_other_splits_than_the_data_has_are_an_error(tiny_vq, tiny_text, tmp_path: Path) -> None:
    pair = Pair("a", np.zeros((16, 16, 3), np.uint8), {"en": ("x",)})
    dataset = write_dataset(tmp_path / "data", {"train": [pair]})
    ensure_store(dataset, tiny_vq, tiny_text, ("train",))
    with pytest.raises(DataError, match="no split 'val'"):
        ensure_store(dataset, tiny_vq, tiny_text, ("train", "val"))


def test_a_store_of_more_splits_will_do_and_one_of_fewer_is_added_to(
    tiny_vq, tiny_text, tmp_path: Path, encoded: list[int]
) -> None:
    images = {name: np.full((16, 16, 3), i, np.uint8) for i, name in enumerate(("train", "val", "unseen"))}
    dataset = write_dataset(tmp_path / "data", {name: [Pair(name, image, {})] for name, image in images.items()})
    whole = ensure_store(dataset, tiny_vq, tiny_text, ("train", "val"))
    assert ensure_store(dataset, tiny_vq, tiny_text, ("train",)).spec == whole.spec and encoded == [1, 1]
    assert set(ensure_store(dataset, tiny_vq, tiny_text, ("train", "unseen")).spec.splits) == set(images)
    assert encoded == [1, 1, 1]


def test_the_store_of_other_data_or_with_other_settings_is_not_overwritten(tiny_vq, tiny_text, tmp_path: Path) -> None:
    old, new = (
        write_dataset(tmp_path / name, {"train": [Pair("a", np.full((16, 16, 3), value, np.uint8), {"en": ("x",)})]})
        for name, value in (("old", 0), ("new", 200))
    )
    out = ensure_store(old, tiny_vq, tiny_text, ("train",)).folder
    held = contents(out)
    with pytest.raises(DataError, match="encoded from another data set"):
        encode_dataset(new, tiny_vq, tiny_text, ("train",), out)
    with pytest.raises(DataError, match="encoded with variants centre, expected flip"):
        encode_dataset(old, tiny_vq, tiny_text, ("train",), out, variants="flip")
    assert contents(out) == held


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
    part = encode_dataset(dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store").split("train").part(0, 2)
    assert part.n_captions_N.tolist() == [0, 0] and part.image_ids_NVHW.shape == (2, 1, 4, 4)

"""Classes of samples: from every source into the data set, and nowhere where they were not asked for."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.cli import main
from vqt2i.data.build import BuildConfig, build_dataset, build_shapes
from vqt2i.data.pairs import Pair
from vqt2i.data.shapes import labelled_pairs
from vqt2i.data.shards import SPEC_NAME, DataSet, DataSpec, ShardSpec, SplitSpec, encode_image, write_dataset
from vqt2i.data.sources import Item
from vqt2i.data.stream import Stream, StreamConfig
from vqt2i.data.tars import tar_items
from vqt2i.errors import DataError

IMAGE = np.zeros((4, 4, 3), np.uint8)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Each sample a picture of its own and the files that are given, by suffix."""
    with tarfile.open(path, "w") as tar:
        for number, (key, files) in enumerate(samples.items()):
            for suffix, content in {"png": encode_image(noise(number), "png"), **files}.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def classes_of(dataset: DataSet) -> dict[str, str]:
    return {pair.key: pair.label for name in dataset.spec.splits for pair in dataset.split(name)}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """dog/ and cat/ of three pictures each, one of them deeper, one with a caption; and a picture in neither."""
    for number, name in enumerate(("dog/1", "dog/2", "dog/deep/3", "cat/1", "cat/2", "cat/3", "stray")):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number)).save(path)
    (tmp_path / "pets" / "cat" / "1.txt").write_text("a cat")
    return tmp_path / "pets"


def test_the_class_of_each_sample_is_read_as_it_was_written(tmp_path: Path) -> None:
    pairs = [Pair("a", IMAGE, {}, {"of": 1}, "dog"), Pair("b", IMAGE, {"en": ("x",)}, label="a cat")]
    dataset = write_dataset(tmp_path / "set", {"train": pairs})
    assert dataset.labels == DataSet.open(tmp_path / "set").labels == ("a cat", "dog")
    assert [(pair.label, pair.meta) for pair in dataset.split("train")] == [("dog", {"of": 1}), ("a cat", {})]


def test_a_data_set_without_classes_is_what_it_was_before_there_were_any(tmp_path: Path) -> None:
    shards = {"train": SplitSpec(shards=(ShardSpec(name="train-000000.tar", n_samples=3, sha256="ab"),))}
    spec = DataSpec(image_size_px=32, languages=("en", "zh"), source={"a": 1}, splits=shards)
    assert spec.fingerprint == "8e1448710e55e874c0d2c613770f9c275ba28a2f25c0d786ac7f13d41a836e20"
    assert spec.model_copy(update={"labels": ("a", "b")}).fingerprint != spec.fingerprint
    pair = Pair("a", IMAGE, {}, {"label": 7})  # a fact of the source's own
    found = write_dataset(tmp_path / "set", {"train": [pair]})
    assert found.labels == () and (found.split("train")[0].meta, found.split("train")[0].label) == (pair.meta, None)


@pytest.mark.parametrize("labels", [("dog", None), (None, "dog")])
def test_either_all_samples_have_a_class_or_none_has(tmp_path: Path, labels: tuple[str | None, ...]) -> None:
    pairs = [Pair(f"{i}", IMAGE, {}, label=label) for i, label in enumerate(labels)]
    with pytest.raises(ValueError, match="either all samples have one or none has"):
        write_dataset(tmp_path / "set", {"train": pairs})
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("label", ["", " ", "two\nlines"])
def test_a_class_is_one_line_of_text(tmp_path: Path, label: str) -> None:
    with pytest.raises(ValueError, match="a class is one line of text"):
        write_dataset(tmp_path / "set", {"train": [Pair("a", IMAGE, {}, label=label)]})


@pytest.mark.parametrize("change", [{"labels": ["cat"]}, {"labels": ["cat", "dogs"]}])
def test_a_class_that_the_data_set_does_not_list_is_damage(tmp_path: Path, change: dict) -> None:
    write_dataset(tmp_path / "set", {"train": [Pair("a", IMAGE, {}, label="dog")]})
    path = tmp_path / "set" / SPEC_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"sample 'a' is damaged .*label 'dog' is not one of those of data\.json"):
        DataSet.open(tmp_path / "set").split("train")[0]


def test_a_sample_without_its_class_is_damage(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", {"train": [Pair("a", IMAGE, {})]})
    path = tmp_path / "set" / SPEC_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": ["cat"]}))
    with pytest.raises(DataError, match="sample 'a' is damaged"):
        DataSet.open(tmp_path / "set").split("train")[0]


def test_folders_of_classes_need_no_captions_and_what_has_no_class_is_named(folders: Path, tmp_path: Path) -> None:
    assert main(["make_dataset", "folder", str(folders), "--labels", "--out", str(tmp_path / "set")]) == 0
    dataset = DataSet.open(tmp_path / "set")
    assert dataset.labels == ("cat", "dog") and dataset.languages == ("en",)
    assert classes_of(dataset) == {
        "cat__1": "cat", "cat__2": "cat", "cat__3": "cat", "dog__1": "dog", "dog__2": "dog", "dog__deep__3": "dog",
    }  # fmt: skip
    assert "stray.png,missing class" in (tmp_path / "set" / "rejected.csv").read_text()
    report = (tmp_path / "set" / "report.txt").read_text()
    assert "Classes (2 classes)" in report
    assert "<b>dog</b>" in (tmp_path / "set" / "report.html").read_text()


def test_classes_are_kept_only_where_they_are_asked_for(folders: Path, tmp_path: Path) -> None:
    command = ["make_dataset", "folder", str(folders), "--no-captions", "--out", str(tmp_path / "set")]
    assert main(command) == 0
    dataset = DataSet.open(tmp_path / "set")
    assert dataset.labels == () and len(classes_of(dataset)) == 7 and set(classes_of(dataset).values()) == {None}
    assert "labels" not in (tmp_path / "set" / "report.txt").read_text()


def test_a_table_has_a_column_of_classes(folders: Path, tmp_path: Path, fails) -> None:
    rows = ["image,class", "dog/1.png,7", "cat/1.png,cat", "cat/2.png, "]
    (folders / "t.csv").write_text("\n".join(rows) + "\n")
    command = ["make_dataset", "table", folders / "t.csv", "--out", tmp_path / "set", "--label-column"]
    assert main([*map(str, command), "class"]) == 0
    assert classes_of(DataSet.open(tmp_path / "set")) == {"dog__1": "7", "cat__1": "cat"}
    assert "t.csv row 3,missing class" in (tmp_path / "set" / "rejected.csv").read_text()
    told = fails(*command[:3], "--out", tmp_path / "other", "--label-column", "kind")
    assert "no column 'kind'; it has: image, class" in told and "--label-column NAME" in told


def test_tars_have_classes_in_files_of_their_own_or_in_json(tmp_path: Path) -> None:
    four, six = (json.dumps({"label": number}).encode() for number in (4, 6))
    contents = {"a": {"cls": b"3\n"}, "b": {"json": four}, "c": {"cls": b"5", "json": six}, "d": {}}
    path = write_tar(tmp_path / "x.tar", contents)
    found = {item.key: item.label for item in tar_items([str(path)], language="en", split=None, labelled=True)}
    assert found == {"a": "3\n", "b": "4", "c": "5", "d": None}
    unasked = list(tar_items([str(path)], language="en", split=None))
    assert {item.label for item in unasked} == {None} and unasked[0].notes == ("unused member .cls",)
    assert main(["make_dataset", "webdataset", str(path), "--labels", "--out", str(tmp_path / "set")]) == 0
    dataset = DataSet.open(tmp_path / "set")
    assert classes_of(dataset) == {"a": "3", "b": "4", "c": "5"} and dataset.labels == ("3", "4", "5")


def test_a_stream_gives_the_classes_of_its_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", {"a": {"cls": b"dog\n"}, "b": {"json": b'{"label": "cat"}'}})
    write_tar(tmp_path / "x-1.tar", {"c": {}})
    config = StreamConfig(urls=(f"{tmp_path}/x-{{0..1}}.tar",), samples_per_shard=2, shuffled_shards=2)
    stream = Stream(config, seed=0)
    assert {stream[i].key: stream[i].label for i in range(8)} == {"a": "dog", "b": "cat", "c": None}


@pytest.mark.parametrize("by", ["shape", "colour"])
def test_drawn_classes_are_of_single_objects_and_true(by: str, tmp_path: Path) -> None:
    dataset = build_shapes(tmp_path / "set", counts={"train": 60, "val": 5, "unseen": 5}, labels=by)
    assert dataset.spec.source["labels"] == by
    for name in ("train", "val", "unseen"):
        for pair in dataset.split(name):
            (thing,) = pair.meta["scene"]["objects"]
            assert pair.label == thing[by] and pair.captions
            assert bool(pair.meta["held_out"]) == (name == "unseen")
    assert len(dataset.labels) == {"shape": 8, "colour": 10}[by]


def test_drawn_classes_are_reproducible(tmp_path: Path) -> None:
    a, b = (list(labelled_pairs("shape", "train", n, 3, 32)) for n in (5, 9))
    assert [(pair.key, pair.captions, pair.meta, pair.label) for pair in a] == [
        (pair.key, pair.captions, pair.meta, pair.label) for pair in b[:5]
    ]


def test_classes_of_another_style_are_refused(tmp_path: Path, fails) -> None:
    told = fails("make_dataset", "shapes", "--style", "beach", "--labels", "shape", "--out", tmp_path / "set")
    assert "classes by shape are of the plain style, found beach" in told
    assert not (tmp_path / "set").exists()


def test_every_entry_of_a_class_is_a_sample_or_a_named_rejection(tmp_path: Path) -> None:
    items = [Item(f"{i}", f"{i}", noise(i), {}, label=label) for i, label in enumerate([" a\tb ", None, "", "\0", "c"])]
    config = BuildConfig(val_share=0.0, labelled=True, captions_required=False)
    dataset = build_dataset(tmp_path / "set", items, config, source={})
    assert Counter(classes_of(dataset).values()) == {"a b": 1, "c": 1}
    rejected = (tmp_path / "set" / "rejected.csv").read_text()
    assert rejected.count("missing class") == 2 and "class holds a NUL" in rejected

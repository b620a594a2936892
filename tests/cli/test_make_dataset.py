"""`make_dataset` from the command line: every source, and wrong input in one or two lines with exit code 2."""

import io
import json
import tarfile
from pathlib import Path

import emoji
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from vqt2i.cli import main
from vqt2i.data.shards import DataSet


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)


def make(*arguments: object) -> int:
    return main(["make_dataset", *map(str, arguments)])


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one or two lines told for arguments that cannot work."""
    capsys.readouterr()
    try:
        code = make(*arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    told = capsys.readouterr().err
    assert code == 2 and "Traceback" not in told
    lines = [line for line in told.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(8):
        save_image(folder / f"{'ab'[i % 2]}" / f"{i // 2}.png", i)
        (folder / f"{'ab'[i % 2]}" / f"{i // 2}.txt").write_text(f"picture {i}\nphoto {i}")
    (folder / "a" / "0.zh.txt").write_text("照片")
    return folder


def test_folder(photos: Path, tmp_path: Path) -> None:
    assert make("folder", photos, "--out", tmp_path / "set", "--size", 8, "--val-share", 0.2) == 0
    data = DataSet.open(tmp_path / "set")
    assert data.spec.image_size_px == 8 and data.languages == ("en", "zh")
    pairs = {pair.key: pair for split in ("train", "val") for pair in data.split(split)}
    assert sorted(pairs) == [f"{folder}__{i}" for folder in "ab" for i in range(4)]
    assert pairs["a__0"].captions == {"en": ("picture 0", "photo 0"), "zh": ("照片",)}
    assert data.spec.source["options"] == {"size_px": 8, "val_share": 0.2}


def test_folder_without_captions(tmp_path: Path) -> None:
    save_image(tmp_path / "photos" / "1.jpg", 1)
    assert make("folder", tmp_path / "photos", "--out", tmp_path / "set", "--no-captions", "--format", "jpg") == 0
    assert DataSet.open(tmp_path / "set").split("train")[0].captions == {}
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as tar:
        assert tar.getnames() == ["1.jpg", "1.json"]


def test_the_language_of_a_folder_can_be_said(photos: Path, tmp_path: Path) -> None:
    assert make("folder", photos, "--out", tmp_path / "set", "--language", "fr") == 0
    assert DataSet.open(tmp_path / "set").languages == ("fr", "zh")


def test_table_with_columns_of_two_languages(photos: Path, tmp_path: Path) -> None:
    rows = [{"file": f"photos/a/{i}.png", "said": f"photo {i}", "zh": f"照片 {i}"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["--image-column", "file", "--caption-column", "zh=zh", "--caption-column", "said"]
    assert make("table", tmp_path / "t.jsonl", *columns, "--out", tmp_path / "set", "--val-share", 0) == 0
    data = DataSet.open(tmp_path / "set")
    assert data.languages == ("zh", "en")
    assert data.split("train")[2].captions == {"zh": ("照片 2",), "en": ("photo 2",)}


def test_table_without_captions(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\nphotos/a/0.png\nphotos/a/1.png\n")
    assert make("table", tmp_path / "t.csv", "--no-captions", "--out", tmp_path / "set") == 0
    assert DataSet.open(tmp_path / "set").languages == ()


def test_webdataset_reads_a_data_set_of_ours_into_an_equal_one(photos: Path, tmp_path: Path) -> None:
    assert make("folder", photos, "--out", tmp_path / "one", "--val-share", 0.3, "--shard-size", 2) == 0
    first = DataSet.open(tmp_path / "one")
    last = len(first.spec.splits["train"].shards) - 1
    train = tmp_path / "one" / f"train-{{000000..{last:06d}}}.tar"
    vals = sorted((tmp_path / "one").glob("val-*.tar"))
    assert make("webdataset", train, "--val", *vals, "--out", tmp_path / "two", "--shard-size", 2) == 0
    assert DataSet.open(tmp_path / "two").fingerprint == first.fingerprint


def test_webdataset_goes_on_after_a_truncated_tar(photos: Path, tmp_path: Path) -> None:
    assert make("folder", photos, "--out", tmp_path / "one", "--val-share", 0) == 0
    content = (tmp_path / "one" / "train-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    assert make("webdataset", tmp_path / "cut.tar", "--out", tmp_path / "two") == 0
    assert 0 < sum(split.n_samples for split in DataSet.open(tmp_path / "two").spec.splits.values()) < 8
    assert "damaged shard" in (tmp_path / "two" / "rejected.csv").read_text()


def test_shapes(tmp_path: Path) -> None:
    assert make("shapes", "--out", tmp_path / "set", "--n-train", 5, "--n-val", 2, "--n-unseen", 1, "--size", 64) == 0
    data = DataSet.open(tmp_path / "set")
    assert {name: split.n_samples for name, split in data.spec.splits.items()} == {"train": 5, "val": 2, "unseen": 1}
    assert data.spec.image_size_px == 64


def test_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "EMOJI_DATA", dict(list(emoji.EMOJI_DATA.items())[:200]))  # enough, and quick
    assert make("emoji", "--out", tmp_path / "set", "--languages", "zh,en", "--size", 16) == 0
    data = DataSet.open(tmp_path / "set")
    assert data.languages == ("zh", "en") and data.spec.image_size_px == 16
    assert 100 < len(data.split("train")) < 200 and 0 < len(data.split("val")) < 20


def test_the_share_truncated_is_reported(photos: Path, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["picture photo"] * 9), model_writer=model, vocab_size=20, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "small.model").write_bytes(model.getvalue())
    options = ["--tokenizer", tmp_path / "small.model", "--text-length", 1]
    assert make("folder", photos, "--out", tmp_path / "set", *options) == 0
    report = (tmp_path / "set" / "report.txt").read_text()
    assert "more than 1 ids with small.model" in report and "100.0%" in report


def test_nothing_usable_exits_2_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    told = fails(capsys, "folder", tmp_path / "photos", "--out", tmp_path / "set")
    assert "nothing usable; rejected: empty file (1). The first: a.png" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_wrong_input_is_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = ["--out", tmp_path / "set"]
    (tmp_path / "t.csv").write_text("file,text\na.png,x\n")
    for arguments, expected in [
        (["folder", tmp_path / "absent", *out], "absent: no such folder"),
        (["table", tmp_path / "absent.csv", *out], "absent.csv: no such file"),
        (["table", tmp_path / "t.csv", *out], "no column 'image'; it has: file, text"),
        (["table", tmp_path / "t.csv", *out, "--caption-column", "a", "--caption-column", "b"], "give LANG=NAME"),
        (["webdataset", tmp_path / "absent.tar", *out], "shard cannot be opened"),
        (["webdataset", "a.tar", "--val", "b.tar", "--val-share", 0.1, *out], "--val and --val-share"),
        (["folder", photos, *out, "--val-share", 2], "val_share"),
        (["folder", photos, *out, "--size", 0], "size_px"),
        (["folder", photos, *out, "--size", "big"], "--size"),
        (["folder", photos, *out, "--max-pixels", 10**12], "max_pixels"),
        (["folder", photos, *out, "--shard-size", 0], "shard_size"),
        (["folder", photos, *out, "--language", "English"], "expected a language code such as en"),
        (["folder", photos, *out, "--sise", 8], "--sise"),
        (["folder", photos, *out, "--text-length", 8], "--text-length needs --tokenizer"),
        (["folder", photos, *out, "--tokenizer", tmp_path / "absent.model"], "absent.model"),
        (["folder", photos], "--out"),
        (["folder", photos, "--out", photos], "exists already"),
        (["shapes", *out, "--n-train", 0], "--n-train 0"),
        (["shapes", *out, "--size", 33], "cannot draw 33 px"),
        (["shapes", *out, "--n-train", 2, "--shard-size", 0], "shard_size"),
        (["emoji", *out, "--languages", "en,xx"], "no emoji names in 'xx'"),
        (["emoji", *out, "--font", tmp_path / "absent.ttf"], "absent.ttf"),
        (["mystery", *out], "mystery"),
    ]:
        assert expected in fails(capsys, *arguments)
        assert not (tmp_path / "set").exists()

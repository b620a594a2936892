"""The trainings, `encode_dataset` and `make_pipeline` from the command line."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from vqt2i.checkpoint import read_card
from vqt2i.cli import main
from vqt2i.data.shards import DataSet
from vqt2i.data.store import TokenStore
from vqt2i.text import TextTokenizer
from vqt2i.training.checkpoints import CheckpointFile

RUN = "trainer={max_steps: 2, batch_size: 4, validate_every_steps: 2, n_validation_samples: 4, precision: fp32}"
TRANSFORMER = "{width: 32, n_layers: 1, n_heads: 2, mlp_width: 48}"


@pytest.fixture
def arguments(tiny_dataset: DataSet, model_folders: Path, in_empty_folder: Path) -> dict[str, list[str]]:
    """What makes each training small, in an empty folder with a copy of the data set and the text tokenizer."""
    shutil.copytree(tiny_dataset.folder, "set", ignore=shutil.ignore_patterns("store-*"))
    shutil.copy(model_folders / "text" / "text.model", "text.model")
    Path("empty.yaml").touch()
    settings = {
        "train_vqgan": ["model={image_size_px: 16, channels: [8, 16]}", "model.quantizer.codebook_size=16"],
        "train_gpt": ["text_tokenizer=text.model", f"transformer={TRANSFORMER}"],
        "train_clip": [
            "text_tokenizer=text.model", f"vision={TRANSFORMER}", f"text={TRANSFORMER}", "image_size_px=16",
        ],
    }  # fmt: skip
    return {
        verb: ["--config", "empty.yaml"] + [word for s in [RUN, "data.path=set", *more] for word in ("--set", s)]
        for verb, more in settings.items()
    }


def test_the_verbs_find_what_the_ones_before_them_made(arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train_vqgan", *arguments["train_vqgan"]]) == 0
    assert main(["encode_dataset", "--data", "set", "--text", "text.model"]) == 0
    assert "image tokenizer: runs/vqgan/model" in capsys.readouterr().err
    assert main(["train_gpt", *arguments["train_gpt"]]) == 0
    assert "encoding" not in capsys.readouterr().err  # the store beside the data set was found
    assert main(["train_clip", *arguments["train_clip"]]) == 0
    assert main(["generate", "--rerank", "2"]) == 0
    told = capsys.readouterr()
    assert "pipeline: text text.model, vq runs/vqgan/model, gpt runs/gpt/model, clip runs/clip/model" in told.err
    assert main(["make_pipeline", "--out", "bound", "--prompt", "红", "--guidance", "4"]) == 0
    assert "bound: " in capsys.readouterr().out
    shutil.rmtree("runs")
    assert main(["generate", "--model", "bound", "--out", "o"]) == 0
    request = json.loads(Path("o/request.json").read_text(encoding="utf-8"))
    assert request["prompts"] == ["红"] and request["settings"]["guidance"] == 4


def test_the_newest_run_is_taken_and_resume_goes_on_with_it(arguments) -> None:
    for _ in range(2):
        assert main(["train_vqgan", *arguments["train_vqgan"]]) == 0
    assert main(["train_gpt", *arguments["train_gpt"]]) == 0
    assert read_card(Path("runs/gpt/model"))["image_tokenizer"]["path"] == "runs/vqgan-2/model"
    longer = ["--resume", "--set", "trainer.max_steps=4"]
    assert main(["train_gpt", *arguments["train_gpt"], *longer]) == 0
    assert read_card(Path("runs/gpt/model"))["steps"] == 4
    assert sorted(path.name for path in Path("runs").iterdir()) == ["gpt", "vqgan", "vqgan-2"]


def test_resume_takes_a_run_a_checkpoint_or_never(arguments) -> None:
    clip = ["train_clip", *arguments["train_clip"]]
    for more in ([], ["--resume", "never"], ["--resume", "runs/clip"], ["--resume"]):
        assert main([*clip, *more]) == 0
    # the second and the last, which found the newest finished, began new runs
    assert sorted(path.name for path in Path("runs").iterdir()) == ["clip", "clip-2", "clip-3"]
    checkpoint = "runs/clip-2/checkpoints/step-00000002.ckpt"
    assert main([*clip, "--set", "trainer.max_steps=4", "--resume", checkpoint]) == 0
    assert read_card(Path("runs/clip-2/model"))["steps"] == 4


def test_a_full_disk_is_told_without_a_traceback(arguments, fails, monkeypatch) -> None:
    def save(self, checkpoint, path, storage_options=None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CheckpointFile, "save_checkpoint", save)
    told = fails("train_clip", *arguments["train_clip"])
    assert "step-00000002.ckpt: cannot be written: [Errno 28] No space left" in told
    assert list(Path("runs/clip/checkpoints").iterdir()) == []


def test_a_tokenizer_is_trained_on_captions_and_lines(arguments) -> None:
    Path("lines.txt").write_text("a white cloud\n白云\n", encoding="utf-8")
    options = ["--data", "set", "--text", "lines.txt", "--vocabulary-size", "320", "--out", "own/own.model"]
    assert main(["train_tokenizer", *options]) == 0
    card = json.loads(Path("own/own.json").read_text())
    assert card["corpus_captions"] == {"lines.txt": 2, "set": 24 * 3}
    tokenizer = TextTokenizer.load(Path("own"))
    assert card["fingerprint"] == tokenizer.fingerprint and len(tokenizer.encode("square")) == 1


def test_a_store_is_put_where_it_is_asked_for(arguments, model_folders: Path) -> None:
    options = ["--data", "set", "--text", "text.model", "--vq", str(model_folders / "vq"), "--splits", "val"]
    assert main(["encode_dataset", *options, "--out", "mine"]) == 0
    assert {name: split.n_samples for name, split in TokenStore.open(Path("mine")).spec.splits.items()} == {"val": 7}


def test_train_gpt_makes_the_variants_that_it_is_told_to_draw_from(arguments, model_folders: Path) -> None:
    vq = ["--vq", str(model_folders / "vq")]
    assert main(["train_gpt", *arguments["train_gpt"], *vq, "--set", "data.variants=flip"]) == 0
    (folder,) = Path("set").glob("store-*-flip")
    assert TokenStore.open(folder).split("train").n_variants == 2
    options = ["--data", "set", "--text", "text.model", "--variants", "flip"]
    assert main(["encode_dataset", *vq, *options]) == 0  # finds it done


@pytest.mark.parametrize("more", [[], ["--store", "set/store", "--workers", "1", "--split", "val"]])
def test_benchmark_data_prints_sequences_a_second(more: list[str], arguments, model_folders: Path, capsys) -> None:
    options = ["--data", "set", "--text", "text.model", "--vq", str(model_folders / "vq"), "--out", "set/store"]
    assert main(["encode_dataset", *options]) == 0
    assert main(["benchmark", "data", "--batch-size", "8", "--seconds", "0.05", *more]) == 0
    assert re.match(r"[\d,]+ sequences/s \(median of 10; ", capsys.readouterr().out)


def test_benchmark_tells_what_is_wrong(fails, in_empty_folder: Path) -> None:
    assert "--batch-size: found 0, expected 1 or more" in fails("benchmark", "data", "--batch-size", "0")
    assert "none/store.json" in fails("benchmark", "data", "--store", "none")


TRAININGS = pytest.mark.parametrize("verb", ["train_vqgan", "train_gpt", "train_clip"])


@TRAININGS
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--set", "trainer.max_step=3"], "trainer.max_step: unknown key, did you mean 'max_steps'?"),
        (["--set", "trainer.max_steps=0"], "trainer.max_steps: Input should be greater than 0 (found 0)"),
        (["--set", "trainer.batch_size=many"], "trainer.batch_size"),
        (["--set", "trainer"], "expected KEY=VALUE"),
        (["--set", "training.optimizer.learning_rate=-1"], "training.optimizer.learning_rate"),
        (["--set", "data.path=nowhere"], "nowhere: no such folder"),
        (["--set", "data.train_split=x"], "no split 'x'; it has train, val"),
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["--resume", "runs/none"], "--resume runs/none: no such run"),
    ],
)
def test_wrong_settings_are_told_and_leave_no_run(
    verb: str, more: list[str], told: str, arguments, fails, model_folders: Path
) -> None:
    vq = ["--vq", model_folders / "vq"] if verb == "train_gpt" else []
    assert told in fails(verb, *arguments[verb], *vq, *more)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("verb", "more", "told"),
    [
        ("train_gpt", ["--vq", "none"], "none: no such model folder"),
        ("train_gpt", ["--vq", "gpt"], "not a model of the kind expected"),
        ("train_gpt", ["--set", "text_tokenizer=none.model"], "none.model: No such file"),
        ("train_gpt", ["--set", "text_tokenizer=empty.yaml"], "not a SentencePiece model"),
        ("train_gpt", ["--deepspeed", "none.json"], "none.json: No such file"),
        ("train_clip", ["--set", "text_tokenizer=none.model"], "none.model: No such file"),
        ("train_clip", ["--set", "patch_size_px=5"], "must be a multiple of patch_size_px"),
        ("train_clip", ["--set", "vision.width=31"], "must be n_heads"),
    ],
)
def test_missing_and_unfit_parts_are_told(
    verb: str, more: list[str], told: str, arguments, fails, model_folders: Path
) -> None:
    Path("gpt").symlink_to(model_folders / "gpt")
    vq = ["--vq", model_folders / "vq"] if verb == "train_gpt" and "--vq" not in more else []
    assert told in fails(verb, *arguments[verb], *vq, *more)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "set", "--splits", "train,test"], "no split 'test'"),
        (["--data", "set", "--text", "none.model"], "none.model"),
        (["--data", "set", "--out", "set"], "set: exists already"),
        (["--data", "set", "--variants", "mirror"], "variants: Input should be 'centre', 'flip', 'five-crop'"),
        (["--data", "set", "--workers", "-1"], "--workers -1: expected 0 or more"),
    ],
)
def test_encode_dataset_tells_what_is_wrong(options: list, told: str, arguments, fails, model_folders: Path) -> None:
    given = options if "--text" in options else [*options, "--text", "text.model"]
    assert told in fails("encode_dataset", "--vq", model_folders / "vq", *given)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "a.txt"], "ends in .model"),
        (["--text", "none.txt", "--out", "a.model"], "none.txt"),
        (["--text", "empty.yaml", "--out", "a.model"], "no captions"),
        (["--data", "set", "--vocabulary-size", "0", "--out", "a.model"], "vocabulary_size"),
        (["--data", "set", "--vocabulary-size", "100", "--out", "a.model"], "ask for"),
        (["--data", "set", "--character-coverage", "2", "--out", "a.model"], "character_coverage"),
    ],
)
def test_train_tokenizer_tells_what_is_wrong(options: list[str], told: str, arguments, fails) -> None:
    assert told in fails("train_tokenizer", *options)
    assert not Path("a.model").exists()


def test_make_pipeline_tells_what_is_wrong(fails, in_empty_folder: Path, model_folders: Path) -> None:
    assert "none: no such folder" in fails("make_pipeline", "--model", "none", "--out", "o")
    (in_empty_folder / "full").mkdir()
    (in_empty_folder / "full" / "a").touch()
    assert "full: exists already" in fails("make_pipeline", "--model", model_folders, "--out", "full")
    assert "top_p" in fails("make_pipeline", "--model", model_folders, "--out", "o", "--top-p", "3")
    assert not (in_empty_folder / "o").exists()

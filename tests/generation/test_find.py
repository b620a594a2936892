"""Which parts are used when none is named."""

import os
import shutil
from pathlib import Path

import pytest

from vqt2i.checkpoint import CARD, read_card
from vqt2i.errors import CheckpointError
from vqt2i.files import write_json
from vqt2i.generation import find
from vqt2i.generation.find import find_image_tokenizer, find_parts, open_pipeline, trained_models


def put_run(runs: Path, name: str, model: Path, age: int, **card: object) -> Path:
    """A run folder with a copy of a model, as old as `age` seconds after the epoch."""
    folder = runs / name / "model"
    shutil.copytree(model, folder)
    write_json(folder / CARD, read_card(folder) | card)
    os.utime(folder / CARD, (age, age))
    return folder


@pytest.fixture
def runs(tmp_path: Path, model_folders: Path) -> Path:
    """Runs of a whole pipeline, the GPT naming the parts that made its ids."""
    runs, data = tmp_path / "runs", {"path": "d", "fingerprint": "d"}
    vq = put_run(runs, "vqgan", model_folders / "vq", 1)
    text = model_folders / "text" / "text.model"
    names = {
        "data": data,
        "image_tokenizer": {"path": str(vq), "fingerprint": read_card(vq)["fingerprint"]},
        "text_tokenizer": {"path": str(text), "fingerprint": "t"},
    }
    put_run(runs, "gpt", model_folders / "gpt", 2, **names)
    put_run(runs, "clip", model_folders / "clip", 3, data=data, text_tokenizer=names["text_tokenizer"])
    return runs


def test_models_are_found_by_kind_newest_first(runs: Path, model_folders: Path) -> None:
    put_run(runs, "vqgan-2", model_folders / "vq", 9)
    (runs / "unfinished").mkdir()
    found = {kind: [path.parent.name for path in folders] for kind, folders in trained_models(runs).items()}
    assert found == {"vqgan": ["vqgan-2", "vqgan"], "gpt": ["gpt"], "clip": ["clip"]}
    assert trained_models(runs / "none") == {}


def test_the_newest_image_tokenizer_is_taken_unless_one_is_named(runs: Path, model_folders: Path, capsys) -> None:
    newest = put_run(runs, "vqgan-2", model_folders / "vq", 9)
    folder, vq = find_image_tokenizer(None, runs)
    assert folder == newest and vq.fingerprint == read_card(newest)["fingerprint"]
    assert f"image tokenizer: {newest}\n" in capsys.readouterr().err
    assert find_image_tokenizer(model_folders / "vq", runs)[0] == model_folders / "vq"


def test_the_newest_gpt_comes_with_the_parts_it_names(runs: Path, model_folders: Path, capsys) -> None:
    parts, _ = find_parts(None, runs)
    assert parts == {
        "text": model_folders / "text" / "text.model", "vq": runs / "vqgan" / "model", "gpt": runs / "gpt" / "model",
        "clip": runs / "clip" / "model",
    }  # fmt: skip
    assert str(runs / "gpt" / "model") in capsys.readouterr().err
    assert find_parts(str(runs / "gpt"), runs)[0] == parts == find_parts(str(runs / "gpt" / "model"), runs)[0]
    assert open_pipeline(None, runs, "cpu").clip is not None


def test_an_image_tokenizer_that_was_moved_is_found_by_its_fingerprint(runs: Path) -> None:
    (runs / "vqgan").rename(runs / "elsewhere")
    assert find_parts(None, runs)[0]["vq"] == runs / "elsewhere" / "model"


def test_an_image_tokenizer_that_was_replaced_or_removed_is_told(runs: Path) -> None:
    card = read_card(runs / "vqgan" / "model")
    write_json(runs / "vqgan" / "model" / CARD, card | {"fingerprint": "another"})
    with pytest.raises(CheckpointError, match=rf"its image tokenizer {card['fingerprint'][:8]} .* is gone"):
        find_parts(None, runs)


@pytest.mark.parametrize(
    "other", [{"data": {"path": "e", "fingerprint": "e"}}, {"text_tokenizer": {"path": "x", "fingerprint": "x"}}]
)
def test_a_scorer_of_other_data_or_another_text_tokenizer_is_not_taken(runs: Path, other: dict) -> None:
    folder = runs / "clip" / "model"
    write_json(folder / CARD, read_card(folder) | other)
    assert find_parts(None, runs)[0]["clip"] is None


def test_with_nothing_trained_the_shipped_pipeline_is_used_and_said(
    tmp_path: Path, model_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("drawn", "trained"):
        shutil.copytree(model_folders, tmp_path / "shipped" / name)
    monkeypatch.setattr(find, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(find, "DRAWN_BY", "drawn")
    monkeypatch.setattr(find, "TRAINED_WITH", "trained")
    for model, name in ((None, "drawn"), ("drawn", "drawn"), ("trained", "trained")):
        pipeline = open_pipeline(model, tmp_path / "runs", "cpu")
        assert pipeline.config.example_prompts == ("a red square",)
        assert f"pipeline: {name} (shipped" in capsys.readouterr().err
    folder, _ = find_image_tokenizer(None, tmp_path / "runs")
    assert folder == tmp_path / "shipped" / "trained" / "vq"
    with pytest.raises(CheckpointError, match=r"flowers: no such folder.*\(shipped: drawn, trained\)"):
        open_pipeline("flowers", tmp_path / "runs")

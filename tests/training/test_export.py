"""Any checkpoint of a run becomes the model folder that the run wrote after it. DeepSpeed's: in their own test."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from vqt2i.checkpoint import WEIGHTS, CheckpointError, read_card, save_model
from vqt2i.cli import main
from vqt2i.training.checkpoints import checkpoint_path
from vqt2i.training.export import export_checkpoint

EVERY_STEPS = ["trainer.checkpoint_every_steps=4", "trainer.keep_last=9"]


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which what runs export is kept: STAGE-STEP."""

    def save(path: Path, module: torch.nn.Module, config: object, card: dict) -> str:
        fingerprint = save_model(path, module, config, card)
        shutil.copytree(path, tmp_path / "exports" / f"{card['kind']}-{card['steps']}")
        return fingerprint

    monkeypatch.setattr("vqt2i.training.run.save_model", save)
    return tmp_path / "exports"


@pytest.mark.parametrize("stage", ["vqgan", "gpt", "clip", "prior"])
def test_every_checkpoint_is_exported_as_the_run_itself_did(stage: str, train, exports: Path, tmp_path: Path) -> None:
    run = train(stage, *EVERY_STEPS)
    for step in (4, 8, 10):
        expected, found = exports / f"{stage}-{step}", tmp_path / f"out-{step}"
        fingerprint = export_checkpoint(run, step, found)
        assert (found / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
        card, new = read_card(expected), read_card(found)
        assert new.pop("checkpoint") == str(checkpoint_path(run, step)) and card.pop("seconds") > 0
        assert fingerprint == card["fingerprint"] and new.pop("command").startswith("python ") and card.pop("command")
        assert new == card


def test_the_card_tells_which_start_of_a_run_made_the_checkpoint(train, tmp_path: Path) -> None:
    train("clip", *EVERY_STEPS, "trainer.max_steps=4")
    run = train("clip", *EVERY_STEPS, resume="auto")
    record = json.loads((run / "run.json").read_text())
    for start, command in zip(record["starts"], ("python first", "python second"), strict=True):
        start["command"] = command
    (run / "run.json").write_text(json.dumps(record))
    cards = {}
    for step in (4, 8):
        export_checkpoint(checkpoint_path(run, step), None, tmp_path / str(step))
        cards[step] = read_card(tmp_path / str(step))
    assert [cards[step]["command"] for step in (4, 8)] == ["python first", "python second"]
    assert "resumed_from" not in cards[4] and [part["steps"] for part in cards[8]["resumed_from"]] == [4]


def test_the_command_line_takes_the_newest_a_step_or_a_checkpoint_and_says_which(
    train, fails, capsys, tmp_path: Path
) -> None:
    run = train("clip", *EVERY_STEPS)
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "newest")]) == 0
    assert "there are those of steps 4, 8, 10; taking the newest" in capsys.readouterr().err
    named = run / "checkpoints" / "step-00000004"
    assert main(["export", str(named), "--out", str(tmp_path / "named")]) == 0
    assert main(["export", str(run), "--step", "4", "--out", str(tmp_path / "step")]) == 0
    steps = {name: read_card(tmp_path / name)["steps"] for name in ("newest", "named", "step")}
    assert steps == {"newest": 10, "named": 4, "step": 4}
    told = fails("export", run, "--step", "5", "--out", tmp_path / "none")
    assert "no checkpoint of step 5; there are those of steps 4, 8, 10" in told
    assert "not of step 8" in fails("export", named, "--step", "8", "--out", tmp_path / "none")
    assert "expected a run folder" in fails("export", tmp_path / "nothing", "--out", tmp_path / "none")
    assert "exists already" in fails("export", run, "--out", tmp_path / "named")
    assert not (tmp_path / "none").exists()


def test_a_damaged_checkpoint_and_one_that_would_execute_something_are_refused(train, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    run = train("clip", *EVERY_STEPS)
    torch.save({"state_dict": Evil()}, checkpoint_path(run, 4))
    with pytest.raises(CheckpointError, match=r"loading it would execute posix\.mkdir"):
        export_checkpoint(run, 4, tmp_path / "out")
    checkpoint_path(run, 8).write_bytes(checkpoint_path(run, 8).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"damaged.*there are those of steps 4, 8, 10"):
        export_checkpoint(run, 8, tmp_path / "out")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_a_run_without_an_export_yet_is_told(train, tmp_path: Path) -> None:
    run = train("clip", "trainer.max_steps=1")
    shutil.rmtree(run / "model")
    with pytest.raises(CheckpointError, match=r"model: not there yet.*--resume"):
        export_checkpoint(run, None, tmp_path / "out")

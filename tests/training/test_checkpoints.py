"""Checkpoints: which stay, that they are whole or absent, and what happens when one is damaged."""

import csv
import errno
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.checkpoint import read_card
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import PARTIAL_PREFIX
from vqt2i.training.checkpoints import (
    FILES,
    CheckpointFile,
    checkpoint_path,
    checkpoints_in,
    damage,
    random_state,
    set_random_state,
    step_of,
)
from vqt2i.training.metrics import keep_metrics_before
from vqt2i.training.start import Start

CPU = torch.device("cpu")


def steps_in(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints_in(run)]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_the_newest_checkpoints_and_the_best_stay(train) -> None:
    run = train("clip", "trainer.validate_every_steps=2", "training.optimizer.learning_rate=0.3")
    with open(run / "metrics.csv", newline="") as file:
        losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}
    assert list(losses) == [2, 4, 6, 8, 10]
    best = min(losses, key=losses.get)
    assert best < 8, "the learning rate is to make it worse with time"
    assert steps_in(run) == sorted({best, 8, 10})
    told = json.loads((run / "checkpoints" / "best.json").read_text())
    assert told == {"checkpoint": checkpoint_path(run, best).name, "val/loss": losses[best]}


def test_checkpoints_have_their_own_interval_and_an_export_follows_each(train, monkeypatch) -> None:
    exported = []
    monkeypatch.setattr("vqt2i.training.run.save_model", lambda path, model, config, card: exported.append(card))
    run = train("clip", "trainer.checkpoint_every_steps=4", "trainer.keep_last=9")
    assert steps_in(run) == [4, 8, 10]
    assert [card["steps"] for card in exported[:3]] == [4, 8, 10]
    # metrics are those of the exported weights, so there are none where they were not validated
    assert exported[0]["metrics"] == exported[1]["metrics"] == {} and exported[2]["metrics"]


@pytest.mark.parametrize("step", [5, 8])  # with a validation, and between two
def test_a_full_disk_is_told_and_the_checkpoint_before_is_whole(
    step: int, train, weights, monkeypatch, tmp_path: Path
) -> None:
    settings = ["trainer.checkpoint_every_steps=1"]
    whole = weights(train("clip", *settings, runs=tmp_path / "whole"))

    def save(self, checkpoint, path, storage_options=None) -> None:
        if checkpoint["global_step"] == step:
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        torch.save(checkpoint, path)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as told:
        patch.setattr(CheckpointFile, "save_checkpoint", save)
        train("clip", *settings)
    assert "No space left on device" in str(told.value) and "MiB free" in str(told.value)
    run = tmp_path / "runs" / "clip"
    assert steps_in(run)[-2:] == [step - 2, step - 1] and read_card(run / "model")["steps"] == step - 1
    assert all(damage(path) is None for path in checkpoints_in(run))
    assert not list(run.rglob(f"{PARTIAL_PREFIX}*"))
    resumed = weights(train("clip", *settings, resume="auto"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("harm", [flip_a_byte, cut_short])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_gone_on_from(
    harm, train, weights, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("clip")
    whole = weights(run)
    newest = checkpoint_path(run, 10)
    harm(newest)
    capsys.readouterr()
    assert train("clip", resume="auto") == run
    told = capsys.readouterr().err
    assert f"{newest}: damaged" in told and "from step 5" in told
    assert (newest.parent / f"aside-{newest.name}").exists() and steps_in(run) == [5, 10]
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_a_run_without_a_whole_checkpoint_is_not_gone_on_with(train, capsys) -> None:
    run = train("clip", "trainer.max_steps=2")
    cut_short(checkpoint_path(run, 2))
    with pytest.raises(CheckpointError, match=r"step-00000002\.ckpt: damaged.*name another"):
        train("clip", resume=checkpoint_path(run, 2))
    with pytest.raises(CheckpointError, match="all its checkpoints are damaged"):
        train("clip", resume=run)
    assert train("clip", "trainer.max_steps=2", resume="auto").name == "clip-2"
    assert "starting anew" in capsys.readouterr().err


def test_a_folder_of_files_is_whole_only_with_all_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    parts = [folder / "checkpoint" / f"rank_{rank}.pt" for rank in range(2)]
    for part in parts:
        torch.save({"a": torch.arange(1000)}, part)
    assert "files.json" in damage(folder)
    (folder / FILES).write_text(json.dumps({f"checkpoint/{part.name}": part.stat().st_size for part in parts}))
    assert damage(folder) is None
    content = parts[1].read_bytes()
    flip_a_byte(parts[1])
    assert "rank_1.pt" in damage(folder)
    parts[1].write_bytes(content[:-1])
    assert damage(folder) == "checkpoint/rank_1.pt is missing or cut short"
    parts[1].unlink()
    assert damage(folder) == "checkpoint/rank_1.pt is missing or cut short"


def test_a_checkpoint_that_would_execute_something_is_not_loaded(train, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    run = train("clip", "trainer.max_steps=1")
    torch.save({"state_dict": {}, "callbacks": Evil()}, checkpoint_path(run, 1))
    with pytest.raises(CheckpointError, match=r"loading it would execute posix\.mkdir"):
        train("clip", resume=checkpoint_path(run, 1))
    assert not (tmp_path / "executed").exists()


def test_one_checkpoint_can_be_gone_on_from_and_later_ones_are_set_aside(train, weights, capsys) -> None:
    run = train("gpt", "trainer.checkpoint_every_steps=2", "trainer.keep_last=9", "transformer.dropout=0.1")
    whole = weights(run)
    settings = ["trainer.checkpoint_every_steps=4", "trainer.keep_last=9", "transformer.dropout=0.1"]
    with pytest.raises(ConfigError):  # refused, so nothing is set aside yet
        train("gpt", *settings, "trainer.seed=1", resume=checkpoint_path(run, 6))
    assert steps_in(run) == [2, 4, 6, 8, 10]
    assert train("gpt", *settings, resume=checkpoint_path(run, 6)) == run
    assert steps_in(run) == [2, 4, 6, 8, 10]
    assert sorted(path.name for path in (run / "checkpoints").glob("aside-*")) == [
        "aside-step-00000008.ckpt", "aside-step-00000010.ckpt",
    ]  # fmt: skip
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_what_a_killed_writer_left_is_removed(train) -> None:
    run = train("clip", "trainer.max_steps=1")
    left = [run / "checkpoints" / f"{PARTIAL_PREFIX}step-00000002.ckpt", run / f"{PARTIAL_PREFIX}model"]
    left[0].write_bytes(b"a part")
    left[1].mkdir()
    train("clip", "trainer.max_steps=2", resume=run)
    assert not any(path.exists() for path in left)


def test_a_run_killed_before_its_last_export_is_not_finished(train, weights, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("vqt2i.training.run.save_model", lambda *arguments: {}["killed"])
        train("clip", "trainer.max_steps=2")
    run = train("clip", "trainer.max_steps=2", resume="auto")
    assert run.name == "clip" and read_card(run / "model")["steps"] == 2


def test_random_states_come_back_through_a_file_that_executes_nothing() -> None:
    def draw() -> tuple:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    np.random.randn()  # leaves a second number for the next call
    file = io.BytesIO()
    torch.save(random_state(CPU), file)
    drawn = draw()
    assert draw() != drawn
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True), CPU)
    assert draw() == drawn


def test_rows_after_the_checkpoint_and_a_torn_one_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    keep_metrics_before(path, 3)
    assert not path.exists()
    path.write_text("step,train/loss,val/loss\r\n0,0.1,\r\n2,0.30000000000000004,\r\n2,,9\r\n3,1,\r\n1")
    keep_metrics_before(path, 3)
    assert path.read_text() == "step,train/loss,val/loss\n0,0.1,\n2,0.30000000000000004,\n2,,9\n"


def test_the_first_step_of_a_start_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    assert Start(tmp_path, None).step == 0 and Start(tmp_path, checkpoint_path(tmp_path, 70)).step == 70

import csv
import errno
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.training.gpt import GPTModule

LOG = ["trainer.log_every_steps=2", "trainer.checkpoint_every_steps=3"]
THROUGHPUT = {f"throughput/{name}" for name in ("samples_per_second", "tokens_per_second", "mfu", "memory_gb")}


class StopError(Exception):
    pass


def read(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def columns(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each column of metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in rows[0] if name != "step"
    }


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_train_batch_end(self, outputs, batch, batch_index) -> None:
        if self.global_step == step:
            raise StopError

    monkeypatch.setattr(GPTModule, "on_train_batch_end", on_train_batch_end)


def test_tensorboard_shows_the_metrics_the_throughput_and_the_pictures(train) -> None:
    run = train("gpt", *LOG)
    events, written = read(run), columns(run)
    assert set(events.Tags()["scalars"]) == written.keys() | THROUGHPUT
    for name, values in written.items():
        assert scalars(events, name) == values, name
    assert [step for step, _ in scalars(events, "throughput/mfu")] == [1, 3, 5, 7, 9]
    assert [event.step for event in events.Images("samples")] == [4, 9]
    assert [path.name.split(".")[0] for path in (run / "tensorboard").iterdir()] == ["events"]


def test_a_resumed_run_shows_no_step_twice(train, monkeypatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_after(8, patch)
        train("gpt", *LOG)
    run = train("gpt", *LOG, resume="auto")  # from step 6
    events, written = read(run), columns(run)
    assert scalars(events, "train/total") == written["train/total"]
    assert [step for step, _ in scalars(events, "train/total")] == [1, 3, 5, 7, 9]
    assert [event.step for event in events.Images("samples")] == [4, 9]
    whole = train("gpt", *LOG, runs=tmp_path / "whole")
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text(), "nothing in it tells the time"


def test_without_views_there_is_only_metrics_csv(train) -> None:
    run = train("clip", "trainer.max_steps=1", "trainer.log_to=[]")
    assert not (run / "tensorboard").exists() and (run / "metrics.csv").exists()


def test_wandb_that_is_not_installed_is_told_before_anything_is_written(train, monkeypatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    with pytest.raises(ConfigError, match=r"log_to: wandb is not installed; pip install 'vqt2i\[wandb\]'"):
        train("clip", "trainer.log_to=[wandb]")
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's writer is a thread
def test_a_disk_that_is_too_full_for_tensorboard_ends_the_run_and_it_can_be_gone_on_with(
    train, weights, monkeypatch, tmp_path: Path
) -> None:
    whole = weights(train("gpt", *LOG, runs=tmp_path / "whole"))
    full = []
    monkeypatch.setattr(GPTModule, "on_train_batch_end", lambda self, *_: full.extend([1] * (self.global_step == 7)))

    def write(self, data) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"No space left.*MiB free"):
        real = RecordWriter.write
        patch.setattr(RecordWriter, "write", lambda self, data: write(self, data) if full else real(self, data))
        train("gpt", *LOG)
    resumed = weights(train("gpt", *LOG, resume="auto"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

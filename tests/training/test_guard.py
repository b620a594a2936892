"""What each step is watched for: losses that are not finite, signals, ranks that die."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from safetensors.torch import load_file

import vqt2i
from vqt2i.checkpoint import read_card
from vqt2i.processes import STOPPED, Stopped
from vqt2i.training.checkpoints import checkpoints_in, damage, step_of
from vqt2i.training.clip import CLIPModule
from vqt2i.training.gpt import GPTModule
from vqt2i.training.guard import MAX_SAVED_BATCHES, StepGuard, TrainingError
from vqt2i.training.vqgan import VQGANModule

TOOLS = Path(vqt2i.__file__).parents[1] / "tools"
BEST = {"vqgan": "val/loss", "gpt": "val/image", "clip": "val/loss"}
ADVERSARIAL = "training.loss.adversarial={channels: 4, n_layers: 2, start_share: 0.0}"


def make_not_finite(module_class, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the batches of these steps (from 1) have inputs, or where those are ids weights, that are not numbers."""
    training_step = module_class.training_step

    def step(self, batch, batch_index):
        if self.global_step + 1 not in steps:
            return training_step(self, batch, batch_index)
        if batch.image is not None:
            return training_step(self, batch._replace(image=batch.image * float("nan")), batch_index)
        return training_step(self, batch, batch_index) * float("inf")

    monkeypatch.setattr(module_class, "training_step", step)


def state_of(module) -> dict[str, torch.Tensor]:
    """Everything that a step changes: weights, buffers, moments of the optimizers."""
    # the moving average moves on, towards weights that stay
    state = {name: value.clone() for name, value in module.state_dict().items() if "averaged" not in name}
    for i, optimizer in enumerate(module.trainer.optimizers):
        for j, parts in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {i} {j} {name}": value.clone() for name, value in parts.items()}
    return state


@pytest.mark.parametrize(
    ("stage", "module_class", "more"),
    [("vqgan", VQGANModule, []), ("vqgan", VQGANModule, [ADVERSARIAL]), ("gpt", GPTModule, []),
     ("gpt", GPTModule, ["training.optimizer.kind=muon"]), ("clip", CLIPModule, [])],
)  # fmt: skip
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_batch_saved(
    stage: str, module_class, more: list[str], train, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {}
    make_not_finite(module_class, [4], monkeypatch)

    def on_train_batch_start(self, batch, batch_index) -> None:
        states[self.global_step] = state_of(self)

    monkeypatch.setattr(module_class, "on_train_batch_start", on_train_batch_start)
    run = train(stage, *more, "trainer.log_every_steps=1", "trainer.max_steps=5")
    changed = {step: [name for name in states[step] if not torch.equal(states[step][name], states[step + 1][name])]
               for step in (2, 3)}  # fmt: skip
    assert changed[2] and changed[3] == []
    assert all(value.isfinite().all() for value in states[4].values())
    assert "step 4: loss or gradient not finite, update skipped (1 so far)" in capsys.readouterr().err
    batch = load_file(run / "nonfinite" / "step-00000004-rank-0.safetensors")
    assert batch["chance_B"].shape == (8,) and ("image" in batch or "image_ids" in batch)
    assert ("text.ids_BS" in batch) == (stage != "vqgan")
    with open(run / "metrics.csv", newline="") as file:
        counts = [
            row["train/skipped_steps"]
            for row in csv.DictReader(file)
            if row["train/lr" if stage != "clip" else "train/loss"]
        ]
    assert counts == ["", "", "", "", "1.0"]


def test_gradients_that_are_not_finite_are_skipped_too(train, weights, monkeypatch) -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    training_step = CLIPModule.training_step
    monkeypatch.setattr(CLIPModule, "training_step", lambda self, *batch: Overflow.apply(training_step(self, *batch)))
    run = train("clip", "trainer.max_steps=2")
    assert len(list((run / "nonfinite").iterdir())) == 2
    assert all(value.isfinite().all() for value in weights(run).values())


def test_too_many_in_a_row_end_the_run_with_the_reason(train, monkeypatch, tmp_path: Path) -> None:
    make_not_finite(CLIPModule, [2, 3, 5, 6, 7, 8], monkeypatch)
    with pytest.raises(
        TrainingError, match=r"runs/clip: .* not finite in 3 steps in a row, the last was 7; .*nonfinite"
    ):
        train("clip", "trainer.max_nonfinite_steps=3", "trainer.checkpoint_every_steps=2")
    run = tmp_path / "runs" / "clip"
    assert step_of(checkpoints_in(run)[-1]) == 6
    monkeypatch.undo()
    assert read_card(train("clip", "trainer.max_nonfinite_steps=1", resume=run) / "model")["steps"] == 10


def test_the_batches_saved_are_limited(train, monkeypatch) -> None:
    make_not_finite(CLIPModule, list(range(3, 20)), monkeypatch)
    run = train("clip", "trainer.max_steps=20")
    assert len(list((run / "nonfinite").iterdir())) == MAX_SAVED_BATCHES < 17


def test_a_second_interrupt_kills_at_once(tmp_path: Path, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(os, "kill", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(signal, "signal", lambda *arguments: done.append(arguments))
    guard = StepGuard(tmp_path, 3)
    guard._on_signal(signal.SIGINT, None)
    assert done == []
    guard._on_signal(signal.SIGINT, None)
    assert done == [(signal.SIGINT, signal.SIG_DFL), (os.getpid(), signal.SIGINT)]


def test_lightning_does_not_ask_the_ranks_before_each_step() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)  # which the guard puts out of action


def test_the_handlers_of_signals_are_those_before_when_a_run_has_ended(train) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train("clip", "trainer.max_steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_first_process_alone_ends_with_the_code(monkeypatch) -> None:
    assert Stopped().code == STOPPED == 75
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Stopped().code == 0


@pytest.fixture
def launch(overrides: dict[str, list[str]], tmp_path: Path):
    """launch(*settings): the scorer's training by its command, with too many steps to end by itself.

    Returns the process, in a session of its own, once it has written a checkpoint, and its run folder.
    """
    started = []

    def start(*settings: str) -> tuple[subprocess.Popen, Path]:
        (tmp_path / "empty.yaml").touch()
        values = [*overrides["clip"], "trainer.max_steps=100000", *settings]
        words = [word for value in values for word in ("--set", value)]
        command = [TOOLS / "train_clip.py", "--config", tmp_path / "empty.yaml", "--runs", tmp_path / "runs", *words]
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], start_new_session=True, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        run = tmp_path / "runs" / "clip"
        end = time.monotonic() + 600
        while not checkpoints_in(run):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        return process, run

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "devices"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_one_exit_code(number: int, devices: int, launch) -> None:
    process, run = launch(f"trainer.devices={devices}")
    os.kill(process.pid, number)  # the first rank alone: it tells the other
    _, told = process.communicate(timeout=600)
    assert process.returncode == STOPPED, told
    assert "Traceback" not in told and f"{signal.Signals(number).name}: finishing the step" in told
    newest = checkpoints_in(run)[-1]
    assert damage(newest) is None and f"stopped at step {step_of(newest):,}" in told
    assert read_card(run / "model")["steps"] == step_of(newest)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_other_ends_too(victim: int, launch) -> None:
    process, run = launch("trainer.devices=2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = [pid for pid in map(int, children) if b"train_clip" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    ranks = [process.pid, *second]
    assert len(ranks) == 2
    os.kill(ranks[victim], signal.SIGKILL)
    process.communicate(timeout=600)  # until both have closed standard error
    assert process.returncode != 0
    assert has_ended(ranks[1])
    assert damage(checkpoints_in(run)[-1]) is None

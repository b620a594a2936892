import csv
from pathlib import Path

import pytest
import torch

from vqt2i.checkpoint import read_card
from vqt2i.clip import CLIP
from vqt2i.training.clip import CLIPModule, CLIPTrainingConfig


def read_last_row(folder: Path) -> dict[str, float]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    return {name: float(value) for name, value in rows[-1].items() if name.startswith("val/")}


def test_training_learns_to_match_pictures_and_captions(train) -> None:
    folder = train("clip", "trainer.max_steps=60", "trainer.validate_every_steps=60", "trainer.batch_size=24")
    values = read_last_row(folder)
    # seven pictures of four colours, so three colours twice: who knows the colours finds at least 4 of 7, and pays ln 2
    # for 6 of 7, which is 0.594; guessing costs ln 7, which is 1.946
    assert values["val/image_to_text_r1"] >= 0.57 and values["val/text_to_image_r1"] >= 0.57
    assert values["val/image_to_text_r5"] == values["val/text_to_image_r5"] == 1
    assert values["val/loss"] < 0.7
    assert read_card(folder / "model")["metrics"]["val/loss"] == pytest.approx(values["val/loss"], abs=1e-5)


@pytest.mark.parametrize(("step", "loss", "alarm"), [(300, 2.0, True), (299, 2.0, False), (300, 1.9, False)])
def test_an_alarm_tells_of_a_loss_that_stays_at_guessing(
    tiny_clip: CLIP, monkeypatch, capsys: pytest.CaptureFixture[str], step: int, loss: float, alarm: bool
) -> None:
    module = CLIPModule(tiny_clip, CLIPTrainingConfig(plateau_steps=300, plateau_share=0.95), 1000)
    monkeypatch.setattr(CLIPModule, "global_step", step)
    module._watch_plateau(loss, n_pairs=8)  # guessing among 8 gives 2.08, and 0.95 of it is 1.975
    assert ("ALARM" in capsys.readouterr().err) == alarm


def test_a_run_that_learns_gives_no_alarm_and_one_that_does_not_gives_one(train, capsys) -> None:
    train("clip", "training.plateau_steps=1", "training.optimizer.learning_rate=1e-12", "trainer.max_steps=2")
    assert "ALARM: after 2 steps" in capsys.readouterr().err
    train("clip", "training.plateau_steps=30", "trainer.max_steps=30", "trainer.validate_every_steps=30")
    assert "ALARM" not in capsys.readouterr().err


def test_the_exported_scale_stays_within_its_bounds(train, weights) -> None:
    state = weights(train("clip", "training.optimizer.learning_rate=10", "training.optimizer.warmup_steps=0"))
    clip_scale = state["logit_scale.log"].clamp(0, torch.tensor(100.0).log()).exp()
    assert 1 <= clip_scale <= 100

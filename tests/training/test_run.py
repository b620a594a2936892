"""What holds for the runs of every stage: their folder, their end, going on after an interruption."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer

from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.clip import CLIP, CLIPConfig, Prior, PriorConfig
from vqt2i.config import load_config
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import CheckpointError, ConfigError, DataError
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.training.checkpoints import checkpoints_in, step_of
from vqt2i.training.clip import CLIPModule, CLIPRunConfig
from vqt2i.training.gpt import GPTModule
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.optim import OptimizerConfig, build_optimizer, learning_rate_at, learning_rate_share
from vqt2i.training.prior import PriorModule, PriorRunConfig
from vqt2i.training.run import TrainerConfig
from vqt2i.training.start import new_run_folder, newest_run_folder
from vqt2i.training.vqgan import VQGANModule, VQGANRunConfig
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

STAGES = {
    "vqgan": (VQGANRunConfig, VQGANModule, ImageTokenizerConfig, ImageTokenizer),
    "gpt": (GPTRunConfig, GPTModule, GPTConfig, GPT),
    "clip": (CLIPRunConfig, CLIPModule, CLIPConfig, CLIP),
    "prior": (PriorRunConfig, PriorModule, PriorConfig, Prior),
}
every_stage = pytest.mark.parametrize("stage", STAGES)


class StopError(Exception):
    pass


def stop_at(step: int, module_class: type[LightningModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the training of this stage after so many steps."""

    def on_train_batch_end(self, outputs, batch, batch_index) -> None:
        if self.global_step == step:
            raise StopError

    monkeypatch.setattr(module_class, "on_train_batch_end", on_train_batch_end)


@every_stage
def test_a_run_leaves_config_metrics_a_checkpoint_and_a_model_that_loads(stage: str, train, overrides) -> None:
    run_class, _, config_class, model_class = STAGES[stage]
    folder = train(stage)
    assert folder.name == stage
    saved = load_config(run_class, folder / "config.yaml")
    assert saved == load_config(run_class, None, overrides[stage])
    assert {"step-00000005.ckpt", "step-00000010.ckpt", "best.json"} == set(os.listdir(folder / "checkpoints"))
    model, card = load_model(folder / "model", config_class, model_class), read_card(folder / "model")
    assert card["fingerprint"] == model.fingerprint
    assert card["kind"] == stage and card["steps"] == 10 and card["command"].startswith("python ")
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    validated = [row for row in rows if any(row[name] for name in row if name.startswith("val/"))]
    assert [int(row["step"]) for row in validated] == [4, 9]  # Lightning counts steps from 0
    assert set(card["metrics"]) == {name for name in rows[0] if name.startswith("val/")}
    last = {name: float(validated[-1][name]) for name in card["metrics"]}
    assert card["metrics"] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "more"),
    [("vqgan", []), ("vqgan", ["training.loss.adversarial={channels: 4, n_layers: 2, start_share: 0.3}"]),
     ("vqgan", ["model.quantizer={kind: gumbel, codebook_size: 16}"]),
     ("vqgan", ["model.quantizer={kind: residual, codebook_size: 8}"]),
     ("gpt", []), ("gpt", ["transformer.dropout=0.0", "source=images"]),
     ("gpt", ["training.optimizer.kind=muon", "training.noise_share=0.2"]),
     ("clip", [])],
)  # fmt: skip
def test_a_run_that_was_interrupted_and_resumed_ends_with_the_same_weights(
    stage: str, more: list[str], train, weights, monkeypatch, tmp_path: Path
) -> None:
    whole = weights(train(stage, *more, runs=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(7, STAGES[stage][1], patch)
        train(stage, *more)
    assert [path.name for path in checkpoints_in(tmp_path / "runs" / stage)] == ["step-00000005.ckpt"]
    half = weights(tmp_path / "runs" / stage)
    folder = train(stage, *more, resume="auto")
    assert folder == tmp_path / "runs" / stage
    resumed = weights(folder)
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    assert read_card(folder / "model")["steps"] == 10


def test_a_checkpoint_that_was_cut_short_is_not_gone_on_from(train, weights, monkeypatch, tmp_path: Path) -> None:
    whole = weights(train("clip", runs=tmp_path / "whole"))
    save = Trainer.save_checkpoint

    def save_half(self: Trainer, path: Path) -> None:
        save(self, path)
        if self.global_step == 10:
            path.write_bytes(path.read_bytes()[:1000])
            raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(Trainer, "save_checkpoint", save_half)
        train("clip")
    resumed = weights(train("clip", resume="auto"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@every_stage
def test_equal_seeds_give_equal_weights_and_others_do_not(stage: str, train, weights, tmp_path: Path) -> None:
    short = ["trainer.max_steps=2"]
    a, b = (weights(train(stage, *short, runs=tmp_path / name)) for name in "ab")
    c = weights(train(stage, *short, "trainer.seed=1", runs=tmp_path / "c"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@every_stage
def test_bf16_trains_too(stage: str, train, weights) -> None:
    state = weights(train(stage, "trainer.precision=bf16", "trainer.max_steps=3"))
    assert all(value.isfinite().all() and value.dtype in (torch.float32, torch.int64) for value in state.values())


def test_a_finished_run_stays_as_it_is_and_auto_starts_another(train, weights, capsys) -> None:
    folder = train("clip", "trainer.max_steps=2")
    before = weights(folder)
    assert train("clip", "trainer.max_steps=2", resume=folder) == folder
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())
    assert train("clip", "trainer.max_steps=2", resume="auto").name == "clip-2"
    assert "clip is finished (2 steps); starting anew" in capsys.readouterr().err


def test_a_finished_run_can_be_made_longer(train) -> None:
    train("clip", "trainer.max_steps=5")
    folder = train("clip", resume="auto")
    assert read_card(folder / "model")["steps"] == 10


def test_the_card_of_a_resumed_run_tells_how_it_came_so_far(train) -> None:
    train("gpt")
    longer = train("gpt", "trainer.max_steps=15", resume="auto")
    card = read_card(train("gpt", "trainer.max_steps=20", resume="auto") / "model")
    assert card["steps"] == 20 and longer.name == "gpt"
    assert [part["steps"] for part in card["resumed_from"]] == [10, 15]


def test_resuming_with_another_model_is_an_error_that_names_the_difference(train) -> None:
    train("clip", "trainer.max_steps=2")
    with pytest.raises(ConfigError, match=r"runs/clip.*embedding_width"):
        train("clip", "embedding_width=8", resume="auto")


def test_a_run_never_overwrites_another_and_the_newest_is_resumed(train, tmp_path: Path) -> None:
    short = ["trainer.max_steps=1"]
    folders = [train("clip", *short), train("clip", *short)]
    assert [folder.name for folder in folders] == ["clip", "clip-2"]
    assert newest_run_folder(tmp_path / "runs", "clip") == folders[1]
    assert new_run_folder(tmp_path / "runs", "clip").name == "clip-3"


def test_runs_of_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    for name in ("gpt", "gpt-2", "gpt-emoji", "gpt-2-old", "gpt2"):
        path = tmp_path / name / "checkpoints" / "step-00000001.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
    for time, name in enumerate(("gpt", "gpt-2", "gpt2", "gpt-2-old", "gpt-emoji")):
        os.utime(tmp_path / name / "checkpoints" / "step-00000001.ckpt", (time, time))
    assert newest_run_folder(tmp_path, "gpt").name == "gpt-2"
    assert newest_run_folder(tmp_path, "gpt-emoji").name == "gpt-emoji"


def test_with_nothing_to_resume_auto_starts_anew_and_says_so(train, capsys) -> None:
    assert train("clip", "trainer.max_steps=1", resume="auto").name == "clip"
    assert "--resume auto: no run called clip with a checkpoint" in capsys.readouterr().err


def test_a_missing_split_and_a_missing_data_set_are_errors_and_leave_no_run(train, tmp_path: Path) -> None:
    wrong = {"data.validation_split=test": "no split 'test'", f"data.path={tmp_path}/none": "no such folder"}
    for more, told in wrong.items():
        with pytest.raises(DataError, match=told):
            train("clip", more)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_steps": 750, "validate_every_steps": 500}, "must divide max_steps"),
        ({"batch_size": 5, "devices": 2}, "multiple of devices"),
        ({"gradient_clip": 0}, "gradient_clip"),
        ({"precision": "fp64"}, "precision"),
    ],
)
def test_trainer_settings_that_do_not_fit_together_are_refused(values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainerConfig(**values)
    assert TrainerConfig(max_steps=100, validate_every_steps=500).max_steps == 100


def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=4, final_share=0.1)
    shares = [learning_rate_share(config, step, 24) for step in range(25)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0] and shares[4] == 1.0
    assert shares[14] == pytest.approx(0.55) and shares[24] == pytest.approx(0.1)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert learning_rate_at(config, 14, 24) == pytest.approx(0.275)
    assert learning_rate_share(config, 99, 24) == pytest.approx(0.1)
    assert learning_rate_share(config.model_copy(update={"warmup_steps": 0}), 0, 24) == 1.0


@every_stage
def test_the_first_and_the_last_update_use_the_scheduled_rate(stage: str, train, monkeypatch) -> None:
    rates = []
    module_class = STAGES[stage][1]

    def before_step(self, optimizer) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    def on_fit_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: before_step(self, optimizer))

    monkeypatch.setattr(module_class, "on_fit_start", on_fit_start)
    train(stage)
    config = OptimizerConfig(learning_rate=0.005, warmup_steps=2)
    assert rates == pytest.approx([learning_rate_at(config, step, 10) for step in range(10)])


def test_weight_decay_acts_on_matrices_only(make_gpt) -> None:
    gpt: GPT = make_gpt()
    decayed, kept = build_optimizer(gpt, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in gpt.named_parameters()}
    free = {name for name in names.values() if "norm" in name or name == "embedding.weight"}
    assert {names[id(p)] for p in kept["params"]} == free
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_a_newer_image_tokenizer_does_not_take_over_a_resumed_run(train, tiny_vq, tmp_path: Path) -> None:
    train("gpt", "trainer.max_steps=1")
    with torch.no_grad():
        tiny_vq.decoder.conv_out.bias += 0.01
    save_model(tmp_path / "newer", tiny_vq, tiny_vq.config, {"kind": "vqgan"})
    with pytest.raises(ConfigError, match=r"runs/gpt was begun as another run: image_tokenizer: fingerprint"):
        train("gpt", f"image_tokenizer={tmp_path / 'newer'}", resume="auto")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("training.optimizer.learning_rate=0.1", r"training\.optimizer\.learning_rate: 0\.005 before, 0\.1 now"),
        ("trainer.batch_size=4", r"trainer\.batch_size: 8 before, 4 now"),
        ("trainer.seed=1", r"trainer\.seed: 0 before, 1 now"),
        ("trainer.precision=bf16", r"trainer\.precision: fp32 before, bf16 now"),
        ("data.train_split=val", r"data\.train_split: train before, val now"),
    ],
)
def test_settings_that_make_another_run_are_refused_at_resume_by_name(change: str, told: str, train) -> None:
    run = train("clip", "trainer.max_steps=1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"clip was begun as another run: {told}\. Resume it with --config"):
        train("clip", change, resume="auto")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_data_set_is_refused_at_resume_and_the_same_one_elsewhere_is_not(
    train, tiny_dataset: DataSet, tmp_path: Path
) -> None:
    run = train("clip", "trainer.max_steps=1")
    moved = shutil.copytree(tiny_dataset.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("store-*"))
    assert train("clip", f"data.path={moved}", "trainer.max_steps=2", resume=run) == run
    pairs = {name: list(tiny_dataset.split(name))[:7] for name in ("train", "val")}
    other = write_dataset(tmp_path / "other", pairs)
    with pytest.raises(ConfigError, match=f"data: fingerprint {tiny_dataset.fingerprint[:8]} before, "):
        train("clip", f"data.path={other.folder}", resume=run)


def test_how_far_how_often_and_how_fast_may_change_at_resume(train) -> None:
    run = train("clip", "trainer.max_steps=1", "trainer.precision=auto")
    intervals = ["validate_every_steps=2", "checkpoint_every_steps=3", "log_every_steps=2", "keep_last=5"]
    others = ["max_steps=4", "n_workers=1", "n_validation_samples=3", "max_nonfinite_steps=2", "precision=auto"]
    values = [f"trainer.{value}" for value in intervals + others]
    assert train("clip", *values, "name=other", resume=run) == run
    assert [step_of(path) for path in checkpoints_in(run)] == [1, 3, 4]


def test_a_run_without_deepspeed_is_not_gone_on_with_by_deepspeed(train) -> None:
    run = train("gpt", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match="another run: without DeepSpeed before, with now"):
        train("gpt", deepspeed=True, resume=run)


def test_a_path_that_holds_no_run_is_an_error(train, tmp_path: Path) -> None:
    run = train("clip", "trainer.max_steps=1")
    wrong = {tmp_path / "none": "no such run", run / "model": "no checkpoint in it", run / "run.json": "no such run"}
    for path, told in wrong.items():
        with pytest.raises(CheckpointError, match=rf"--resume {path}: {told}; expected a run folder"):
            train("clip", resume=path)

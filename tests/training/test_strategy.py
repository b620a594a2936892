"""One process, DDP and DeepSpeed train alike: the real engines, on CPU ranks over gloo, in processes of their own."""

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from vqt2i.checkpoint import load_model
from vqt2i.config import load_config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.gpt import GPT
from vqt2i.training.batches import Batch
from vqt2i.training.checkpoints import checkpoint_path, damage
from vqt2i.training.clip import CLIPModule, CLIPRunConfig, train_clip
from vqt2i.training.gpt import GPTModule, train_gpt
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.optim import OptimizerConfig
from vqt2i.training.start import Resume
from vqt2i.training.strategy import (
    CPUDeepSpeedStrategy,
    DeepSpeedConfig,
    ResumingDeepSpeedStrategy,
    build_strategy,
    choose_deepspeed,
    deepspeed_json,
    is_sharded,
    read_deepspeed_json,
    valued_by_first_rank,
)
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

# parts whose mean does not depend on how the rows are dealt out to ranks
FAIR = ["training.reversed_share=0", "training.loss={text: 0, z: 0}", "training.null_share=0"]
WAIT = timedelta(minutes=3)
STEPS = ["trainer.max_steps=4", "trainer.validate_every_steps=2"]
# what CogView and DALL·E have and the default has not; with qk-norm, for without it a bias of keys changes no softmax,
# and Adam makes steps of what rounding leaves of its gradient
PUBLISHED = [
    "transformer={width: 32, n_layers: 2, n_heads: 2, mlp_width: 48, norm: scaled_layer, norm_placement: sandwich, "
    "mlp: gelu, bias: true, pb_relax: true}",
    "positions=learned", "padding=learned", "sparsity={kind: row_column, conv_size: 3}",
]  # fmt: skip
MUON = ["name=muon", "training.optimizer.kind=muon"]
ZERO = {f"zero-{stage}": [f"deepspeed.zero_stage={stage}"] for stage in range(4)} | {
    "zero-3-offloaded": ["deepspeed={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}"],
    "zero-3-published": ["deepspeed.zero_stage=3", "training.activation_checkpointing=true", *PUBLISHED],
    "zero-3-parts": ["deepspeed.zero_stage=3", "trainer.accumulate=2", "training.activation_checkpointing=true"],
}


def launch(tmp_path: Path, overrides: dict[str, list[str]], deepspeed: bool, devices: int, job: str = "stages") -> Path:
    """Train GPT and scorer in a process of its own, which starts its further ranks; returns their runs folder."""
    runs = tmp_path / "ranks"
    values = {stage: [*overrides[stage], *STEPS, f"trainer.devices={devices}"] for stage in ("gpt", "clip")}
    values["gpt"] += FAIR
    given = json.dumps({"runs": str(runs), "deepspeed": deepspeed, "overrides": values, "job": job})
    subprocess.run([sys.executable, __file__, given], check=True, timeout=900)
    return runs


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        # one step moves a weight by up to 5e-3
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), name


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name] - b[name]).square().sum() for name in a).sqrt().item()


def test_deepspeed_trains_the_weights_of_a_plain_run_broken_or_not_and_skips_what_it_skips(
    train, weights, overrides, monkeypatch, tmp_path: Path
) -> None:
    runs = launch(tmp_path, overrides, deepspeed=True, devices=1)
    plain = weights(train("gpt", *STEPS, *FAIR))
    assert_close(weights(runs / "gpt"), plain)
    assert (runs / "broken" / "checkpoints" / "step-00000004.ckpt").is_dir()
    assert_close(weights(runs / "broken"), plain)
    before = checkpoint_path(runs / "full", 2)
    assert [path for path in before.parent.iterdir() if path.is_dir()] == [before] and damage(before) is None
    monkeypatch.setattr(GPTModule, "training_step", infinite_in_step_3)
    skipping = weights(train("gpt", *STEPS, *FAIR, "name=skipping"))
    assert_close(weights(runs / "skipping"), skipping)
    assert [path.name for path in (runs / "skipping" / "nonfinite").iterdir()] == ["step-00000003-rank-0.safetensors"]
    assert any(not torch.allclose(skipping[name], plain[name], rtol=1e-3, atol=1e-4) for name in plain)


def test_two_ranks_train_the_weights_of_one_process_and_go_on_with_the_dropout_of_each(
    train, weights, overrides, tmp_path: Path
) -> None:
    runs = launch(tmp_path, overrides, deepspeed=False, devices=2)
    assert sorted(path.name for path in runs.iterdir()) == ["broken", "clip", "gpt", "muon", "whole"]
    plain = weights(train("gpt", *STEPS, *FAIR))
    assert_close(weights(runs / "gpt"), plain)
    # Muon's iteration is in bf16, which magnifies what the order of sums rounds
    alone = weights(train("gpt", *STEPS, *FAIR, *MUON))
    assert distance(weights(runs / "muon"), alone) < 0.02 * distance(plain, alone)
    assert_close(weights(runs / "clip"), weights(train("clip", *STEPS)))
    whole, broken = weights(runs / "whole"), weights(runs / "broken")
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []


def test_two_ranks_of_every_zero_stage_train_the_weights_of_one_process_and_validate_and_export_them(
    train, weights, overrides, tmp_path: Path
) -> None:
    runs = launch(tmp_path, overrides, deepspeed=True, devices=2, job="zero")
    alone = [*STEPS, *FAIR, "trainer.n_validation_samples=6"]
    default, published = train("gpt", *alone), train("gpt", *alone, *PUBLISHED, "name=published")
    for name in ZERO:
        plain = published if name.endswith("published") else default
        assert_close(weights(runs / name), weights(plain))
        assert json.loads((runs / name / "deepspeed.json").read_text())["zero_optimization"]["stage"] == int(name[5])
        assert len(list((runs / name / "samples").glob("*.png"))) == 2
        for step, values in validations(plain).items():
            assert validations(runs / name)[step] == pytest.approx(values, rel=1e-4), (name, step)
    assert_close(weights(runs / "clip"), weights(train("clip", *STEPS)))


def validations(run: Path) -> dict[str, list[float]]:
    """What a run validated, by step, of the parts whose mean does not depend on how the rows are dealt out."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    assert len(rows) == 2
    return {row["step"]: [float(row["val/image"]), float(row["val/image_unconditional"])] for row in rows}


def test_a_batch_read_in_parts_trains_as_one_read_at_once_with_kept_or_checkpointed_activations(train, weights) -> None:
    whole = weights(train("gpt", *STEPS, *FAIR, "name=whole"))
    for name, setting in (("parts", "trainer.accumulate=4"), ("again", "training.activation_checkpointing=true")):
        assert_close(weights(train("gpt", *STEPS, *FAIR, f"name={name}", setting)), whole)


def test_an_interrupted_run_whose_batches_are_read_in_parts_goes_on_where_it_was(train, weights, monkeypatch) -> None:
    parts = [*STEPS, "trainer.accumulate=2"]
    whole = weights(train("gpt", *parts))
    monkeypatch.setattr(GPTModule, "on_train_batch_end", stop_after_three_steps)
    with pytest.raises(InterruptedError):
        train("gpt", *parts, "name=broken")
    monkeypatch.undo()
    broken = weights(train("gpt", *parts, "name=broken", resume="auto"))
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []


@pytest.mark.parametrize(
    ("stage", "setting", "told"),
    [
        ("gpt", "trainer.precision=fp16", "fp16 needs a CUDA GPU"),
        ("vqgan", "trainer.accumulate=2", "accumulate 1"),
    ],
)
def test_settings_that_a_stage_or_the_machine_cannot_follow_are_refused(
    train, tmp_path: Path, stage: str, setting: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        train(stage, *STEPS, setting)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "needs zero_stage 1 or more"),
        ({"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "x"}, "needs zero_stage 3 or more"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "needs zero_stage 3"),
        ({"zero_stage": 3, "offload_parameters": "nvme"}, "give a folder"),
        ({"nvme_path": "x"}, "none without"),
    ],
)
def test_deepspeed_settings_that_do_not_fit_together_are_refused(values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DeepSpeedConfig(**values)


def test_offload_is_written_into_deepspeeds_json() -> None:
    config = DeepSpeedConfig(zero_stage=3, offload_optimizer="cpu", offload_parameters="nvme", nvme_path=Path("fast"))
    zero = deepspeed_json(config, 4)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu" and "nvme_path" not in zero["offload_optimizer"]
    assert zero["offload_param"]["device"] == "nvme" and zero["offload_param"]["nvme_path"] == "fast"


def test_a_users_json_wins_and_may_not_contradict_the_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    chosen = choose_deepspeed(path, DeepSpeedConfig(zero_stage=3), OptimizerConfig(), 4)
    assert chosen == {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4}
    assert choose_deepspeed(False, DeepSpeedConfig(), OptimizerConfig(kind="muon"), 4) is None
    path.write_text('{"train_micro_batch_size_per_gpu": 5}')
    with pytest.raises(ConfigError, match="5, but the settings give 4"):
        choose_deepspeed(path, DeepSpeedConfig(), OptimizerConfig(), 4)
    path.write_text('{"gradient_accumulation_steps": 2}')
    with pytest.raises(ConfigError, match=r"set that instead"):
        choose_deepspeed(path, DeepSpeedConfig(), OptimizerConfig(), 4)


@pytest.mark.parametrize("stage", ["gpt", "clip"])
def test_muon_under_deepspeed_is_refused_before_anything_is_written(stage: str, train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind 'muon' does not train under DeepSpeed.*or use 'adamw'"):
        train(stage, "training.optimizer.kind=muon", deepspeed=True)
    assert not list(tmp_path.glob("runs/*"))


def test_the_strategy_follows_from_devices_and_deepspeed() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    kinds = {
        (cpu, 1, None): SingleDeviceStrategy, (cuda, 1, None): SingleDeviceStrategy, (cpu, 2, None): DDPStrategy,
        (cpu, 1, 2): CPUDeepSpeedStrategy, (cuda, 1, 2): ResumingDeepSpeedStrategy,
    }  # fmt: skip
    for (device, n_devices, stage), kind in kinds.items():
        ds_json = None if stage is None else deepspeed_json(DeepSpeedConfig(), 4)
        given = {"checkpoint": None, "find_unused_parameters": False, "timeout": WAIT}
        assert type(build_strategy(device, n_devices, ds_json, **given)) is kind


def test_deepspeeds_json_is_made_anew_each_time_from_typed_fields() -> None:
    first = deepspeed_json(DeepSpeedConfig(zero_stage=1), 4)
    assert first["zero_optimization"]["stage"] == 1 and first["train_micro_batch_size_per_gpu"] == 4
    first["zero_optimization"]["stage"] = 9
    assert deepspeed_json(DeepSpeedConfig(zero_stage=1), 4)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(("rank", "stage", "draws"), [("0", 3, True), ("1", 3, False), ("1", 2, True)])
def test_only_the_first_rank_draws_the_initial_weights_that_zero_3_deals_out(
    rank: str, stage: int, draws: bool, monkeypatch, make_gpt
) -> None:
    monkeypatch.setenv("RANK", rank)
    whole = make_gpt(seed=0)
    before = torch.get_rng_state()
    with valued_by_first_rank(deepspeed_json(DeepSpeedConfig(zero_stage=stage), 4)):
        GPT(whole.config)
    assert torch.equal(before, torch.get_rng_state()) != draws
    with valued_by_first_rank(None):
        other = make_gpt(seed=0)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(("content", "told"), [(None, "No such file"), ("{", "not JSON"), ("[1]", "found a list")])
def test_a_users_json_that_cannot_be_used_is_a_config_error(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"ds\.json.*{told}"):
        read_deepspeed_json(path)


def run_rank(job: dict) -> None:
    torch.set_num_threads(1)
    runs, values = Path(job["runs"]), job["overrides"]

    def gpt(*more: str, resume: Resume = "never") -> Path:
        config = load_config(GPTRunConfig, None, [*values["gpt"], *more])
        vq = load_model(config.image_tokenizer, ImageTokenizerConfig, ImageTokenizer)
        return train_gpt(config, config.image_tokenizer, vq, runs, resume=resume, deepspeed=job["deepspeed"])

    def clip(*more: str, resume: Resume = "never") -> Path:
        config = load_config(CLIPRunConfig, None, [*values["clip"], *more])
        return train_clip(config, runs, resume=resume, deepspeed=job["deepspeed"])

    if job["job"] == "zero":
        GPTModule.configure_optimizers = with_a_part_on_each_rank
        for name, settings in ZERO.items():
            gpt(f"name={name}", "trainer.n_validation_samples=6", *settings)
        clip("deepspeed.zero_stage=3")
        return
    gpt()
    if not job["deepspeed"]:
        clip()
        gpt(*MUON)
        dropping = ["vision.dropout=0.5", "text.dropout=0.5"]
        CLIPModule.on_train_start = draw_otherwise_on_each_rank
        clip("name=whole", *dropping)
        CLIPModule.on_train_batch_end = stop_after_three_steps
        with pytest.raises(InterruptedError):
            clip("name=broken", *dropping)
        del CLIPModule.on_train_batch_end
        clip("name=broken", *dropping, resume="auto")
        return
    GPTModule.on_train_batch_end = stop_after_three_steps
    with pytest.raises(InterruptedError):
        gpt("name=broken")
    del GPTModule.on_train_batch_end
    gpt("name=broken", resume="auto")
    GPTModule.on_train_batch_end, save = fill_the_disk_after_three_steps, torch.save
    with pytest.raises(CheckpointError, match="No space left"):
        gpt("name=full")
    torch.save = save
    del GPTModule.on_train_batch_end
    GPTModule.training_step = infinite_in_step_3
    gpt("name=skipping")


def with_a_part_on_each_rank(
    module: GPTModule, configure_optimizers: Callable[..., object] = GPTModule.configure_optimizers
) -> object:
    """Before DeepSpeed takes the module over, and moves to the GPU what is whole."""
    assert is_sharded(module) == module.trainer.strategy.zero_stage_3
    if is_sharded(module):
        parameters = list(module.parameters())
        assert sum(p.numel() for p in parameters) == 0
        n_held, n_whole = (sum(n) for n in zip(*((p.ds_tensor.numel(), p.ds_numel) for p in parameters), strict=True))
        assert n_whole / 2 <= n_held < n_whole / 2 + len(parameters)
    return configure_optimizers(module)


def draw_otherwise_on_each_rank(module: CLIPModule) -> None:
    if module.global_step == 0:
        torch.manual_seed(module.global_rank)


def stop_after_three_steps(module: LightningModule, outputs: object, batch: object, batch_index: int) -> None:
    if module.global_step == 3:
        raise InterruptedError


def fill_the_disk_after_three_steps(module: LightningModule, outputs: object, batch: object, batch_index: int) -> None:
    def save(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if module.global_step == 3:
        torch.save = save


def infinite_in_step_3(
    module: GPTModule, batch: Batch, batch_index: int, training_step: Callable[..., Tensor] = GPTModule.training_step
) -> Tensor:
    return training_step(module, batch, batch_index) * (float("inf") if module.global_step == 2 else 1.0)


if __name__ == "__main__":  # the processes of the tests above
    run_rank(json.loads(sys.argv[1]))

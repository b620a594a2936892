"""A run that starts from a trained model: whole, in part, or through adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqt2i.checkpoint import CONFIG, WEIGHTS, load_model, read_card
from vqt2i.cli import main
from vqt2i.config import load_config
from vqt2i.data.shards import DataSet
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.generation.find import find_parts
from vqt2i.generation.parts import load_parts, pipeline_folders
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.text import pad_texts
from vqt2i.training.checkpoints import checkpoint_path
from vqt2i.training.encode import store_folder
from vqt2i.training.export import export_checkpoint
from vqt2i.training.finetune import LoRAConfig, add_adapters, freeze, merge_adapter, merged_weights, part_of, plain_gpt
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

TRAIN_GPT = Path(__file__).parents[2] / "tools" / "train_gpt.py"
LORA = "training.lora={rank: 2, alpha: 6}"


def scores(gpt: GPT) -> torch.Tensor:
    with torch.no_grad():
        return gpt.eval()(gpt.layout.join(pad_texts([[1, 2], [3]], 5), torch.arange(12).reshape(2, 6) % 6))


def with_random_adapters(gpt: GPT, config: LoRAConfig) -> GPT:
    add_adapters(gpt, config)
    for name, parameter in gpt.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return gpt


@pytest.fixture
def base(model_folders: Path) -> str:
    return f"training.start_from={model_folders}"


@pytest.mark.parametrize("targets", [("attention",), ("mlp",), ("attention", "mlp")])
def test_adapters_start_without_effect_and_alone_are_trained(make_gpt, gpt_kind: dict, targets: tuple) -> None:
    gpt = make_gpt(**gpt_kind)
    before, names = scores(gpt), {name for name, _ in gpt.named_parameters()}
    add_adapters(gpt, LoRAConfig(rank=2, targets=targets))
    assert torch.equal(scores(gpt), before)
    trained = [name for name, p in gpt.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name and any(f".{t}." in name for t in targets) for name in trained)
    assert {name.replace(".base_layer.", ".") for name, p in gpt.named_parameters() if not p.requires_grad} == names


def test_merged_weights_give_the_outputs_of_the_adapters_and_those_peft_itself_merges(make_gpt, gpt_kind: dict) -> None:
    from peft.tuners.lora import LoraLayer

    config = LoRAConfig(rank=3, alpha=5)
    gpt = with_random_adapters(make_gpt(**gpt_kind), config)
    expected = scores(gpt)
    plain = make_gpt(**gpt_kind)
    plain.load_state_dict(merged_weights(gpt.state_dict(), config))
    assert (expected - scores(make_gpt(**gpt_kind))).abs().max() > 0.01
    torch.testing.assert_close(scores(plain), expected)
    assert plain_gpt(gpt.config, plain.state_dict()).state_dict().keys() == plain.state_dict().keys()
    for layer in gpt.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    for name, value in plain.state_dict().items():
        stem, _, last = name.rpartition(".")
        by_peft = gpt.state_dict().get(f"{stem}.base_layer.{last}", gpt.state_dict().get(name))
        torch.testing.assert_close(value, by_peft)


def test_a_lora_run_exports_its_adapter_and_the_model_that_the_adapter_and_its_base_are(
    train, base: str, model_folders: Path, tmp_path: Path
) -> None:
    run = train("gpt", base, LORA)
    before, after = load_file(model_folders / "gpt" / WEIGHTS), load_file(run / "model" / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if part_of(name) in ("attention", "mlp") and before[name].ndim == 2}
    assert merge_adapter(run / "adapter", model_folders, tmp_path / "merged") == read_card(run / "model")["fingerprint"]
    assert (run / "adapter" / WEIGHTS).stat().st_size < (run / "model" / WEIGHTS).stat().st_size / 2
    assert read_card(run / "model")["start_from"]["path"] == str(model_folders / "gpt")
    command = ["export", "--adapter", str(run / "adapter"), "--base", str(model_folders / "gpt")]
    assert main([*command, "--out", str(tmp_path / "told")]) == 0
    assert (tmp_path / "told" / WEIGHTS).read_bytes() == (run / "model" / WEIGHTS).read_bytes()


def test_a_lora_run_resumes_exactly_and_its_checkpoints_export_as_it_did(train, base: str, tmp_path: Path) -> None:
    steps = ["trainer.checkpoint_every_steps=5", "trainer.keep_last=9"]
    whole = train("gpt", base, LORA, *steps, runs=tmp_path / "whole")
    train("gpt", base, LORA, *steps, "trainer.max_steps=5", runs=tmp_path / "halves")
    # the learning rate of the first half must be that of the whole
    halves = train("gpt", base, LORA, *steps, resume=checkpoint_path(whole, 5), runs=tmp_path / "halves")
    assert halves == whole
    first = export_checkpoint(whole, 10, tmp_path / "export")
    assert first == read_card(whole / "model")["fingerprint"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_adapters_that_one_process_trains(
    train, weights, overrides: dict[str, list[str]], base: str, stage: int, tmp_path: Path
) -> None:
    options = [base, LORA, "trainer.max_steps=4", "trainer.validate_every_steps=2"]
    plain = train("gpt", *options, runs=tmp_path / "plain")
    # in a process of its own: DeepSpeed leaves its process group and variables behind
    (tmp_path / "defaults.yaml").write_text("")
    settings = [*overrides["gpt"], *options, f"deepspeed.zero_stage={stage}"]
    where = ["--config", tmp_path / "defaults.yaml", "--runs", tmp_path / "zero"]
    command = [sys.executable, TRAIN_GPT, "--deepspeed", *where, *(f"--set={setting}" for setting in settings)]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (run,) = (tmp_path / "zero").iterdir()
    expected, found = weights(plain), weights(run)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert export_checkpoint(run, 4, tmp_path / "out") == read_card(run / "model")["fingerprint"]


def test_frozen_parts_stay_and_all_others_change(train, weights, base: str, model_folders: Path) -> None:
    run = train("gpt", base, "training.frozen=[attention, embedding, norms]")
    before, after = load_file(model_folders / "gpt" / WEIGHTS), weights(run)
    for name in before:
        assert torch.equal(before[name], after[name]) == (part_of(name) in ("attention", "embedding", "norms")), name


def test_every_parameter_of_every_kind_of_gpt_is_of_one_part(make_gpt, gpt_kind: dict) -> None:
    gpt = make_gpt(**gpt_kind)
    parts = {part_of(name) for name, _ in gpt.named_parameters()}
    assert parts - {"positions"} == {"embedding", "attention", "mlp", "norms", "head"}
    assert ("positions" in parts) != gpt.config.turns
    freeze(gpt, ("attention",))
    assert all(p.requires_grad != (".attention." in name) for name, p in gpt.named_parameters())


def test_a_run_starts_from_the_weights_of_its_base(train, weights, base: str, model_folders: Path) -> None:
    still = ["trainer.max_steps=1", "training.optimizer={learning_rate: 1.0e-12, warmup_steps: 0, weight_decay: 0}"]
    run = train("gpt", base, *still)
    for name, value in load_file(model_folders / "gpt" / WEIGHTS).items():
        torch.testing.assert_close(weights(run)[name], value)
    again = train("gpt", f"training.start_from={run}", *still)  # a run serves as well as a pipeline
    assert read_card(again / "model")["start_from"]["fingerprint"] == read_card(run / "model")["fingerprint"]


def test_a_base_may_come_to_see_texts_in_full(train, weights, base: str, model_folders: Path) -> None:
    still = ["trainer.max_steps=1", "training.optimizer={learning_rate: 1.0e-12, warmup_steps: 0, weight_decay: 0}"]
    run = train("gpt", base, *still, "text_attention=full", "training.loss.text=0")
    for name, value in load_file(model_folders / "gpt" / WEIGHTS).items():
        torch.testing.assert_close(weights(run)[name], value)
    assert load_config(GPTConfig, run / "model" / CONFIG).layout.text_attention == "full"
    assert "val/text" not in read_card(run / "model")["metrics"]


def test_what_a_base_learned_of_captions_is_remembered(train, base: str) -> None:
    first = train("gpt", base, "trainer.max_steps=1", "training.reversed_share=0.5")
    second = train("gpt", f"training.start_from={first}", "trainer.max_steps=1", "training.reversed_share=0")
    assert read_card(second / "model")["reversed_share"] == 0.5


@pytest.mark.parametrize(("override", "told"), [
    ("training.frozen=[mlp]", "frozen and lora are for a trained GPT"),
    (LORA, "frozen and lora are for a trained GPT"),
    ("training={start_from: x, frozen: [mlp], lora: {}}", "leave one of them out"),
    ("training={start_from: x, frozen: [brain]}", "training.frozen"),
    ("text_attention=full", "found training.loss.text 0.1, expected 0"),
    ("training={start_from: x, lora: {targets: []}}", "targets"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(GPTRunConfig, None, [override])


@pytest.fixture
def decoder_only(model_folders: Path) -> str:
    return f"training={{start_from: '{model_folders}', trained: decoder}}"


def test_a_decoder_trained_alone_draws_other_pictures_of_the_same_ids(
    train, decoder_only: str, model_folders: Path, tiny_vq: ImageTokenizer
) -> None:
    run = train("vqgan", decoder_only)
    tuned = load_model(run / "model", ImageTokenizerConfig, ImageTokenizer)
    for name, before in tiny_vq.state_dict().items():
        same = torch.equal(before, tuned.state_dict()[name])
        assert same == (not name.startswith("decoder.")), name
    assert tuned.ids_fingerprint == tiny_vq.fingerprint != tuned.fingerprint
    assert read_card(run / "model")["start_from"]["fingerprint"] == tiny_vq.fingerprint
    again = train("vqgan", decoder_only.replace(str(model_folders), str(run)))  # the ids are still the first one's
    assert load_model(again / "model", ImageTokenizerConfig, ImageTokenizer).ids_fingerprint == tiny_vq.fingerprint
    whole = train("vqgan", f"training.start_from={run}")
    changed = load_model(whole / "model", ImageTokenizerConfig, ImageTokenizer)
    assert changed.ids_fingerprint == changed.fingerprint
    assert not torch.equal(changed.quantizer.codebook, tiny_vq.quantizer.codebook)


def test_a_gpt_goes_with_every_decoder_of_its_ids_and_is_trained_on_with_any(
    train, decoder_only: str, base: str, model_folders: Path, tiny_dataset: DataSet, tmp_path: Path
) -> None:
    tuned = train("vqgan", decoder_only) / "model"
    folders = pipeline_folders(model_folders) | {"vq": tuned}
    image_ids = torch.arange(16).reshape(1, 4, 4)
    pictures = [load_parts(each).vq.decode(image_ids) for each in (folders, pipeline_folders(model_folders))]
    assert not torch.equal(*pictures)
    stores = set(tiny_dataset.folder.glob("store-*"))
    run = train("gpt", base, f"image_tokenizer={tuned}")
    assert set(tiny_dataset.folder.glob("store-*")) - stores in (set(), {store_of(tiny_dataset, model_folders)})
    parts, _ = find_parts(str(run), tmp_path / "runs")
    assert parts["vq"] == tuned
    load_parts(parts | {"vq": model_folders / "vq"})


def store_of(dataset: DataSet, pipeline: Path) -> Path:
    parts = load_parts(pipeline_folders(pipeline))
    return store_folder(dataset, parts.vq, parts.text)


def test_a_decoder_run_resumes_exactly(train, weights, decoder_only: str, tmp_path: Path) -> None:
    steps = ["trainer.checkpoint_every_steps=5", "trainer.keep_last=9"]
    whole = train("vqgan", decoder_only, *steps, runs=tmp_path / "whole")
    expected = weights(whole)
    again = train("vqgan", decoder_only, *steps, resume=checkpoint_path(whole, 5), runs=tmp_path / "whole")
    assert again == whole
    assert all(torch.equal(value, weights(again)[name]) for name, value in expected.items())


def test_an_image_tokenizer_to_start_from_that_does_not_fit_is_refused(
    train, decoder_only: str, model_folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="give its folder as start_from"):
        train("vqgan", "training.trained=decoder")
    with pytest.raises(ConfigError, match=r"model.ids_of is written by training.trained"):
        train("vqgan", decoder_only, "model.ids_of=abc")
    with pytest.raises(ConfigError, match=r"quantizer.code_dim: 4 there, 5 here"):
        train("vqgan", decoder_only, "model.quantizer.code_dim=5")
    with pytest.raises(CheckpointError, match=r"start_from .*gpt: no image tokenizer there.*a run of train_vqgan"):
        train("vqgan", f"training.start_from={model_folders / 'gpt'}")
    assert not (tmp_path / "runs").exists()


def test_a_base_that_does_not_fit_is_refused(train, base: str, model_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"transformer.width: 32 there, 64 here.*Take over its settings"):
        train("gpt", base, "transformer.width=64")
    with pytest.raises(CheckpointError, match=r"start_from .*vq: no GPT there"):
        train("gpt", f"training.start_from={model_folders / 'vq'}")
    with pytest.raises(ConfigError, match=r"no part 'positions'; it has embedding"):
        train("gpt", base, "training.frozen=[positions]")
    with pytest.raises(ConfigError, match="nothing is left to train"):
        train("gpt", base, "training.frozen=[embedding, attention, mlp, norms, head]")
    assert not (tmp_path / "runs").exists()


def test_lora_without_peft_is_told(train, base: str, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft is not installed; pip install 'vqt2i\[lora\]'"):
        add_adapters(None, LoRAConfig())


def test_adapters_of_another_base_or_damaged_ones_are_refused(train, base: str, model_folders, tmp_path, fails) -> None:
    run = train("gpt", base, LORA, "trainer.max_steps=1")
    with pytest.raises(CheckpointError, match=r"adapter: made with base .*give the model that it started from"):
        merge_adapter(run / "adapter", run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="kind 'gpt'; expected the adapter/ of a LoRA run"):
        merge_adapter(run / "model", model_folders, tmp_path / "out")
    weights = load_file(run / "adapter" / WEIGHTS)
    save_file({k: v for k, v in weights.items() if "lora_B" not in k}, run / "adapter" / WEIGHTS)
    with pytest.raises(CheckpointError, match="does not fit"):
        merge_adapter(run / "adapter", model_folders, tmp_path / "out")
    (run / "adapter" / WEIGHTS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        merge_adapter(run / "adapter", model_folders, tmp_path / "out")
    told = fails("export", "--adapter", run / "adapter", "--out", tmp_path / "out")
    assert "both --adapter DIR and --base DIR" in told
    assert "both --adapter" in fails("export", run, "--adapter", "a", "--base", "b", "--out", tmp_path / "out")
    assert "an adapter has none" in fails("export", "--adapter", "a", "--base", "b", "--step", 3, "--out", "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_decodes_as_any_other(train, base: str, tmp_path: Path) -> None:
    from vqt2i.generation.native import NativeGPT

    run = train("gpt", base, LORA, "trainer.max_steps=1")
    gpt = load_model(run / "model", GPTConfig, GPT)
    assert NativeGPT(gpt, "fp32").precision == "fp32"

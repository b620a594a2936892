"""The way back: what is imported goes out again with the same weights, and what does not fit is named."""

from pathlib import Path

import pytest
import torch
import yaml

from vqt2i.checkpoint import load_model, save_model
from vqt2i.cli import main
from vqt2i.gpt import FeatureCondition, GPTConfig, LabelCondition, LayoutConfig, MLPProjection
from vqt2i.gpt.model import GPT
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.convert import import_checkpoint
from vqt2i.peers.export import export_native
from vqt2i.peers.reading import read_checkpoint
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import GumbelConfig, VQConfig

NETWORK = {
    "image_size_px": 16, "downsample": 2, "architecture": "taming", "patch_px": 1, "channels": (64, 32),
    "stem_channels": 32, "latent_channels": 6, "attention_sizes_px": (8,), "n_res_blocks": 2,
}  # fmt: skip
VQ = {"codebook_size": 9, "code_dim": 6, "update": "gradient", "restart_below": 0}
TOKENIZERS = {
    "taming-vqgan": VQConfig(**VQ, l2_normalised=False, commitment_weight=1.0, codebook_weight=0.25),
    "taming-gumbel": GumbelConfig(codebook_size=9, code_dim=6, kl_weight=1e-8),
    "llamagen-vq": VQConfig(**VQ, commitment_weight=0.25, codebook_weight=1.0),
}
TRANSFORMER = TransformerConfig(width=32, n_layers=1, n_heads=2, mlp_width=96, norm_eps=1e-5, qk_norm=False)
CONDITIONS = {
    "llamagen-gpt-c2i": LabelCondition(n_labels=3),
    "llamagen-gpt-t2i": FeatureCondition(
        n_vectors=120, width=5, projection=MLPProjection(width=32, bias=False), encoder="t", cleaning="web"
    ),
}


def gpt_config(name: str, **changes: object) -> GPTConfig:
    values = {
        "transformer": TRANSFORMER, "layout": LayoutConfig(n_image_ids=9, grid_height=8, grid_width=8),
        "condition": CONDITIONS[name], "positions": "rotary_image", "image_tokenizer": "v",
    }  # fmt: skip
    return GPTConfig(**(values | changes))


def project_of(name: str) -> str:
    return name.split("-")[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_image_tokenizer_goes_out_and_comes_back_the_same(randomised, tmp_path: Path, name: str) -> None:
    config = ImageTokenizerConfig(**NETWORK, quantizer=TOKENIZERS[name])
    model = randomised(ImageTokenizer(config))
    if name != "taming-gumbel":
        model.quantizer.usage.fill_(1.0)
    fingerprint = save_model(tmp_path / "m", model, config, {"kind": "vqgan"})
    assert export_native(tmp_path / "m", project_of(name), tmp_path / "out").name == name
    path = next(p for p in (tmp_path / "out").iterdir() if p.suffix in (".ckpt", ".pt"))
    assert import_checkpoint(FAMILIES[name], path, tmp_path / "back", Options(image_size_px=16)) == fingerprint


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_gpt_goes_out_and_comes_back_the_same(randomised, tmp_path: Path, monkeypatch, name: str) -> None:
    vq_config = ImageTokenizerConfig(**NETWORK, quantizer=TOKENIZERS["llamagen-vq"])
    vq = save_model(tmp_path / "vq", ImageTokenizer(vq_config), vq_config, {"kind": "vqgan"})
    monkeypatch.setattr("vqt2i.peers.llamagen.fingerprint_of", lambda folder, width: "t")
    config = gpt_config(name, image_tokenizer=vq)
    fingerprint = save_model(tmp_path / "m", randomised(GPT(config)), config, {"kind": "gpt"})
    assert main(["export", str(tmp_path / "m"), "--to", "llamagen", "--out", str(tmp_path / "out")]) == 0
    options = Options(vq=tmp_path / "vq", text_encoder=tmp_path if name == "llamagen-gpt-t2i" else None)
    back = import_checkpoint(FAMILIES[name], tmp_path / "out" / "gpt.pt", tmp_path / "back", options)
    assert back == fingerprint


@pytest.mark.parametrize(("name", "file"), [
    ("taming-vqgan", "model.ckpt"), ("taming-gumbel", "model.ckpt"), ("llamagen-vq", "vq_model.pt"),
    ("llamagen-gpt-c2i", "gpt.pt"), ("llamagen-gpt-t2i", "gpt.pt"),
])  # fmt: skip
def test_a_published_checkpoint_goes_out_as_it_came_in(published, tmp_path: Path, monkeypatch, name, file) -> None:
    monkeypatch.setattr("vqt2i.peers.llamagen.fingerprint_of", lambda folder, width: "t")
    import_checkpoint(
        FAMILIES["llamagen-vq"], published("llamagen-vq") / "vq_model.pt", tmp_path / "vq", Options(image_size_px=8)
    )
    options = Options(
        vq=tmp_path / "vq" if "gpt" in name else None, text_encoder=tmp_path if name.endswith("t2i") else None
    )
    import_checkpoint(FAMILIES[name], published(name) / file, tmp_path / "m", options)
    export_native(tmp_path / "m", project_of(name), tmp_path / "out")
    there, found = (read_checkpoint(folder / file).tensors for folder in (published(name), tmp_path / "out"))
    there = {key: value for key, value in there.items() if not key.startswith("loss.")}
    assert found.keys() == there.keys()
    assert all(torch.equal(found[key], value) for key, value in there.items() if key != "quantize.codebook_used")
    if name.startswith("taming"):
        settings, theirs = (
            yaml.safe_load((folder / "model.yaml").read_text())["model"]
            for folder in (tmp_path / "out", published(name))
        )
        assert settings["target"] == theirs["target"] and settings["params"]["ddconfig"] == theirs["params"]["ddconfig"]
        assert settings["params"].keys() >= theirs["params"].keys() - {"monitor", "lossconfig"}


@pytest.mark.parametrize(("project", "config", "told"), [
    ("taming", ImageTokenizerConfig(), "taming-vqgan has no place for architecture lean"),
    ("taming", ImageTokenizerConfig(**NETWORK, quantizer=TOKENIZERS["llamagen-vq"]), "quantizer.l2_normalised True"),
    ("taming", ImageTokenizerConfig(**NETWORK | {"stem_channels": None}, quantizer=TOKENIZERS["taming-vqgan"]),
     "a width of 32 beside 64"),
    ("llamagen", ImageTokenizerConfig(**NETWORK | {"attention_sizes_px": (16, 8)}, quantizer=VQConfig()),
     "llamagen-vq has no place for attention_sizes_px (16, 8)"),
    ("taming", gpt_config("llamagen-gpt-c2i"), "a model of kind 'gpt', of which taming has none"),
    ("llamagen", gpt_config("llamagen-gpt-c2i", positions="rotary"), "positions rotary"),
    ("llamagen", gpt_config("llamagen-gpt-c2i", condition=LabelCondition()), "condition label without labels"),
    ("llamagen", gpt_config("llamagen-gpt-c2i", transformer=TRANSFORMER.model_copy(update={"mlp_width": 48})),
     "transformer.mlp_width 48, below 85"),
    ("llamagen", gpt_config("llamagen-gpt-t2i", condition=CONDITIONS["llamagen-gpt-t2i"].model_copy(
        update={"n_vectors": 77})), "condition.n_vectors 77"),
])  # fmt: skip
def test_what_a_project_has_no_place_for_is_named(fails, tmp_path: Path, project: str, config, told: str) -> None:
    kind, model_class = ("gpt", GPT) if isinstance(config, GPTConfig) else ("vqgan", ImageTokenizer)
    save_model(tmp_path / "m", model_class(config), config, {"kind": kind})
    assert told in fails("export", tmp_path / "m", "--to", project, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_exported_by_its_model(tmp_path: Path) -> None:
    config = ImageTokenizerConfig(**NETWORK, quantizer=TOKENIZERS["taming-vqgan"])
    save_model(tmp_path / "run" / "model", ImageTokenizer(config), config, {"kind": "vqgan"})
    export_native(tmp_path / "run", "taming", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.ckpt", "model.yaml"]
    loaded = load_model(tmp_path / "run" / "model", ImageTokenizerConfig, ImageTokenizer)
    state = torch.load(tmp_path / "out" / "model.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["quantize.embedding.weight"], loaded.quantizer.codebook)


def test_export_to_a_project_wants_a_model_folder(fails, tmp_path: Path) -> None:
    assert "card.json" in fails("export", tmp_path, "--to", "taming", "--out", tmp_path / "out")
    told = fails("export", tmp_path, "--step", 3, "--to", "taming", "--out", tmp_path / "out")
    assert "--to taming: of a model folder" in told

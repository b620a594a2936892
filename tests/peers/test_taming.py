from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vqt2i.checkpoint import load_model, read_card
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.convert import import_checkpoint
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import GumbelConfig, VQConfig

NAMES = ("taming-vqgan", "taming-gumbel")
QUANTIZERS = {
    "taming-vqgan": VQConfig(
        codebook_size=20, code_dim=6, l2_normalised=False, update="gradient", codebook_weight=0.25,
        commitment_weight=1.0, restart_below=0,
    ),
    "taming-gumbel": GumbelConfig(codebook_size=20, code_dim=6, kl_weight=1e-8),
}  # fmt: skip


def config_of(name: str) -> ImageTokenizerConfig:
    return ImageTokenizerConfig(
        image_size_px=16, downsample=4, architecture="taming", patch_px=1, channels=(64, 32, 96), stem_channels=32,
        latent_channels=12, n_res_blocks=2, attention_sizes_px=(8, 4), quantizer=QUANTIZERS[name],
    )  # fmt: skip


def load(folder: Path) -> ImageTokenizer:
    return load_model(folder, ImageTokenizerConfig, ImageTokenizer)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_published_ids_latents_and_pictures_come_out_also_of_other_sizes(published, tmp_path: Path, name: str) -> None:
    folder = published(name)
    import_checkpoint(FAMILIES[name], folder / "model.ckpt", tmp_path / "m")
    model, io = load(tmp_path / "m"), load_file(folder / "io.safetensors")
    for suffix in ("", "_rect"):
        ids = model.encode(io[f"x{suffix}"])
        assert torch.equal(ids, io[f"indices{suffix}"]) and len(ids.unique()) > 8
        torch.testing.assert_close(
            model.decode(io[f"indices{suffix}"]), io[f"rec{suffix}"].clamp(-1, 1), atol=1e-4, rtol=0
        )
    compared = list(FAMILIES[name].compare(model, io))
    assert {c.name for c in compared} == {f"{n}{s}" for n in ("z", "indices", "rec") for s in ("", "_rect")}
    assert all(c.agrees for c in compared)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_ours_in_that_layout_comes_back_equal(save_native, randomised, tmp_path: Path, name: str) -> None:
    config = config_of(name)
    model = randomised(ImageTokenizer(config))
    path = save_native(tmp_path / "last.ckpt", name, model, global_step=3)
    import_checkpoint(FAMILIES[name], path, tmp_path / "m", Options(image_size_px=16))
    found = load(tmp_path / "m")
    assert found.config == config
    expected = model.state_dict() | ({"quantizer.usage": torch.ones(20)} if name == "taming-vqgan" else {})
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.items())
    card = read_card(tmp_path / "m")
    assert (card["kind"], card["licence"], card["source"]["family"]) == ("vqgan", "MIT", name)
    assert (tmp_path / "m" / "README.md").read_text().startswith("---\nlicense: mit\n")


def settings_of(config: ImageTokenizerConfig, **changes: object) -> dict:
    ddconfig = {"ch": 32, "ch_mult": [2, 1, 3], "num_res_blocks": 2, "resolution": 32, "z_channels": 12}
    return {"model": {"params": {"embed_dim": 6, "n_embed": 20, "ddconfig": ddconfig | changes}}}


@pytest.mark.parametrize("where", ["model.yaml", "../configs/model.yaml"])
def test_the_size_of_the_images_is_read_from_the_settings(save_native, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "logs" / "checkpoints"
    (tmp_path / "logs" / "configs").mkdir(parents=True)
    folder.mkdir()
    config = config_of("taming-vqgan")
    (folder / where).write_text(yaml.safe_dump(settings_of(config)))
    path = save_native(folder / "last.ckpt", "taming-vqgan", ImageTokenizer(config))
    import_checkpoint(FAMILIES["taming-vqgan"], path, tmp_path / "m")
    found = load(tmp_path / "m").config
    assert (found.image_size_px, found.attention_sizes_px) == (32, (16, 8))


def test_settings_of_another_model_are_refused(save_native, fails, tmp_path: Path) -> None:
    config = config_of("taming-vqgan")
    path = save_native(tmp_path / "last.ckpt", "taming-vqgan", ImageTokenizer(config))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings_of(config, z_channels=256)))
    told = fails("import_checkpoint", "taming-vqgan", path, "--out", tmp_path / "m")
    assert "z_channels is 12 in the weights, 256 in" in told and not (tmp_path / "m").exists()

"""What every importer does alike, tried on small VQGANs."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqt2i.checkpoint import load_model
from vqt2i.cli import main
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.convert import import_checkpoint
from vqt2i.peers.table import Changed, Fill, Joined, converted, exported
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import VQConfig

CONFIG = ImageTokenizerConfig(
    image_size_px=8, downsample=2, architecture="taming", patch_px=1, channels=(32, 32), latent_channels=4,
    quantizer=VQConfig(codebook_size=9, code_dim=3, l2_normalised=False),
)  # fmt: skip


@pytest.fixture
def path(save_native, randomised, tmp_path: Path) -> Path:
    return save_native(tmp_path / "last.ckpt", "taming-vqgan", randomised(ImageTokenizer(CONFIG)))


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path)["state_dict"]


def expect_refusal(fails, path: Path, *told: str, family: str = "taming-vqgan", options: tuple = ()) -> None:
    out = path.parent / "out"
    message = fails("import_checkpoint", family, path, "--out", out, *options)
    assert all(part in message for part in told), message
    assert not out.exists() and not list(path.parent.glob(".vqt2i*"))


def test_another_family_is_told_with_the_right_one(fails, path: Path) -> None:
    expect_refusal(fails, path, "of the family taming-vqgan, not taming-gumbel", family="taming-gumbel")
    expect_refusal(fails, path, "family 'vqgan': expected one of taming-vqgan, taming-gumbel", family="vqgan")


def test_no_known_family_is_told_with_what_is_missing(fails, path: Path) -> None:
    torch.save({"state_dict": {"layers.0.weight": torch.ones(2)}}, path)
    expect_refusal(fails, path, "nor of another that is known", "encoder.conv_in.weight", "found layers.0.weight")


def test_missing_extra_and_wrongly_sized_weights_are_named(fails, path: Path) -> None:
    state = state_of(path)
    torch.save({"state_dict": {k: v for k, v in state.items() if "decoder.mid.attn_1.k" not in k} | {
        "decoder.colour": torch.ones(1), "loss.lpips": torch.ones(1)}}, path)  # fmt: skip
    expect_refusal(fails, path, "lacks decoder.mid.attn_1.k.bias, decoder.mid.attn_1.k.weight", "has decoder.colour")
    torch.save({"state_dict": state | {"post_quant_conv.weight": torch.ones(4, 5, 1, 1)}}, path)
    expect_refusal(fails, path, "post_quant_conv.weight: found (4, 5, 1, 1), expected what makes (4, 3, 1, 1)")


def test_of_many_missing_weights_some_are_named(fails, path: Path) -> None:
    state = {k: v for k, v in state_of(path).items() if not k.startswith("decoder.")}
    torch.save({"state_dict": state}, path)
    expect_refusal(fails, path, "and 60 more")


def test_a_damaged_file_and_one_with_code_leave_nothing(fails, path: Path) -> None:
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "trap"),)

    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    expect_refusal(fails, path, "last.ckpt: damaged or not a checkpoint of PyTorch")
    torch.save({"state_dict": {}, "hook": Runs()}, path)
    expect_refusal(fails, path, "last.ckpt: not opened, for loading it would run")
    assert not (path.parent / "trap").exists()


def test_a_folder_that_is_there_is_kept(fails, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert "exists already" in fails("import_checkpoint", "taming-vqgan", path, "--out", out)
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_a_size_that_does_not_fit_is_told(fails, path: Path) -> None:
    expect_refusal(fails, path, "downsample must be a power of two that divides image_size_px (9)",
                   options=("--image-size", 9))  # fmt: skip


@torch.no_grad()
def test_check_writes_only_what_gives_the_recorded_outputs(fails, capsys, path: Path, tmp_path: Path) -> None:
    import_checkpoint(FAMILIES["taming-vqgan"], path, tmp_path / "m", Options(image_size_px=8))
    model = load_model(tmp_path / "m", ImageTokenizerConfig, ImageTokenizer)
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    ids = model.encode(x)
    io = {"x": x, "indices": ids, "rec": model.decoder(model.quantizer.decode(ids)).contiguous()}
    save_file(io, tmp_path / "io.safetensors")
    arguments = ("import_checkpoint", "taming-vqgan", path, "--check", tmp_path / "io.safetensors")
    assert main([*map(str, arguments), "--out", str(tmp_path / "checked")]) == 0
    assert "check: indices 0 ids differ" in capsys.readouterr().err
    save_file(io | {"rec": io["rec"] + 0.01}, tmp_path / "io.safetensors")
    options = ("--check", tmp_path / "io.safetensors")
    expect_refusal(fails, path, "rec differ from what is recorded; nothing was written", options=options)
    save_file({"y": x}, tmp_path / "io.safetensors")
    expect_refusal(fails, path, "has no inputs and outputs", options=options)
    expect_refusal(fails, path, "No such file", options=("--check", tmp_path / "none"))
    save_file(io | {"x": io["x"][:, :2].contiguous()}, tmp_path / "io.safetensors")
    expect_refusal(fails, path, "holds no inputs and outputs of this model", options=options)


@pytest.mark.parametrize(("options", "told"), [
    (("--vq", "a"), "vq a: means nothing to the family taming-vqgan"),
    (("--sampling", "b.yaml"), "--sampling b.yaml: of a GPT, and taming-vqgan is none"),
    (("--image-size", "0"), "image_size_px"),
    (("--image-size", "-4"), "image_size_px"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(fails, path: Path, options: tuple, told: str) -> None:
    expect_refusal(fails, path, told, options=options)


def test_the_same_file_gives_the_same_fingerprint_and_shards_the_same_weights(path: Path, tmp_path: Path) -> None:
    family = FAMILIES["taming-vqgan"]
    prints = [import_checkpoint(family, path, tmp_path / name) for name in "ab"]
    assert prints[0] == prints[1]
    sharded = import_checkpoint(family, path, tmp_path / "c", shard_bytes=100_000)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    whole, parts = (load_model(tmp_path / n, ImageTokenizerConfig, ImageTokenizer) for n in "ac")
    assert parts.fingerprint == sharded and parts.config == whole.config
    assert all(torch.equal(parts.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_half_precision_stays_on_disk_and_is_loaded_into_fp32(path: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {name: tensor.half() for name, tensor in state_of(path).items()}}, path)
    import_checkpoint(FAMILIES["taming-vqgan"], path, tmp_path / "m")
    assert (tmp_path / "m" / "weights.safetensors").stat().st_size < path.stat().st_size * 1.1
    assert load_model(tmp_path / "m", ImageTokenizerConfig, ImageTokenizer).decoder.conv_in.weight.dtype == torch.float


def test_a_table_is_read_in_both_directions() -> None:
    table = {
        "same": "a", "halves": ("b", "c"), "shares": Joined(("d", "e"), rows=(1, 3)),
        "turned": Changed("f", lambda t: t.T, lambda t: t.T), "ours": Fill(2.0),
    }  # fmt: skip
    theirs = {"a": torch.randn(2), "b": torch.randn(2, 3), "c": torch.randn(2, 3), "d": torch.randn(1, 2),
              "e": torch.randn(3, 2), "f": torch.randn(2, 5)}  # fmt: skip
    expected = {"same": torch.empty(2), "halves": torch.empty(4, 3), "shares": torch.empty(4, 2),
                "turned": torch.empty(5, 2), "ours": torch.empty(3)}  # fmt: skip
    ours = {name: later.make() for name, later in converted(table, theirs, expected, "file").items()}
    assert torch.equal(ours["halves"][2:], theirs["c"]) and torch.equal(ours["turned"], theirs["f"].T)
    assert torch.equal(ours["ours"], torch.full((3,), 2.0))
    back = exported(table, ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], tensor) for name, tensor in theirs.items())

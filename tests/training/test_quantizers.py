"""Every kind of quantizer along the whole way: training, export, token store, GPT, pictures; and their comparison."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch

from vqt2i.checkpoint import load_model, read_card
from vqt2i.cli import main
from vqt2i.config import load_config
from vqt2i.data.images import GREY
from vqt2i.data.shards import DataSet
from vqt2i.errors import ConfigError
from vqt2i.generation.find import open_pipeline
from vqt2i.training import vqgan
from vqt2i.training.compare import vq_model
from vqt2i.training.compare_quantizers import QUANTIZERS, QuantizerScore, as_markdown
from vqt2i.training.vqgan import VQGANRunConfig
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

ROOT = Path(__file__).parents[2]
KINDS = {
    "residual": "{kind: residual, codebook_size: 8, code_dim: 4, depth: 2}",
    "fsq": "{kind: fsq, levels: [4, 5]}",
    "lfq": "{kind: lfq, codebook_size: 16}",
    "gumbel": "{kind: gumbel, codebook_size: 16}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind_go_through_store_and_gpt_to_pictures(kind: str, train: Callable[..., Path], tmp_path: Path):
    folder = train("vqgan", f"model.quantizer={KINDS[kind]}")
    vq = load_model(folder / "model", ImageTokenizerConfig, ImageTokenizer)
    assert vq.config.quantizer.kind == kind
    assert {"val/usage", "val/perplexity", "val/dead_codes"} <= read_card(folder / "model")["metrics"].keys()
    gpt_run = train("gpt", f"image_tokenizer={folder / 'model'}", "trainer.max_steps=1")
    pipeline = open_pipeline(str(gpt_run), tmp_path / "runs", "cpu")
    assert pipeline.gpt.layout.image_length == vq.config.n_image_ids == (32 if kind == "residual" else 16)
    previews = []
    (sample,) = pipeline.generate("a red square", n=1, on_preview=lambda preview: previews.append(preview.images()))
    expected = vq.decode(torch.from_numpy(sample.image_ids_HW)[None])[0]
    torch.testing.assert_close((expected + 1) * 127.5, torch.from_numpy(sample.image_HW3).movedim(-1, 0).float(),
                               atol=0.51, rtol=0)  # fmt: skip
    # a cell of 4 x 4 pixels is shown with the last of its ids
    for n_drawn, images in enumerate(previews, 1):
        cells = images.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
        assert (cells == GREY).all(1).sum() == 16 - n_drawn // vq.config.quantizer.ids_per_cell


def test_the_gpt_starts_ids_of_all_levels_from_their_codes(train: Callable[..., Path]):
    folder = train("vqgan", f"model.quantizer={KINDS['residual']}", "trainer.max_steps=1")
    vq = load_model(folder / "model", ImageTokenizerConfig, ImageTokenizer)
    assert vq.quantizer.codes().shape == (16, 4)
    assert not torch.allclose(vq.quantizer.codes()[:8], vq.quantizer.codes()[8:])


def dalle_tiny(tiny_dataset: DataSet, *more: str) -> VQGANRunConfig:
    """The shipped configuration at a size for tests."""
    small = [f"data.path={tiny_dataset.folder}", "model.image_size_px=16", "model.quantizer.codebook_size=32",
             "trainer.max_steps=120", "trainer.batch_size=8", "trainer.validate_every_steps=120",
             "trainer.precision=fp32", "training.optimizer.warmup_steps=5"]  # fmt: skip
    return load_config(VQGANRunConfig, ROOT / "configs" / "vqgan" / "dalle_tiny.yaml", [*small, *more])


def test_dalle_tiny_learns_while_its_temperature_falls(tiny_dataset: DataSet, tmp_path: Path, monkeypatch):
    seen: list[dict[str, float]] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    build = L.Trainer.__init__
    monkeypatch.setattr(L.Trainer, "__init__", lambda self, *a, callbacks, **k: build(
        self, *a, callbacks=[*callbacks, Record()], **k))  # fmt: skip
    config = dalle_tiny(tiny_dataset)
    folder = vqgan.train_vqgan(config, tmp_path / "runs", resume="never")
    temperatures = [row["train/temperature"] for row in seen]
    assert temperatures == sorted(temperatures, reverse=True)
    assert (temperatures[0], temperatures[-1]) == pytest.approx((1, 1 / 16))
    assert seen[0]["train/quantizer"] == 0 < seen[-1]["train/quantizer"]  # the weight of the KL divergence rises
    likelihood = [row["train/reconstruction"] for row in seen]
    assert sum(likelihood[-10:]) / 10 < sum(likelihood[:10]) / 10 - 1  # nats per pixel value
    after_one = dalle_tiny(tiny_dataset, "name=first", "trainer.max_steps=1")
    first = read_card(vqgan.train_vqgan(after_one, tmp_path / "runs", resume="never") / "model")["metrics"]
    last = read_card(folder / "model")["metrics"]
    assert last["val/psnr"] > first["val/psnr"] + 2 and last["val/loss"] < first["val/loss"] - 1


@pytest.mark.parametrize("override", ["model.output=pixels", "training.loss={l1_weight: 1.0, logit_laplace_weight: 0}"])
def test_a_loss_of_what_the_decoder_does_not_say_is_refused(override: str, tiny_dataset: DataSet):
    with pytest.raises(ConfigError, match="that weight is above 0 where output is 'logit_laplace', and 0 elsewhere"):
        dalle_tiny(tiny_dataset, override)


def test_diffusers_has_no_other_quantizer_than_vq():
    config = ImageTokenizerConfig(architecture="taming", patch_px=1, channels=(32, 32, 32), quantizer=QUANTIZERS["fsq"])
    with pytest.raises(ConfigError, match="a quantizer of kind 'vq'; found 'taming', \\[\\] and 'fsq'"):
        vq_model(config)


def test_benchmark_quantizers_writes_a_table_of_runs_alike(
    overrides: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    for name in QUANTIZERS.keys() - {"vq-ema", "residual"}:
        monkeypatch.delitem(QUANTIZERS, name)
    (tmp_path / "tiny.yaml").write_text("name: tiny\n")
    sets = [part for value in [*overrides["vqgan"], "trainer.max_steps=5"] for part in ("--set", value)]
    runs, out = tmp_path / "runs", tmp_path / "table.md"
    command = ["benchmark", "quantizers", "--config", str(tmp_path / "tiny.yaml"), *sets]
    assert main([*command, "--runs", str(runs), "--out", str(out)]) == 0
    scores = [QuantizerScore(**score) for score in json.loads(out.with_suffix(".json").read_text())]
    assert [(s.name, s.n_ids, s.ids_per_cell, s.bits_per_cell) for s in scores] == [
        ("vq-ema", 1024, 1, 10.0), ("residual", 1024, 2, 18.0),
    ]  # fmt: skip
    for score in scores:
        run = runs / f"tiny-{score.name}"
        assert score.psnr == read_card(run / "model")["metrics"]["val/psnr"]
        assert load_config(VQGANRunConfig, run / "config.yaml").model.quantizer == QUANTIZERS[score.name]
    assert out.read_text().strip() == as_markdown(scores)
    assert as_markdown(scores) in capsys.readouterr().out

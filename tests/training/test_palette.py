"""The run of a palette, and a GPT of pixels on it: trained, drawn from, edited, with nothing of its own in the way."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vqt2i.checkpoint import read_card
from vqt2i.cli import main
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.data.shards import DataSet
from vqt2i.errors import ConfigError, DataError
from vqt2i.evaluation.diagnosis import DiagnosisConfig, diagnose
from vqt2i.generation.edit import KeepTop
from vqt2i.generation.find import find_image_tokenizer, find_parts, open_pipeline, write_pipeline
from vqt2i.gpt import LabelCondition
from vqt2i.training.palette import PaletteRunConfig, load_tokenizer_run, measure, train_palette
from vqt2i.training.record import read_record
from vqt2i.training.vqgan import VQGANRunConfig
from vqt2i.vq import PaletteTokenizer, load_image_tokenizer

SMALL = {"image_size_px": 8, "n_colours": 10}
NO_TEXT = ("condition.kind=none", "text_length=32", "training.reversed_share=0")


@pytest.fixture
def palette_config(tiny_dataset: DataSet) -> PaletteRunConfig:
    return PaletteRunConfig(data={"path": tiny_dataset.folder}, model=SMALL, fit={"n_images": 20})


@pytest.fixture
def palette_run(palette_config: PaletteRunConfig, tmp_path: Path) -> Path:
    return train_palette(palette_config, tmp_path / "runs", resume="never")


def test_a_run_holds_what_those_of_other_image_tokenizers_do(
    palette_run: Path, palette_config: PaletteRunConfig, tiny_dataset: DataSet
) -> None:
    assert load_tokenizer_run(palette_run / "config.yaml") == palette_config
    record, card = read_record(palette_run), read_card(palette_run / "model")
    assert record.kind == card["kind"] == "palette" and len(record.starts) == 1
    assert record.fingerprints == {"data": tiny_dataset.fingerprint} == {"data": card["data"]["fingerprint"]}
    assert card["config"] == palette_config.model_dump(mode="json") and card["command"].startswith("python ")
    assert Image.open(palette_run / "samples" / "reconstructions.png").size == (7 * 8, 2 * 8)


def test_its_card_says_what_it_makes_of_validation_images(palette_run: Path, tiny_dataset: DataSet) -> None:
    palette = load_image_tokenizer(palette_run / "model")
    image_B3HW = to_tensor(np.stack([fit_square(pair.image_HW3, 8) for pair in tiny_dataset.split("val")]))
    decoded = palette.decode(palette.encode(image_B3HW))
    errors_B = (decoded - image_B3HW).square().mean((1, 2, 3))
    metrics = read_card(palette_run / "model")["metrics"]
    assert metrics == measure(palette, image_B3HW)
    assert metrics["val/psnr"] == pytest.approx(float((10 * (4 / errors_B).log10()).mean()), abs=1e-4)
    assert metrics["val/psnr"] > 25 and 0.5 < metrics["val/usage"] <= 1


def test_equal_settings_give_equal_palettes_in_folders_of_their_own(
    palette_run: Path, palette_config: PaletteRunConfig, tmp_path: Path
) -> None:
    again = train_palette(palette_config, tmp_path / "runs", resume="auto")  # nothing to go on with: anew
    assert again.name == "palette-2"
    assert load_image_tokenizer(again / "model").fingerprint == load_image_tokenizer(palette_run / "model").fingerprint


def test_other_ranks_leave_the_work_to_the_first(
    palette_config: PaletteRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    train_palette(palette_config, tmp_path / "runs", resume="never")
    assert not (tmp_path / "runs").exists()


def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    palette_config: PaletteRunConfig, tiny_dataset: DataSet, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="a palette is fitted in one go and has no checkpoints"):
        train_palette(palette_config, tmp_path / "runs", resume=tmp_path)
    for more in ("data.variants=flip", "data.stream.urls=x.tar"):
        with pytest.raises(ConfigError, match="fitted to the plain images of a data set"):
            load_tokenizer_run(None, ["model.kind=palette", f"data.path={tiny_dataset.folder}", more])
    with pytest.raises(ConfigError, match="trainer: unknown key"):
        load_tokenizer_run(None, ["model.kind=palette", "trainer.max_steps=3"])
    many = palette_config.model_copy(update={"model": palette_config.model.model_copy(update={"n_colours": 9999})})
    with pytest.raises(DataError, match=r"n_colours 9999: the training pixels have \d+ different colours"):
        train_palette(many, tmp_path / "runs", resume="never")
    assert not (tmp_path / "runs").exists()


def test_the_model_says_which_kind_of_run_it_is() -> None:
    assert isinstance(load_tokenizer_run(None), VQGANRunConfig)
    assert isinstance(load_tokenizer_run(None, ["model.downsample=4"]), VQGANRunConfig)
    assert isinstance(load_tokenizer_run(None, ["model={kind: palette, n_colours: 4}"]), PaletteRunConfig)


def test_the_tool_fits_and_a_gpt_takes_it_only_where_it_is_named(
    palette_run: Path, tiny_dataset: DataSet, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"data": {"path": str(tiny_dataset.folder)}, "model": {"kind": "palette", **SMALL}}
    Path("p.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train_vqgan", "--config", "p.yaml", "--set", "name=mine"]) == 0
    assert "runs/mine/model: 10 colours from 24 images of 8 px" in capsys.readouterr().err
    folder, tokenizer = find_image_tokenizer(None, Path("runs"))
    assert folder.parts[-3:] == ("pretrained", "shapes32", "vq") and not isinstance(tokenizer, PaletteTokenizer)
    assert isinstance(find_image_tokenizer(Path("runs/mine/model"), Path("runs"))[1], PaletteTokenizer)


@pytest.fixture
def train_pixels(train: Callable[..., Path], palette_run: Path) -> Callable[..., Path]:
    return lambda *more: train("gpt", f"image_tokenizer={palette_run / 'model'}", *more)


def test_a_gpt_of_pixels_draws_edits_and_is_shared(
    train_pixels, palette_run: Path, tiny_dataset: DataSet, tmp_path: Path
) -> None:
    run = train_pixels(*NO_TEXT)
    pipeline = open_pipeline(str(run), tmp_path / "runs", "cpu")
    assert pipeline.gpt.config.condition == LabelCondition() and pipeline.config.example_prompts == ()
    assert isinstance(pipeline.vq, PaletteTokenizer) and pipeline.gpt.layout.image_length == 64
    previews = []
    (sample,) = pipeline.generate("", n=1, on_preview=lambda preview: previews.append(preview.images()))
    assert sample.image_HW3.shape == (8, 8, 3) and previews[-1].shape == (1, 8, 8, 3)
    colours = {tuple(colour) for colour in pipeline.vq.colours_K3.tolist()}
    assert {tuple(pixel) for pixel in sample.image_HW3.reshape(-1, 3).tolist()} <= colours
    # completion of the upper half: what is kept is the palette's own of the picture
    image_HW3 = tiny_dataset.split("val")[0].image_HW3
    done = pipeline.edit(image_HW3, "", KeepTop(0.5), n=2, rerank=3)
    given_HW = pipeline.vq.encode(to_tensor(fit_square(image_HW3, 8))[None])[0]
    assert all(np.array_equal(one.image_ids_HW[:4], given_HW[:4]) for one in done)
    assert not np.array_equal(done[0].image_ids_HW[4:], done[1].image_ids_HW[4:])
    assert done[0].scores["likelihood"] >= done[1].scores["likelihood"]
    larger = pipeline.with_grid(8, 12).generate("", n=1)[0]
    assert larger.image_HW3.shape == (8, 12, 3)
    write_pipeline(*find_parts(str(run), tmp_path / "runs"), tmp_path / "shared", "fp32")
    shared = open_pipeline(str(tmp_path / "shared"), tmp_path, "cpu").generate("", n=1)[0]
    assert np.array_equal(shared.image_HW3, sample.image_HW3)


def test_the_palette_of_a_gpt_is_found_by_its_content_where_its_folder_was_moved(
    train_pixels, palette_run: Path, tmp_path: Path
) -> None:
    run = train_pixels(*NO_TEXT)
    palette_run.rename(palette_run.with_name("elsewhere"))
    folders, _ = find_parts(str(run), tmp_path / "runs")
    assert folders["vq"] == tmp_path / "runs" / "elsewhere" / "model"


def test_a_gpt_of_captions_and_pixels_is_no_special_case(train_pixels, tiny_dataset: DataSet, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(train_pixels("source=images")), tmp_path / "runs", "cpu")
    drawn = pipeline.generate("a red square", n=1, rerank=2, scorer="caption")
    assert drawn[0].image_HW3.shape == (8, 8, 3)
    found = diagnose(pipeline, tiny_dataset, DiagnosisConfig(n_samples=4, n_drawn=1, overfit_steps=1, overfit_batch=2))
    tokenizer = found.stages[0]
    assert not tokenizer.weak and tokenizer.value > tokenizer.bound, "better than means of four pixels"


def test_near_colours_start_with_near_embeddings(palette_run: Path, make_gpt) -> None:
    palette = load_image_tokenizer(palette_run / "model")
    gpt = make_gpt(n_image_ids=10)
    torch.manual_seed(0)
    gpt.start_from_codes(palette.codes())
    first = gpt.layout.first_image_id
    embedding_KD = gpt.embedding.weight[first : first + 10]
    colour_distance, distance = (torch.cdist(x, x).flatten() for x in (palette.codes(), embedding_KD))
    assert torch.corrcoef(torch.stack((colour_distance, distance)))[0, 1] > 0.8


def test_export_of_a_palette_tells_that_its_run_has_no_checkpoints(palette_run: Path, tmp_path: Path, fails) -> None:
    told = fails("export", palette_run, "--out", tmp_path / "out")
    assert "no checkpoint" in told and not (tmp_path / "out").exists()
    assert json.loads((palette_run / "run.json").read_text())["kind"] == "palette"

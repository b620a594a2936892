"""The small configurations of published systems, on the coloured squares with a smaller transformer: they learn."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.checkpoint import load_model, save_model
from vqt2i.config import load_config
from vqt2i.data.images import fit_square
from vqt2i.data.shards import DataSet
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig, LabelCondition
from vqt2i.text.train import TextTokenizerConfig, save_text_tokenizer, train_text_tokenizer
from vqt2i.training.gpt import train_gpt
from vqt2i.training.gpt_config import GPTRunConfig, tokenizer_sizes
from vqt2i.vq import AnyImageTokenizer, PaletteConfig, PaletteTokenizer, load_image_tokenizer
from vqt2i.vq.palette import fit_colours

ROOT = Path(__file__).parents[2]
SMALLER = ["transformer.width=32", "transformer.n_layers=3", "transformer.n_heads=2", "transformer.mlp_width=64"]


def first_and_last(run: Path) -> list[dict[str, str]]:
    """The first and the last validation of a run."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    return [rows[0], rows[-1]]


@pytest.mark.parametrize("name", ["cogview_tiny", "dalle_tiny"])
def test_it_learns_the_images_of_the_captions_and_draws_from_its_export(
    name: str, tiny_dataset: DataSet, tiny_vq, model_folders: Path, tmp_path: Path
) -> None:
    captions = [c for i in range(24) for texts in tiny_dataset.split("train").captions(i).values() for c in texts]
    text = train_text_tokenizer(captions, TextTokenizerConfig(vocabulary_size=300, model_type="bpe"))
    save_text_tokenizer(text, tmp_path / "text.model", {})
    overrides = [
        f"data={{path: {tiny_dataset.folder}, validation_split: train}}", f"text_tokenizer={tmp_path / 'text.model'}",
        "trainer={max_steps: 90, batch_size: 24, validate_every_steps: 30, n_validation_samples: 24, precision: fp32}",
        "text_length=16", "training.optimizer.learning_rate=0.005", "training.optimizer.warmup_steps=5", *SMALLER,
    ]  # fmt: skip
    config = load_config(GPTRunConfig, ROOT / "configs" / "gpt" / f"{name}.yaml", overrides)
    run = train_gpt(config, model_folders / "vq", tiny_vq, tmp_path / "runs", resume="never", deepspeed=False)
    first, last = (float(row["val/image"]) for row in first_and_last(run))
    assert last < 1.0 < first < 2.77  # guessing costs ln 16
    gpt = load_model(run / "model", GPTConfig, GPT)
    assert gpt.config == config.model(tokenizer_sizes(text, tiny_vq), text.fingerprint, tiny_vq.fingerprint)
    drawn = decode_image_ids(gpt, [Job(tuple(text.encode("a red square")), 0, 0)], SamplingConfig(), seed=0)
    assert drawn.shape == (1, 4, 4) and torch.isin(drawn, torch.arange(16)).all()


@pytest.fixture
def palette(labelled: DataSet, tmp_path: Path) -> AnyImageTokenizer:
    """The squares at 8 px in 12 colours, in tmp_path/palette."""
    pixel_N3 = np.stack([fit_square(pair.image_HW3, 8) for pair in labelled.split("train")]).reshape(-1, 3)
    tokenizer = PaletteTokenizer(PaletteConfig(image_size_px=8, n_colours=12))
    tokenizer.colours_K3.copy_(fit_colours(pixel_N3, 12, seed=0))
    save_model(tmp_path / "palette", tokenizer, tokenizer.config, {"kind": "palette"})
    return load_image_tokenizer(tmp_path / "palette")


def train_igpt(name: str, labelled: DataSet, tokenizer_folder: Path, model_folders: Path, tmp_path: Path) -> Path:
    overrides = [
        f"data={{path: {labelled.folder}, validation_split: train}}",
        f"text_tokenizer={model_folders / 'text' / 'text.model'}", "training.compile=false",
        "trainer={max_steps: 60, batch_size: 24, validate_every_steps: 20, n_validation_samples: 24, precision: fp32}",
        "training.optimizer.learning_rate=0.01", "training.optimizer.warmup_steps=5", *SMALLER,
    ]  # fmt: skip
    config = load_config(GPTRunConfig, ROOT / "configs" / "gpt" / f"{name}.yaml", overrides)
    tokenizer = load_image_tokenizer(tokenizer_folder)
    return train_gpt(config, tokenizer_folder, tokenizer, tmp_path / "runs", resume="never", deepspeed=False)


def test_igpt_learns_pixels_of_images_alone(
    labelled: DataSet, palette: PaletteTokenizer, model_folders: Path, tmp_path: Path
) -> None:
    run = train_igpt("igpt_tiny", labelled, tmp_path / "palette", model_folders, tmp_path)
    first, last = (float(row["val/image"]) for row in first_and_last(run))
    assert last < 0.3 < first < 2.48  # guessing costs ln 12
    gpt = load_model(run / "model", GPTConfig, GPT)
    assert gpt.config.condition == LabelCondition() and gpt.config.positions == "sequence"
    assert not any(name.endswith("bias") for name in gpt.state_dict())
    drawn = decode_image_ids(gpt, [Job(0, 0, 0)], SamplingConfig(), seed=0)
    assert palette.decode(drawn).shape == (1, 3, 8, 8)


def test_igpt_learns_images_of_classes(labelled: DataSet, model_folders: Path, tmp_path: Path) -> None:
    run = train_igpt("igpt_label_tiny", labelled, model_folders / "vq", model_folders, tmp_path)
    first, last = first_and_last(run)
    assert float(last["val/image"]) < 0.4 < float(first["val/image"]) < 2.77  # guessing costs ln 16
    assert float(last["val/image"]) < float(last["val/image_unconditional"]) - 0.1
    condition = load_model(run / "model", GPTConfig, GPT).config.condition
    assert condition == LabelCondition(n_labels=4, names=labelled.labels)

"""The small configurations of published systems, on the coloured squares with a smaller transformer: they learn."""

import csv
from pathlib import Path

import pytest
import torch

from vqt2i.checkpoint import load_model
from vqt2i.config import load_config
from vqt2i.data.shards import DataSet
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.text.train import TextTokenizerConfig, save_text_tokenizer, train_text_tokenizer
from vqt2i.training.gpt import GPTRunConfig, tokenizer_sizes, train_gpt

ROOT = Path(__file__).parents[2]
SMALLER = ["transformer.width=32", "transformer.n_layers=3", "transformer.n_heads=2", "transformer.mlp_width=64"]


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
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    first, last = (float(row["val/image"]) for row in (rows[0], rows[-1]))
    assert last < 1.0 < first < 2.77  # guessing costs ln 16
    gpt = load_model(run / "model", GPTConfig, GPT)
    assert gpt.config == config.model(tokenizer_sizes(text, tiny_vq), text.fingerprint, tiny_vq.fingerprint)
    drawn = decode_image_ids(gpt, [Job(tuple(text.encode("a red square")), 0, 0)], SamplingConfig(), seed=0)
    assert drawn.shape == (1, 4, 4) and torch.isin(drawn, torch.arange(16)).all()

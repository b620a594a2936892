"""Small runs of every stage on the coloured squares: configurations, and functions that train them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from vqt2i.checkpoint import WEIGHTS
from vqt2i.config import load_config
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.training.clip import CLIPRunConfig, train_clip
from vqt2i.training.gpt import train_gpt
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.prior import PriorRunConfig, train_prior
from vqt2i.training.start import Resume
from vqt2i.training.vqgan import VQGANRunConfig, train_vqgan
from vqt2i.vq import load_image_tokenizer

TRANSFORMER = "{width: 32, n_layers: 2, n_heads: 2, mlp_width: 48}"
TRAINER = "{max_steps: 10, batch_size: 8, validate_every_steps: 5, n_validation_samples: 7, precision: fp32}"
OPTIMIZER = "{learning_rate: 0.005, warmup_steps: 2}"
UNTRAINED_GPT = f"""\
name: tiny
data: {{path: nowhere}}
image_tokenizer: nowhere
sizes: {{n_text_ids: 40, n_image_ids: 30, grid_height: 3, grid_width: 3}}
text_length: 5
transformer: {TRANSFORMER}
"""


@pytest.fixture
def untrained_gpt(tmp_path: Path) -> Path:
    """The configuration file of a tiny GPT, for benchmarks: it has sizes, and neither data nor tokenizers."""
    path = tmp_path / "tiny.yaml"
    path.write_text(UNTRAINED_GPT)
    return path


@pytest.fixture
def overrides(tiny_dataset: DataSet, model_folders: Path) -> dict[str, list[str]]:
    """What makes the built-in settings of each stage small, as the command line's --set takes it."""
    text = f"text_tokenizer={model_folders / 'text' / 'text.model'}"
    every = [f"data.path={tiny_dataset.folder}", f"trainer={TRAINER}"]
    return {
        "vqgan": [
            *every, f"training.optimizer={OPTIMIZER}", "model={image_size_px: 16, channels: [8, 16]}",
            "model.quantizer={codebook_size: 16, code_dim: 4}",
        ],
        "gpt": [
            *every, text, f"training.optimizer={OPTIMIZER}", f"transformer={TRANSFORMER}", "text_length=12",
            f"image_tokenizer={model_folders / 'vq'}",
        ],
        "clip": [
            *every, text, f"training.optimizer={OPTIMIZER}", f"vision={TRANSFORMER}", f"text={TRANSFORMER}",
            "text_length=12", "image_size_px=16", "embedding_width=16",
        ],
        "prior": [
            *every, text, f"training.optimizer={OPTIMIZER}", f"scorer={model_folders / 'clip'}", "hidden_width=24",
        ],
    }  # fmt: skip


@pytest.fixture
def train(overrides: dict[str, list[str]], tmp_path: Path) -> Callable[..., Path]:
    """train(stage, *more overrides, resume="never", deepspeed=False): run a stage in tmp_path/runs, give its folder."""

    def run(
        stage: str, *more: str, resume: Resume = "never", deepspeed: bool | Path = False, runs: Path = tmp_path / "runs"
    ) -> Path:
        values = [*overrides[stage], *more]
        if stage == "vqgan":
            return train_vqgan(load_config(VQGANRunConfig, None, values), runs, resume=resume)
        if stage == "clip":
            return train_clip(load_config(CLIPRunConfig, None, values), runs, resume=resume, deepspeed=deepspeed)
        if stage == "prior":
            return train_prior(load_config(PriorRunConfig, None, values), runs, resume=resume)
        config = load_config(GPTRunConfig, None, values)
        vq = load_image_tokenizer(config.image_tokenizer)
        return train_gpt(config, config.image_tokenizer, vq, runs, resume=resume, deepspeed=deepspeed)

    return run


@pytest.fixture
def labelled(tiny_dataset: DataSet, tmp_path: Path) -> DataSet:
    """The coloured squares without captions, their colours as classes."""
    splits = {
        name: [Pair(p.key, p.image_HW3, {}, label=p.captions["en"][0].split()[1]) for p in tiny_dataset.split(name)]
        for name in ("train", "val")
    }
    return write_dataset(tmp_path / "labelled", splits, shard_size=5)


@pytest.fixture
def weights() -> Callable[[Path], dict[str, Tensor]]:
    """The exported weights of a run's folder."""
    return lambda folder: load_file(folder / "model" / WEIGHTS)

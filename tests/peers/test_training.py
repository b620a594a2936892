"""Imported GPTs go on training, each by the settings of its own, and what comes out draws, captions or upscales."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.checkpoint import load_model, read_card
from vqt2i.cli import main
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import write_dataset
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.peers import FAMILIES
from vqt2i.peers.convert import import_checkpoint

TRAINER = "{max_steps: 1, batch_size: 4, validate_every_steps: 1, n_validation_samples: 4, precision: fp32}"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eight noisy pictures of 32 px with captions of a, b and c."""
    rng = np.random.default_rng(0)
    pairs = [
        Pair(f"s{i}", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), {"en": (("ab c", "b", "c a")[i % 3],)})
        for i in range(12)
    ]
    return write_dataset(tmp_path / "data", {"train": pairs[:8], "val": pairs[8:]}).folder


@pytest.mark.parametrize("name", ["mindalle-gpt", "rudalle-gpt", "cogview-gpt", "cogview-caption", "cogview-sr"])
def test_an_imported_gpt_goes_on_training(native, in_empty_folder: Path, dataset: Path, name: str) -> None:
    made = native(name)
    base = import_checkpoint(FAMILIES[name], made.path, in_empty_folder / "gpt", made.options)
    config = load_model(Path("gpt"), GPTConfig, GPT).config
    own = {part: getattr(config, part).model_dump() for part in ("transformer", "sparsity", "head", "condition")}
    layout = {part: getattr(config.layout, part) for part in ("text_length", "padding", "image_marks")}
    share = 0.5 if name == "cogview-caption" else 0.0
    settings = own | layout | {
        "name": "tuned", "data.path": str(dataset), "text_tokenizer": "gpt", "positions": config.positions,
        "training.start_from": "gpt", "training.reversed_share": share, "training.compile": False,
    }  # fmt: skip
    sets = [f"{key}={json.dumps(value)}" for key, value in settings.items()] + [f"trainer={TRAINER}"]
    assert main(["train_gpt", "--vq", str(made.options.vq), *(part for s in sets for part in ("--set", s))]) == 0
    before, after = (load_model(folder, GPTConfig, GPT) for folder in (Path("gpt"), Path("runs/tuned/model")))
    assert before.config == after.config
    changed = [key for key, value in after.state_dict().items() if not value.equal(before.state_dict()[key])]
    assert set(changed) == {key for key, _ in after.named_parameters()}
    card = read_card(Path("runs/tuned/model"))
    assert card["start_from"]["fingerprint"] == base and card["kind"] == FAMILIES[name].kind
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("picture.png")
    use = {
        "cogview-caption": ["caption", "picture.png", "--ids", "2", "--model", "runs/tuned"],
        "cogview-sr": ["upscale", "picture.png", "--prompt", "ab", "--model", "runs/tuned", "--out", "used"],
    }.get(name, ["generate", "ab c", "--model", "runs/tuned", "--n", "1", "--out", "used"])
    assert main(use) == 0

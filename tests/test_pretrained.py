"""The weights that ship load and belong together; how well they draw is held by tests/evaluation/test_gate.py."""

import json
from pathlib import Path

import pytest

from vqt2i.generation import TextToImage
from vqt2i.generation.find import DRAWN_BY, SHIPPED, TRAINED_WITH
from vqt2i.generation.parts import PIPELINE

FOLDERS = sorted(path.parent for path in SHIPPED.glob(f"*/{PIPELINE}"))
CARDS = sorted(SHIPPED.glob("*/*/card.json"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_every_card_says_how_the_model_was_made(path: Path):
    card = json.loads(path.read_text(encoding="utf-8"))
    assert {"fingerprint", "kind", "data", "command", "steps", "metrics", "seconds"} <= card.keys()
    assert card["command"].startswith("python tools/train_")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_all_parts_ship(folder: Path):
    shipped = TextToImage.load(folder, "cpu")
    assert shipped.fingerprints.keys() == {"text", "vq", "gpt", "clip"}
    assert shipped.config.example_prompts


def test_what_ships_is_small():
    assert {"emoji", "shapes", "shapes32", DRAWN_BY, TRAINED_WITH} <= {folder.name for folder in FOLDERS}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 40e6

"""What is true of a scene and what is not any more when places or colours are exchanged; a table of any pipeline."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vqt2i.data.shapes import check, parse_caption, render
from vqt2i.generation.pipeline import TextToImage


@pytest.fixture(scope="module")
def relations(experiment) -> ModuleType:
    return experiment("relations")


def test_the_true_caption_is_true_and_the_exchanged_ones_are_not(relations: ModuleType) -> None:
    scenes = relations.scenes(20)
    assert len({scene.relation for scene in scenes}) == 4
    for scene in scenes:
        for order in relations.ORDERS:
            right = {
                kind: check(render(scene, 32), parse_caption(text)).parts
                for kind, text in relations.told(scene, order).items()
            }
            assert all(right["true"].values())
            assert not right["places"]["relation"] and not all(right["colours"].values())


def test_every_order_and_scorer_is_in_the_table(
    relations: ModuleType, model_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    # an untrained pipeline of pictures that are too small for the shapes
    monkeypatch.setattr(relations, "render", lambda scene, size_px: np.zeros((size_px, size_px, 3), np.uint8))
    head, _, *rows = relations.table(pipeline, 3).splitlines()
    assert head == "| caption | exchanged | image | caption | clip | nats a picture |"
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {order}", kind] for order in relations.ORDERS for kind in ("places", "colours")
    ]

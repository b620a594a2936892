from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from vqt2i.data.shapes import Scene, SceneObject, beach_pairs, draw_beach, parse_caption, render
from vqt2i.data.shapes.scene import COLOURS, SHAPES
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import DataError
from vqt2i.evaluation.oracle import OracleProtocol
from vqt2i.evaluation.style import StyleAccuracy, measure_style, objects_in
from vqt2i.generation import Sample, SamplingConfig

WORDS = (" at the beach", "沙滩上，")


class Drawer:
    """Stands in for a pipeline: draws the one object of a prompt, right, and every second picture at the beach.

    knows: whether it draws the beach where and only where that is asked for.
    """

    def __init__(self, *, knows: bool) -> None:
        self.knows, self.prompts = knows, []

    def candidates(self, prompts: Sequence[str], count: int, **_: object) -> list[list[Sample]]:
        self.prompts += prompts
        return [[self._draw(prompt, index) for index in range(count)] for prompt in prompts]

    def _draw(self, prompt: str, index: int) -> Sample:
        plain = prompt.removesuffix(WORDS[0]).removeprefix(WORDS[1])
        (thing,) = parse_caption(plain).objects
        scene = Scene("white", (SceneObject(thing.shape, thing.colour, "large", "solid", 16, 16),))
        at_beach = plain != prompt if self.knows else index % 2 == 0
        return Sample("", 0, index, 0, (draw_beach if at_beach else render)(scene, 32), np.zeros((8, 8), np.int64))


def protocol(**changes: object) -> OracleProtocol:
    return replace(OracleProtocol(("single_seen",), 20, 2, 0, SamplingConfig()), **changes)


@pytest.fixture
def pictures(tmp_path) -> DataSet:
    return write_dataset(tmp_path / "beach", {"train": beach_pairs("train", 20, 0, 32)})


def test_what_is_asked_for_counts_with_the_style_only_and_without_it_only(pictures: DataSet) -> None:
    found = measure_style(Drawer(knows=True), protocol(), pictures.split("train"))["single_seen"]
    assert found["style"] == StyleAccuracy(1.0, 1.0, 1.0, 0.0)
    assert found["plain"] == StyleAccuracy(0.0, 1.0, 1.0, 0.0)
    found = measure_style(Drawer(knows=False), protocol(), pictures.split("train"))["single_seen"]
    assert found["style"] == found["plain"] == StyleAccuracy(0.5, 1.0, 0.5, 0.0)


def test_prompts_are_in_both_languages_and_of_objects_that_no_picture_shows(pictures: DataSet) -> None:
    known, drawer = objects_in(pictures.split("train")), Drawer(knows=True)
    assert 20 <= len(known) < len(COLOURS) * len(SHAPES)
    measure_style(drawer, protocol(), pictures.split("train"))
    in_style, plain = drawer.prompts[:20], drawer.prompts[20:]
    assert [text.removesuffix(WORDS[0]).removeprefix(WORDS[1]) for text in in_style] == plain
    assert sum(text.endswith(WORDS[0]) for text in in_style) == sum(text.startswith(WORDS[1]) for text in in_style)
    things = {(o.colour, o.shape) for text in plain for o in parse_caption(text).objects}
    assert len(things) > 5 and not things & known


def test_pictures_that_do_not_say_what_is_in_them_are_refused(tiny_dataset: DataSet) -> None:
    with pytest.raises(DataError, match="make_dataset shapes --style"):
        measure_style(Drawer(knows=True), protocol(), tiny_dataset.split("train"))

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vqt2i.data.shapes import Scene, SceneObject, beach_pairs, draw_beach, parse_caption, render
from vqt2i.data.shapes.scene import COLOURS, SHAPES
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import DataError
from vqt2i.evaluation.page import sections_of
from vqt2i.evaluation.style import StyleProtocol, measure_style, require_style
from vqt2i.generation import Sample, SamplingConfig

WORDS = (" at the beach", "沙滩上，")


def without_words(prompt: str) -> str:
    return prompt.removesuffix(WORDS[0]).removeprefix(WORDS[1])


class Drawer:
    """Stands in for a pipeline: draws the one object of a prompt, right.

    knows: at the beach where and only where that is asked for; else the first candidate alone.
    """

    class vq:
        class config:
            image_size_px = 32

    class gpt:
        class layout:
            has_both_orders = True

    def __init__(self, *, knows: bool) -> None:
        self.knows, self.prompts = knows, []

    def candidates(self, prompts: Sequence[str], count: int, **_: object) -> list[list[Sample]]:
        self.prompts += prompts
        return [[self._draw(prompt, index) for index in range(count)] for prompt in prompts]

    def _draw(self, prompt: str, index: int) -> Sample:
        (thing,) = parse_caption(without_words(prompt)).objects
        scene = Scene("white", (SceneObject(thing.shape, thing.colour, "large", "solid", 16, 16),))
        at_beach = without_words(prompt) != prompt if self.knows else index == 0
        return Sample("", 0, index, 0, (draw_beach if at_beach else render)(scene, 32), np.zeros((8, 8), np.int64))


PROTOCOL = StyleProtocol(("single_seen",), 20, 4, 0, SamplingConfig())


@pytest.fixture
def pictures(tmp_path: Path) -> DataSet:
    return write_dataset(tmp_path / "beach", {"train": beach_pairs("train", 20, 0, 32)})


def shares(drawer: Drawer, pictures: DataSet) -> dict[str, list[float]]:
    """By the words asked for: in_style, right, wanted, wanted of the best."""
    rows = measure_style(drawer, PROTOCOL, pictures.split("train"))
    assert [row.name for row in rows] == ["in_style", "right", "wanted", "wanted"] * 2 and {r.n for r in rows} == {20}
    (section,) = sections_of("style", rows)
    assert [line[0] for line in section.rows] == ["single_seen, style", "single_seen, plain"]
    return {words: [row.value for row in rows if row.where["words"] == words] for words in ("style", "plain")}


def test_a_picture_counts_if_it_is_right_and_in_the_style_just_where_that_is_asked_for(pictures: DataSet) -> None:
    assert shares(Drawer(knows=True), pictures) == {"style": [1, 1, 1, 1], "plain": [0, 1, 1, 1]}
    assert shares(Drawer(knows=False), pictures) == {"style": [0.25, 1, 0.25, 1], "plain": [0.25, 1, 0.75, 0]}


def test_prompts_are_in_both_languages_and_of_objects_that_no_picture_shows(pictures: DataSet) -> None:
    drawer = Drawer(knows=True)
    known = require_style(drawer, pictures.split("train"))
    assert 20 <= len(known) < len(COLOURS) * len(SHAPES)
    measure_style(drawer, PROTOCOL, pictures.split("train"))
    in_style, plain = drawer.prompts[:20], drawer.prompts[20:]
    assert list(map(without_words, in_style)) == plain
    assert sum(text.endswith(WORDS[0]) for text in in_style) == sum(text.startswith(WORDS[1]) for text in in_style)
    things = {(o.colour, o.shape) for text in plain for o in parse_caption(text).objects}
    assert len(things) > 5 and not things & known


def test_pictures_that_do_not_say_what_they_show_and_sizes_that_cannot_be_read_are_refused(
    tiny_dataset: DataSet, pictures: DataSet, model_folders: Path, fails
) -> None:
    with pytest.raises(DataError, match="make_dataset shapes --style"):
        measure_style(Drawer(knows=True), PROTOCOL, tiny_dataset.split("train"))
    told = fails("evaluate", model_folders, pictures.folder, "--measure", "style")
    assert "shapes: are drawn with 32, 64, 128 px, the model draws 16 px" in told
    assert "style: needs a data set" in fails("evaluate", model_folders, "--measure", "style")


def test_unknown_kinds_are_refused(pictures: DataSet) -> None:
    with pytest.raises(Exception, match="no prompts of kind 'four'"):
        measure_style(Drawer(knows=True), replace(PROTOCOL, kinds=("four",)), pictures.split("train"))

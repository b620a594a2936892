from collections.abc import Sequence

import numpy as np
import pytest

from vqt2i.data.shapes import Caption, Scene, draw_prompts, draw_scene, render
from vqt2i.data.shapes.captions import caption_scene
from vqt2i.errors import PromptError
from vqt2i.evaluation.oracle import OracleProtocol, measure_oracle, score_groups
from vqt2i.generation import Sample, SamplingConfig


def scenes_with_captions(n: int) -> list[tuple[Scene, Caption]]:
    scenes = [draw_scene(0, "val", index) for index in range(n)]
    return [(scene, caption_scene(scene, np.random.default_rng(0))["en"][0]) for scene in scenes]


def sample(scene: Scene, index: int, scores: dict[str, float]) -> Sample:
    return Sample("", 0, index, 0, render(scene, 32), np.zeros((8, 8), np.int64), scores=scores)


class Drawer:
    """Stands in for a pipeline: the first candidate of each prompt is right, and only CLIP knows it."""

    clip = None

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes, self.prompts = scenes, []

    def candidates(self, prompts: Sequence[str], count: int, **_: object) -> list[list[Sample]]:
        self.prompts += prompts
        wrong = [self.scenes[(i + 1) % len(self.scenes)] for i in range(len(self.scenes))]
        return [
            [sample(right if i == 0 else wrong[p], i, {"clip": -i, "caption": i}) for i in range(count)]
            for p, right in enumerate(self.scenes[: len(prompts)])
        ]


def test_a_scorer_that_ranks_the_right_picture_first_is_right_and_one_that_ranks_it_last_is_wrong():
    pairs = scenes_with_captions(6)
    groups = Drawer([scene for scene, _ in pairs]).candidates(["x"] * 6, 4)
    scores = score_groups([caption for _, caption in pairs], groups)
    assert scores["clip"]["right"] == scores["any"]["right"] == 1
    assert scores["caption"]["right"] == 0
    assert scores["random"]["right"] == pytest.approx(0.25)
    assert scores["clip"]["colour_shape"] == 1


def test_prompts_are_half_english_and_half_chinese_and_facts_are_judged():
    prompts = [*draw_prompts("single_unseen", 3, 5, "en"), *draw_prompts("single_unseen", 2, 5, "zh")]
    drawer = Drawer([draw_scene(0, "val", index) for index in range(5)])
    protocol = OracleProtocol(("single_unseen",), 5, 2, 5, SamplingConfig())
    results = measure_oracle(drawer, protocol)
    assert drawer.prompts == [prompt.text for prompt in prompts]
    assert set(results["single_unseen"]["accuracy"]) == {"random", "clip", "caption", "any"}
    assert "r_precision" not in results["single_unseen"]


@pytest.mark.parametrize("bad", [{"kinds": ("nonsense",)}, {"n_prompts": 1}])
def test_what_cannot_be_measured_is_refused(bad: dict):
    values = {"kinds": ("three",), "n_prompts": 4, "n_candidates": 1, "seed": 0, "sampling": SamplingConfig()} | bad
    with pytest.raises(PromptError):
        measure_oracle(Drawer([]), OracleProtocol(**values))

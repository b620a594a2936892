from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vqt2i.data.shapes import draw_prompts, draw_scene, parse_caption, render
from vqt2i.data.shapes.captions import phrase
from vqt2i.evaluation.alignment import Candidates, Examiner, alignment_rows, best_of, numbers_up_to
from vqt2i.evaluation.judge import Judge
from vqt2i.evaluation.prompts import Asked, listed_prompts
from vqt2i.generation import TextToImage


class Clip:
    """Embeds the text of one id, and the picture whose first pixel is that id, in the same direction."""

    config = SimpleNamespace(text_length=1, image_size_px=4)

    def parameters(self) -> Iterator[Tensor]:
        return iter([torch.zeros(1)])

    def encode_text(self, ids_BS: Tensor, n_ids_B: Tensor) -> Tensor:
        return torch.eye(200)[ids_BS[:, 0]]

    def encode_image(self, image_B3HW: Tensor) -> Tensor:
        return torch.eye(200)[((image_B3HW[:, 0, 0, 0] + 1) * 127.5).round().long()]


TEXT = SimpleNamespace(encode=lambda text: [int(text)])
JUDGE = Judge(TEXT, Clip(), TEXT)


def pictures(*ids: int) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), i, np.uint8) for i in ids])


def test_a_picture_is_retrieved_if_its_own_prompt_is_nearest_of_a_hundred() -> None:
    examiner = Examiner(listed_prompts([str(i) for i in range(150)]), JUDGE, 4, 0)
    others = examiner._others[3]
    assert len(others) == 99 == len(set(others)) and 3 not in others
    stranger = next(i for i in range(150) if i not in others and i != 3)
    found = examiner.examine(3, pictures(3, others[0], stranger))
    assert found["clip_score"] == [1, 0, 0]
    assert found["r_precision"] == [1, 0, 0]  # nothing among the hundred is near the stranger
    assert Examiner(listed_prompts([str(i) for i in range(150)]), JUDGE, 4, 0)._others == examiner._others


def test_prompts_that_say_the_same_are_no_others() -> None:
    alike = ["a red star left of a blue cross", "a blue cross right of a red star", "红色星形在蓝色十字的左边"]
    asked = [Asked(str(i), parse_caption(text)) for i, text in enumerate([*alike, "a red star"])]
    examiner = Examiner(asked, JUDGE, 4, 0)
    assert examiner._others[:3] == [[3]] * 3 and len(examiner._others[3]) == 1
    assert "r_precision" not in Examiner(asked[:3], JUDGE, 4, 0).examine(0, pictures(0))


def test_the_oracle_judges_where_it_can_read_all_prompts_and_the_pictures() -> None:
    nobody = Judge(TEXT, None, None)
    scene = draw_scene(0, "val", 0)
    caption = draw_prompts("single_seen", 1, 0, "en")[0]
    asked = [Asked(caption.text, caption.facts)]
    assert not Examiner([*asked, Asked("1")], nobody, 32, 0).oracle
    assert not Examiner(asked, nobody, 16, 0).oracle
    examiner = Examiner(asked, nobody, 32, 0)
    assert examiner.oracle
    found = examiner.examine(0, np.stack([render(scene, 32), np.zeros((32, 32, 3), np.uint8)]))
    assert set(found) == {"right", "count", "colour", "shape"} and found["right"][1] == 0
    rng = np.random.default_rng(0)
    own = [Asked(phrase(caption.facts, "en", rng), caption.facts)]
    assert Examiner(own, nobody, 64, 0).oracle


def test_the_best_of_k_is_the_mean_over_blocks_of_k() -> None:
    score = np.array([[0.0, 3, 1, 2], [9, 1, 1, 5]])
    value = np.array([[10.0, 20, 30, 40], [1, 2, 3, 4]])
    assert best_of(score, value, 1).tolist() == value.mean(1).tolist()
    assert best_of(score, value, 2).tolist() == [30, 2.5]
    assert best_of(score, value, 3).tolist() == [20, 1]
    assert best_of(score, value, 4).tolist() == [20, 1]
    assert [numbers_up_to(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


@pytest.fixture(scope="module")
def groups(model_folders) -> dict[int, list]:
    """The candidates of two prompts, drawn 2, 3 and 6 at a time."""
    pipeline = TextToImage.load(model_folders, "cpu")
    return {k: pipeline.candidates(["a red square", "蓝色正方形"], k, seed=4) for k in (2, 3, 6)}


def records(groups: list) -> list[dict]:
    return [
        {
            "candidates": [{"index": s.image_index, "scores": s.scores} for s in group],
            "values": {"number": [float(s.image_index) for s in group]},
        }
        for group in groups
    ]


@pytest.mark.parametrize("k", [2, 3, 6])
def test_choosing_of_k_is_what_drawing_just_k_gives(groups: dict[int, list], k: int) -> None:
    asked = listed_prompts(["0", "1"])
    few = Candidates.from_records(asked, records([[s for s in group if s.image_index < k] for group in groups[6]]))
    own = Candidates.from_records(asked, records(groups[k]))
    assert own.rankings == ["clip", "caption", "both"]
    for ranking in own.rankings:
        best = [max(group, key=lambda s: s.scores[ranking]).image_index for group in groups[k]]
        assert own.chosen("number", ranking, k).tolist() == few.chosen("number", ranking, k).tolist() == best
    # and what the pipeline puts first is what it says that it ranks by
    assert own.chosen("number", "both", k).tolist() == [group[0].image_index for group in groups[k]]


def test_rows_hold_every_number_of_candidates_and_groups_of_prompts_the_most() -> None:
    star, circles = map(parse_caption, ("a red star", "三个红色圆形"))
    asked = [Asked("a", star, "single_seen", "en"), Asked("b", circles, None, "zh")]
    right = np.array([[0.0, 1, 1, 1], [1, 0, 0, 0]])
    size = np.array([[1.0, 1, 0, 0], [np.nan] * 4])
    best_first = np.array([[4.0, 3, 2, 1]] * 2)
    rows = alignment_rows(Candidates(asked, {"right": right, "size": size}, {"clip": best_first}))
    found = {(r.name, r.where["group"], r.where["chosen by"], r.where["of"]): r for r in rows}
    assert len(found) == len(rows)
    everything = "all prompts"
    assert found["right", everything, "random", 1].value == 0.5
    assert [found["right", everything, "clip", k].value for k in (1, 2, 4)] == [0.5, 0.5, 0.5]
    assert [found["right", everything, "any", k].value for k in (1, 2, 4)] == [0.5, 0.75, 1]
    assert found["size", everything, "random", 1].value == 0.5 and found["size", everything, "random", 1].n == 1
    assert found["right", "objects: 1", "clip", 4].value == 0 and found["right", "language: zh", "clip", 4].value == 1
    assert found["right", "prompts: single_seen", "random", 1].n == 1

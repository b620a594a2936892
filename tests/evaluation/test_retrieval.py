from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vqt2i.data.shapes import Caption
from vqt2i.evaluation.retrieval import r_precision
from vqt2i.generation import Sample

PROMPTS = [Caption(text, facts) for text, facts in (("0", "a"), ("1", "b"), ("2", "c"), ("3", "a"))]


class Clip:
    """Embeds the prompt of one id, and the picture whose first pixel is that id, in the same direction."""

    config = SimpleNamespace(text_length=1, image_size_px=4)

    def parameters(self) -> Iterator[Tensor]:
        return iter([torch.zeros(1)])

    def encode_text(self, ids_BS: Tensor, n_ids_B: Tensor) -> Tensor:
        return torch.eye(4)[ids_BS[:, 0]]

    def encode_image(self, image_B3HW: Tensor) -> Tensor:
        return torch.eye(4)[((image_B3HW[:, 0, 0, 0] + 1) * 127.5).round().long()]


def pictures(*ids: int) -> list[Sample]:
    return [Sample("", 0, 0, 0, np.full((4, 4, 3), i, np.uint8), np.zeros((1, 1))) for i in ids]


@pytest.mark.parametrize(("groups", "share"), [
    ([pictures(0), pictures(1), pictures(2), pictures(3)], 1.0),
    ([pictures(3), pictures(1), pictures(2), pictures(0)], 1.0),  # of the same facts
    ([pictures(1), pictures(0), pictures(0), pictures(2)], 0.0),
    ([pictures(0, 2), pictures(1, 1), pictures(0, 0), pictures(1, 3)], 0.5),
])  # fmt: skip
def test_it_is_the_share_of_pictures_whose_nearest_prompt_has_their_facts(groups: list, share: float) -> None:
    pipeline = SimpleNamespace(clip=Clip(), clip_text=SimpleNamespace(encode=lambda text: [int(text)]))
    assert r_precision(pipeline, PROMPTS, groups) == share

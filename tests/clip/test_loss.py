import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.clip.loss import contrastive_loss, recall_at, same_captions


def unit(n: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow(image_BE: Tensor, text_BE: Tensor, scale: float, same_BB: Tensor) -> float:
    """Row by row and column by column; an equal caption of another row is no candidate."""
    n, similarity, total = len(image_BE), (scale * image_BE @ text_BE.T).tolist(), 0.0
    for i in range(n):
        others = [j for j in range(n) if j == i or not same_BB[i, j]]
        total -= similarity[i][i] - math.log(sum(math.exp(similarity[i][j]) for j in others))
        total -= similarity[i][i] - math.log(sum(math.exp(similarity[j][i]) for j in others))
    return total / (2 * n)


@pytest.mark.parametrize("pairs", [[], [(0, 3)], [(0, 1), (1, 2), (0, 2)]])
def test_the_loss_equals_a_loop_with_equal_captions_left_out(pairs: list[tuple[int, int]]) -> None:
    image, text, same = unit(5, 0), unit(5, 1), torch.eye(5, dtype=torch.bool)
    for i, j in pairs:
        same[i, j] = same[j, i] = True
    loss = contrastive_loss(image, text, torch.tensor(7.0), same).loss
    assert float(loss) == pytest.approx(slow(image, text, 7.0, same), rel=1e-5)


def test_equal_captions_in_all_rows_cost_nothing() -> None:
    same = torch.ones(4, 4, dtype=torch.bool)
    out = contrastive_loss(unit(4, 0), unit(4, 1), torch.tensor(5.0), same)
    assert float(out.loss) == 0 and float(out.accuracy) == 1


def test_guessing_costs_the_logarithm_of_the_batch() -> None:
    loss = contrastive_loss(unit(16, 0), unit(16, 1), torch.tensor(0.0), torch.eye(16, dtype=torch.bool)).loss
    assert float(loss) == pytest.approx(math.log(16), rel=1e-6)


def test_accuracy_counts_images_that_pick_their_caption() -> None:
    text = torch.eye(4)
    image = text[[0, 1, 3, 2]]
    assert float(contrastive_loss(image, text, torch.tensor(9.0), torch.eye(4, dtype=torch.bool)).accuracy) == 0.5


def test_equal_rows_of_ids_are_the_same_caption() -> None:
    ids = torch.tensor([[1, 2, 0], [1, 2, 3], [1, 2, 0]])
    assert same_captions(ids).tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_recall_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.2], [0.3, 0.2, 0.1]])
    right = torch.eye(3, dtype=torch.bool)
    assert [float(recall_at(similarity, right, k)) for k in (1, 2, 3, 50)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [float(recall_at(similarity.T, right, k)) for k in (1, 2)] == pytest.approx([2 / 3, 1])
    right[2, 0] = True  # the third picture has the first caption too
    assert float(recall_at(similarity, right, 1)) == pytest.approx(2 / 3)

from collections import Counter

import pytest

from vqt2i.data.sampling import StepSampler


def test_every_sample_comes_once_per_epoch_and_batches_run_across_epochs() -> None:
    visits = [visit for batch in StepSampler(10, 4, 15, seed=0) for visit in batch]
    assert len(visits) == 60
    for epoch in range(6):
        part = visits[10 * epoch : 10 * (epoch + 1)]
        assert sorted(visit.index for visit in part) == list(range(10))
        assert {visit.epoch for visit in part} == {epoch}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [v.index for v in list(StepSampler(20, 20, 3, seed=seed))[epoch]]

    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(0, 1) == order(0, 1)


@pytest.mark.parametrize("batch_size", [4, 25])
def test_going_on_at_step_k_gives_the_batches_of_an_unbroken_run(batch_size: int) -> None:
    whole = list(StepSampler(10, batch_size, 9, seed=3))
    for first in (0, 1, 5, 8, 9):
        assert list(StepSampler(10, batch_size, 9, seed=3, first_step=first)) == whole[first:]


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_share_out_the_same_global_batch(n_ranks: int) -> None:
    whole = StepSampler(10, 6, 7, seed=1)
    ranks = [StepSampler(10, 6, 7, seed=1, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert Counter(batch) == Counter(visit for share in shares for visit in share)
        assert {len(share) for share in shares} == {6 // n_ranks}


def test_the_length_is_that_of_the_whole_run() -> None:
    assert len(StepSampler(10, 4, 15, seed=0, first_step=7)) == 15  # Lightning counts batches from the run's start

import numpy as np
import pytest

from vqt2i.data.sampling import LaneSampler, MixedSampler, StepSampler, Visits, draw, shuffled


def joined(steps: list[Visits]) -> Visits:
    return Visits(*map(np.concatenate, zip(*steps, strict=True)))


def same(a: list[Visits], b: list[Visits]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # a Visits is (2, B)


def test_every_sample_comes_once_per_epoch_and_batches_run_across_epochs() -> None:
    steps = list(StepSampler(10, 4, 15, seed=0))
    assert {len(visits.index_B) for visits in steps} == {4}
    visits = joined(steps)
    assert visits.epoch_B.tolist() == [epoch for epoch in range(6) for _ in range(10)]
    for epoch in range(6):
        assert sorted(visits.index_B[visits.epoch_B == epoch]) == list(range(10))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(StepSampler(20, 20, 3, seed=seed))[epoch].index_B.tolist()

    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(0, 1) == order(0, 1) == shuffled(20, 0, 1).tolist()


@pytest.mark.parametrize("batch_size", [4, 25])
def test_going_on_at_step_k_gives_the_batches_of_an_unbroken_run(batch_size: int) -> None:
    whole = list(StepSampler(10, batch_size, 9, seed=3))
    for first in (0, 1, 5, 8, 9):
        assert same(list(StepSampler(10, batch_size, 9, seed=3, first_step=first)), whole[first:])


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_share_out_the_same_global_batch(n_ranks: int) -> None:
    whole = StepSampler(10, 6, 7, seed=1)
    ranks = [StepSampler(10, 6, 7, seed=1, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        dealt = Visits(*(np.stack(parts, axis=1).reshape(-1) for parts in zip(*shares, strict=True)))
        assert same([dealt], [batch])


def test_the_length_is_that_of_the_whole_run() -> None:
    assert len(StepSampler(10, 4, 15, seed=0, first_step=7)) == 15  # Lightning counts batches from the run's start


def test_a_mixed_step_has_its_share_of_either_set_and_each_set_is_gone_through_as_alone() -> None:
    steps = list(MixedSampler((10, 100), 8, 3, 20, seed=2))
    for number, of in ((5, lambda index_B: index_B < 10), (3, lambda index_B: index_B >= 10)):
        size, offset = (10, 0) if number == 5 else (100, 10)
        for mixed, alone in zip(steps, StepSampler(size, number, 20, seed=2), strict=True):
            index_B, epoch_B = (part[of(mixed.index_B)] for part in mixed)
            found = sorted(zip(index_B - offset, epoch_B, strict=True))
            assert found == sorted(zip(*alone, strict=True)) and len(found) == number
    firsts = [visits.index_B[0] < 10 for visits in steps]
    assert any(firsts) and not all(firsts)  # no place in a batch belongs to one of the sets


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_a_mixed_run_goes_on_at_step_k_and_its_ranks_share_out_the_same_batch(n_ranks: int) -> None:
    whole = list(MixedSampler((10, 7), 8, 3, 9, seed=3))
    for first in (0, 5):
        ranks = [MixedSampler((10, 7), 8, 3, 9, seed=3, first_step=first, rank=r, n_ranks=n_ranks)
                 for r in range(n_ranks)]  # fmt: skip
        for batch, *shares in zip(whole[first:], *ranks, strict=True):
            dealt = Visits(*(np.stack(parts, axis=1).reshape(-1) for parts in zip(*shares, strict=True)))
            assert same([dealt], [batch])


GRID = Visits(*(part.reshape(-1) for part in np.mgrid[0:100, 0:100]))  # 100 samples in 100 epochs


def test_draws_are_even_over_0_to_1() -> None:
    drawn = draw("x", 0, GRID)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert abs(counts - 500).max() < 4 * 22  # the deviation of a count is 21.8


@pytest.mark.parametrize("other", [
    ("y", 0, GRID), ("x", 1, GRID), ("x", 0, GRID._replace(index_B=GRID.index_B + 1)),
    ("x", 0, GRID._replace(epoch_B=GRID.epoch_B + 1)), ("x", 0, Visits(GRID.epoch_B, GRID.index_B)),
])  # fmt: skip
def test_draws_of_other_things_seeds_samples_and_epochs_are_independent(other: tuple) -> None:
    a, b = draw("x", 0, GRID), draw(*other)
    unlike = a != b  # sample i in epoch i is itself when the two are exchanged
    assert unlike.sum() >= 9900
    assert abs(np.corrcoef(a[unlike], b[unlike])[0, 1]) < 0.04  # four deviations of 1 / sqrt(10,000)


def test_a_draw_does_not_depend_on_the_batch_it_is_made_in() -> None:
    whole = draw("x", 5, GRID)
    assert draw("x", 5, Visits(GRID.index_B[321:323], GRID.epoch_B[321:323])).tolist() == whole[321:323].tolist()


LANES = pytest.mark.parametrize(("n_ranks", "n_workers"), [(1, 0), (1, 3), (2, 0), (3, 2)])


def lane_samplers(n_ranks: int, n_workers: int, first_step: int = 0, n_steps: int = 30) -> list[LaneSampler]:
    """Of every rank: batches of 6 from blocks of 5."""
    place = {"first_step": first_step, "n_ranks": n_ranks, "n_workers": n_workers}
    return [LaneSampler(5, 6, n_steps, rank=rank, **place) for rank in range(n_ranks)]


@LANES
def test_lanes_read_all_of_their_own_blocks_and_nothing_twice(n_ranks: int, n_workers: int) -> None:
    seen = [joined(list(sampler)).index_B for sampler in lane_samplers(n_ranks, n_workers)]
    assert [len(positions) for positions in seen] == [30 * 6 // n_ranks] * n_ranks  # equal steps and batches
    assert sorted(np.concatenate(seen).tolist()) == list(range(180))  # each lane comes to the end of a block


@LANES
def test_each_worker_goes_through_its_blocks_in_order_wherever_the_run_went_on(n_ranks: int, n_workers: int) -> None:
    for first_step in (0, 1, 7):
        for sampler in lane_samplers(n_ranks, n_workers, first_step):
            steps, n = list(sampler), max(n_workers, 1)
            for worker in range(n):
                positions = joined(steps[worker::n]).index_B
                assert (np.diff(positions) > 0).all()
                assert len(set((positions // 5 % sampler.n_lanes).tolist())) == 1


@LANES
def test_a_stream_goes_on_at_step_k_as_if_it_had_never_stopped(n_ranks: int, n_workers: int) -> None:
    for first in (1, 4, 29, 30):
        whole, rest = (lane_samplers(n_ranks, n_workers, first_step) for first_step in (0, first))
        for a, b in zip(whole, rest, strict=True):
            assert same(list(a)[first:], list(b))

import numpy as np
import pytest

from vqt2i.evaluation.statistics import bootstrap_mean, estimate_by_halves


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap_mean(values)
    assert found.value == values.mean() and found.n == 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert found.low < found.value < found.high


def test_what_is_not_there_is_left_out_and_nothing_has_no_value() -> None:
    values = np.array([1.0, np.nan, 0.0, 1.0, np.nan, 0.0])
    assert bootstrap_mean(values) == bootstrap_mean(values[~np.isnan(values)])
    nothing = bootstrap_mean(np.array([np.nan]))
    assert np.isnan(nothing.value) and nothing.low is None and nothing.n == 0
    assert bootstrap_mean(np.ones(8))[:3] == (1, 1, 1)


@pytest.mark.parametrize("paired", [False, True])
def test_halves_give_the_standard_error_of_a_mean(paired: bool) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 1, 400), rng.normal(0, 1, 400)
    second += 3 * first  # what differs between pairs is less than what differs between unpaired halves

    def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        return {"difference": float(first[a].mean() - second[b].mean() / 3)}

    everything = np.arange(400)
    values = difference(everything, everything)
    found = estimate_by_halves(values, difference, 400, 400, paired=paired)["difference"]
    spread = first - second / 3 if paired else np.hypot(first.std(), second.std() / 3) * np.ones(1)
    error = (spread.std() if paired else float(spread[0])) / 20
    assert found.value == values["difference"] and found.n == 400
    # of 20 halves: the spread is known within a third or so
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.45)

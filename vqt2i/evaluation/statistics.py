"""Estimates with their 95 % intervals.

N values, R resamples
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
HALVES = 20
_NORMAL = 1.96  # standard errors to either side of a normal distribution's middle 95 %


class Estimate(NamedTuple):
    """A value with its 95 % interval, None where there is none; n: of how many prompts, pictures or the like."""

    value: float
    low: float | None
    high: float | None
    n: int


def bootstrap_mean(values_N: np.ndarray) -> Estimate:
    """The mean of what is not NaN; the interval holds the middle 95 % of the means of resamples (Efron 1979).

    It has no width where all values are equal. The resamples are the same at each call.
    """
    values_N = values_N[~np.isnan(values_N)]
    if not len(values_N):
        return Estimate(float("nan"), None, None, 0)
    means_R = values_N[_resamples(len(values_N))].mean(1)
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Estimate(float(values_N.mean()), float(low), float(high), len(values_N))


@lru_cache(maxsize=2)
def _resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n, size=(RESAMPLES, n))


def estimate_by_halves(
    values: dict[str, float],
    measure: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    n_first: int,
    n_second: int,
    *,
    paired: bool = False,
) -> dict[str, Estimate]:
    """`values`, which `measure` gives of two whole sets, with intervals from what it gives of random halves of them.

    The spread over halves drawn without replacement is the standard error of the whole, exactly so for a mean (Shao &
    Wu 1989). Resamples with replacement would hold samples twice, and distances between sets are biased by that:
    nearest neighbours at distance 0, covariances of fewer samples than there seem to be.

    Args:
        measure: takes the indices of a half of each set.
        paired: the same indices of both.
    """
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(HALVES):
        first, second = (rng.permutation(n)[: n // 2] for n in (n_first, n_second))
        for name, value in measure(first, first if paired else second).items():
            found[name].append(value)
    estimates = {}
    for name, value in values.items():
        margin = _NORMAL * float(np.std(found[name], ddof=1))
        estimates[name] = Estimate(value, value - margin, value + margin, n_first)
    return estimates

"""How the time of drawing an image grows with the number of its tokens."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPTConfig
from vqt2i.training.decoding.ceilings import RateMeter, Rates, least_seconds
from vqt2i.training.decoding.compare import Contestant, compare_decoding
from vqt2i.training.decoding.records import Row


class Fit(NamedTuple):
    """slope: of log time over log tokens. time ≈ linear · n + quadratic · n², in seconds, by least squares of relative
    errors: what a token costs by itself, and what it costs for each one before it, which attention reads."""

    slope: float
    linear: float
    quadratic: float


def grid_of(n_tokens: int, config: GPTConfig) -> GPTConfig:
    """The configuration with a square grid of so many tokens.

    Raises:
        ConfigError: no square number.
    """
    side = math.isqrt(n_tokens)
    if side**2 != n_tokens:
        raise ConfigError(f"{n_tokens} image tokens: expected a square number, for a grid as wide as high")
    grid = {"grid_height": side, "grid_width": side}
    return config.model_copy(update={"layout": config.layout.model_copy(update=grid)})


def measure_scaling(
    config: GPTConfig, wanted: Sequence[Contestant], *, lengths: Sequence[int], n_rounds: int, device: torch.device,
    meter: RateMeter,
) -> Iterator[list[Row]]:  # fmt: skip
    """Time one guided image of each length."""
    for sized in [grid_of(n_tokens, config) for n_tokens in lengths]:
        yield from compare_decoding(
            sized, wanted, counts=(1,), n_rounds=n_rounds, device=device, meter=meter, guidances=(True,)
        )


def fit(rows: Sequence[Row]) -> Fit:
    """Of the rows of one contestant, two lengths or more."""
    n = np.array([row.n_tokens for row in rows], float)
    seconds = np.array([row.timing.median for row in rows])
    slope, _ = np.polyfit(np.log(n), np.log(seconds), 1)
    (linear, quadratic), *_ = np.linalg.lstsq(np.stack((n, n**2), 1) / seconds[:, None], np.ones(len(n)), rcond=None)
    return Fit(float(slope), float(linear), float(quadratic))


def by_contestant(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each contestant and precision, shortest first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.n_tokens):
        found.setdefault((row.contestant, row.precision), []).append(row)
    return found


def plot_scaling(rows: Sequence[Row], config: GPTConfig, rates: Rates, path: Path) -> None:
    """Time over tokens, both logarithmic: what was measured, and the least that the machine's rates allow, dashed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs `matplotlib`, which is not installed; pip install 'vqt2i[plot]'") from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for (name, precision), found in by_contestant(rows).items():
        n = [row.n_tokens for row in found]
        label = f"{name}, {precision}" + (f": slope {fit(found).slope:.2f}" if len(found) > 1 else "")
        (line,) = axes.plot(n, [row.timing.median for row in found], "o-", label=label)
        least = [least_seconds(grid_of(count, config), precision, 1, True, rates).seconds for count in n]
        axes.plot(n, least, "--", color=line.get_color(), linewidth=1)
    axes.plot([], [], "--", color="grey", linewidth=1, label="least time by the machine's rates")
    axes.set(xscale="log", yscale="log", xlabel="image tokens", ylabel="seconds for one guided image")
    lengths = sorted({row.n_tokens for row in rows})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

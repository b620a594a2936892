"""The curves of finished trainings as one picture: what `tensorboard --logdir runs` shows, for a page that stays.

Of each run losses above and what it is for below, of training (a mean over 1 % of the steps) and validation.

    python experiments/curves.py runs/vqgan-emoji runs/gpt-emoji runs/clip-emoji --out docs/images/curves-emoji.png
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from vqt2i.errors import DataError
from vqt2i.training.record import read_record

# by kind of run: its loss, what it is for, and the unit of either
SHOWN = {
    "vqgan": (("loss", "loss"), ("psnr", "PSNR, dB")),
    "gpt": (("image", "image, nats per id"), ("text_from_image", "caption, nats per token")),
    "clip": (("loss", "loss"), ("image_to_text_r1", "R@1, image to text")),
}


def read_curve(run: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column of metrics.csv; empty where it has none."""
    with (run / "metrics.csv").open(newline="") as file:
        points = [(int(row["step"]) + 1, float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    steps, values = np.array(points).reshape(-1, 2).T
    return steps, values


def smoothed(steps: np.ndarray, values: np.ndarray, n_points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal stretches, at most `n_points`."""
    parts = np.array_split(np.arange(len(steps)), min(n_points, len(steps)))
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def draw_curves(runs: list[Path], out: Path) -> None:
    """A column of two panels for each run.

    Raises:
        DataError: a run of a kind that has no curves here.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(runs), figsize=(3.8 * len(runs), 4.6), layout="constrained", squeeze=False)
    for run, column in zip(runs, axes.T, strict=True):
        kind = read_record(run).kind
        if kind not in SHOWN:
            raise DataError(f"{run}: a run of kind {kind!r}; curves are drawn of {', '.join(SHOWN)}")
        for (name, label), axis in zip(SHOWN[kind], column, strict=True):
            for part, colour in (("train", "C7"), ("val", "C0")):
                steps, values = read_curve(run, f"{part}/{name}")
                if part == "train" and len(steps):
                    steps, values = smoothed(steps, values)
                axis.plot(steps, values, color=colour, linewidth=1.2, marker="." if part == "val" else None, label=part)
            axis.set(ylabel=label)
            if (values > 0).all() and name in ("loss", "image"):
                axis.set(yscale="log")
        column[0].set(title=run.name)
        column[0].legend(fontsize=8)
        column[1].set(xlabel="step")
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    draw_curves(args.runs, args.out)


if __name__ == "__main__":
    main()

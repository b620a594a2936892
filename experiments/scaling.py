"""How loss and alignment of the shapes' GPT fall with its size, its data and its steps, and what a power law predicts.

Each run is `tools/train_gpt.py` on pictures of the embedded shapes with the shipped image tokenizer, and then
`tools/evaluate.py` by the oracle; one of width, pictures and steps differs from `BASE`. Fitted is

    L(N, D, S) = floor + a (N/N0)^-alpha + b (D/D0)^-beta + c (S/S0)^-gamma

the sum of Hoffmann et al. 2022 (arXiv 2203.15556, equation 2) with a term for the steps, which are not enough;
N is the parameters less the embeddings, as in Kaplan et al. 2020 (arXiv 2001.08361, section 2.1). For given exponents
the rest is linear, so the exponents are searched on a grid and no fit depends on where it began. Its range is that of
the fits that leave one run out.

Writes DIR/runs.jsonl (a row for each finished run; the same command goes on where it was), scaling.json, scaling.md and
scaling.png.

    python experiments/scaling.py --out runs/scaling
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
from journal import Journal, row_of

from vqt2i.checkpoint import load_model, read_card
from vqt2i.evaluation.result import Row, read_result
from vqt2i.files import write_atomic, write_json
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.runtime import say

ROOT = Path(__file__).parents[1]
IMAGE_TOKENIZER = "vqt2i/pretrained/shapes32/vq"
BATCH_SIZE, LEARNING_RATE = 24, 4e-3
KINDS = ("single_seen", "single_unseen", "two_seen")
EXPONENTS = np.arange(0.1, 2.01, 0.1)


@dataclass(frozen=True)
class Run:
    """width: of the GPT, whose heads have 32. n_pictures: of its training set. n_steps: of 24 samples."""

    width: int
    n_pictures: int
    n_steps: int

    @property
    def name(self) -> str:
        return f"w{self.width}-d{self.n_pictures}-s{self.n_steps}"


BASE = Run(128, 100_000, 800)
RUNS = (
    *(replace(BASE, width=width) for width in (32, 64, 128, 192)),
    *(replace(BASE, n_pictures=n) for n in (1000, 4000, 16_000)),
    *(replace(BASE, n_steps=n) for n in (200, 400, 1600)),
)


@dataclass(frozen=True)
class Result:
    """n_weights: without embeddings. loss: of validation images, nats per id. right: share by kind of prompt."""

    n_weights: int
    loss: float
    right: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Terms in nats at the base run."""

    floor: float
    terms: tuple[float, float, float]
    exponents: tuple[float, float, float]

    def at(self, times: np.ndarray) -> np.ndarray:
        """The loss where weights, pictures and steps are `times` (..., 3) those of the base run."""
        return self.floor + (np.array(self.terms) * times ** -np.array(self.exponents)).sum(-1)


def train_command(run: Run, data: Path, out: Path) -> list[str]:
    settings = {
        "name": run.name, "data.path": data / f"shapes-{run.n_pictures}", "transformer.width": run.width,
        "transformer.n_heads": run.width // 32, "transformer.mlp_width": run.width * 8 // 3 // 8 * 8,
        "training.optimizer.learning_rate": LEARNING_RATE * min(1, BASE.width / run.width),
        "trainer.max_steps": run.n_steps, "trainer.validate_every_steps": run.n_steps, "trainer.batch_size": BATCH_SIZE,
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train_gpt.py", "--vq", IMAGE_TOKENIZER, "--runs", str(out), "--resume", *sets]


def _tool(*command: str) -> None:
    say(f"python tools/{' '.join(command)}")
    subprocess.run([sys.executable, ROOT / "tools" / command[0], *command[1:]], check=True, cwd=ROOT)


def prepare(n_pictures: int, data: Path) -> None:
    """Draw a data set and encode it, so that runs at once find it there."""
    pictures = data / f"shapes-{n_pictures}"
    if not pictures.is_dir():
        _tool("make_dataset.py", "shapes", "--n-train", str(n_pictures), "--out", str(pictures))
    _tool("encode_dataset.py", "--data", str(pictures), "--vq", IMAGE_TOKENIZER)


def finish(run: Run, data: Path, out: Path, n_prompts: int) -> Result:
    """Train and measure, or go on where an earlier process was."""
    folder = out / run.name
    model, evaluation = folder / "model", folder / "measured"
    if not model.is_dir() or read_card(model)["steps"] < run.n_steps:
        _tool(*train_command(run, data, out))
    _tool("evaluate.py", str(folder), "--runs", str(out), "--measure", "alignment", "--kinds", ",".join(KINDS),
          "--n-prompts", str(n_prompts), "--rerank", "4", "--out", str(evaluation))  # fmt: skip
    right = right_by_kind(read_result(evaluation).measures["alignment"].rows)
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["val/image"]) for row in csv.DictReader(file) if row["val/image"]]
    gpt = load_model(model, GPTConfig, GPT)
    n_weights = sum(p.numel() for p in gpt.transformer.parameters())
    return Result(n_weights, losses[-1], right, read_card(model)["seconds"])


def right_by_kind(rows: Sequence[Row]) -> dict[str, float]:
    """The unreranked share of pictures that are all right, by kind of prompt."""
    return {
        kind: row.value
        for kind in KINDS
        for row in rows
        if row.name == "right" and row.where == {"group": f"prompts: {kind}", "chosen by": "random", "of": 1}
    }


def fit(times_R3: np.ndarray, loss_R: np.ndarray) -> Fit:
    """Least squares of L over relative sizes, pictures and steps, of all exponents in EXPONENTS.

    Floor and terms are not negative: of all their sets (there are 15), those that come out so are compared.
    """
    exponents_E3 = np.array(list(product(EXPONENTS, repeat=3)))
    terms_ER3 = times_R3 ** -exponents_E3[:, None]
    columns_ER4 = np.concatenate([np.ones_like(terms_ER3[..., :1]), terms_ER3], axis=2)
    best, error = None, np.inf
    for kept in (list(kept) for size in range(1, 5) for kept in combinations(range(4), size)):
        columns_ERK = columns_ER4[..., kept]
        found_EK = np.linalg.pinv(columns_ERK) @ loss_R
        error_E = (((columns_ERK @ found_EK[..., None])[..., 0] - loss_R) ** 2).sum(1)
        error_E[(found_EK < 0).any(1)] = np.inf
        i = int(error_E.argmin())
        if error_E[i] < error:
            error, weights_4 = float(error_E[i]), np.zeros(4)
            weights_4[kept] = found_EK[i]
            best = Fit(float(weights_4[0]), tuple(map(float, weights_4[1:])), tuple(map(float, exponents_E3[i])))
    return best


def times_of(results: dict[Run, Result]) -> np.ndarray:
    """Weights, pictures and steps of each run over those of the base run, (R, 3)."""
    base = results[BASE]
    return np.array([(result.n_weights / base.n_weights, run.n_pictures / BASE.n_pictures, run.n_steps / BASE.n_steps)
                     for run, result in results.items()])  # fmt: skip


def fits_of(results: dict[Run, Result]) -> list[Fit]:
    """That of all runs, then those that leave one out (never the base run, which the terms are told at)."""
    times_R3, loss_R = times_of(results), np.array([result.loss for result in results.values()])
    others = [i for i, run in enumerate(results) if run != BASE]
    return [fit(times_R3, loss_R), *(fit(np.delete(times_R3, i, 0), np.delete(loss_R, i)) for i in others)]


def error_law(results: dict[Run, Result], kind: str) -> tuple[float, float]:
    """(p, k) of: share that is wrong = k L^p, by least squares of logarithms, of runs between 0 and 1."""
    points = [(result.loss, 1 - result.right[kind]) for result in results.values() if 0 < result.right[kind] < 1]
    p, log_k = np.polyfit(*np.log(np.array(points)).T, 1)
    return float(p), float(np.exp(log_k))


PREDICTED = {
    "this much": (1, 1, 1), "100 x the parameters": (100, 1, 1), "100 x the pictures": (1, 100, 1),
    "100 x the steps": (1, 1, 100), "100 x all three": (100, 100, 100),
}  # fmt: skip


def tables(results: dict[Run, Result], fits: Sequence[Fit]) -> str:
    """Markdown: the runs, the law, what it predicts."""
    law, left_out = fits[0], fits[1:]
    lines = ["| parameters | pictures | steps | image loss | by the law | " + " | ".join(KINDS) + " | minutes |",
             "|---" * (6 + len(KINDS)) + "|"]  # fmt: skip
    for (run, result), told in zip(results.items(), law.at(times_of(results)), strict=True):
        right = " | ".join(f"{result.right[kind]:.0%}" for kind in KINDS)
        lines.append(f"| {result.n_weights:,} | {run.n_pictures:,} | {run.n_steps:,} | {result.loss:.3f} | {told:.3f} "
                     f"| {right} | {result.seconds / 60:.1f} |")  # fmt: skip
    lines += ["", "| term | nats, base run | exponent |", "|---|---|---|",
              f"| floor | {_ranged([f.floor for f in fits])} | |"]  # fmt: skip
    for i, name in enumerate(("parameters", "pictures", "steps")):
        exponents = _ranged([f.exponents[i] for f in fits], 2) if law.terms[i] else "none fits"
        lines.append(f"| {name} | {_ranged([f.terms[i] for f in fits])} | {exponents} |")
    lines += ["", "| | image loss | " + " | ".join(f"{kind} right" for kind in KINDS) + " |",
              "|---" * (2 + len(KINDS)) + "|"]  # fmt: skip
    for name, times in PREDICTED.items():
        losses = [float(f.at(np.array(times))) for f in (law, *left_out)]
        shares = []
        for kind in KINDS:
            p, k = error_law(results, kind)
            shares.append(f"{max(0.0, 1 - k * losses[0] ** p):.0%}")
        lines.append(f"| {name} | {_ranged(losses)} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def _ranged(values: Sequence[float], digits: int = 3) -> str:
    """The first, and in brackets the least and the most of all."""
    return f"{values[0]:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot(results: dict[Run, Result], law: Fit, path: Path) -> None:
    """Loss with the law above, shares that are right below, over parameters, pictures and steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.6), sharex="col", sharey="row", layout="constrained")
    times_R3, scales = times_of(results), (results[BASE].n_weights, BASE.n_pictures, BASE.n_steps)
    for i, (name, scale) in enumerate(zip(("parameters", "pictures", "steps"), scales, strict=True)):
        alone = np.delete(times_R3, i, 1) == 1
        rows = sorted((times[i] * scale, result) for times, same, result
                      in zip(times_R3, alone.all(1), results.values(), strict=True) if same)  # fmt: skip
        x = [x for x, _ in rows]
        curve = np.ones((100, 3))
        curve[:, i] = np.geomspace(x[0] / scale, 100, 100)
        axes[0][i].plot(curve[:, i] * scale, law.at(curve), color="C7", linewidth=1, label="law")
        axes[0][i].plot(x, [result.loss for _, result in rows], "o", color="C0", label="run")
        for colour, kind in enumerate(KINDS):
            axes[1][i].plot(x, [result.right[kind] for _, result in rows], "o-", color=f"C{colour}", label=kind)
        axes[1][i].set(xlabel=name, xscale="log")
    axes[0][0].set(ylabel="val image, nats per id", yscale="log")
    axes[1][0].set(ylabel="right, unreranked")
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), metavar="DIR")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="holds shapes-1000 and so on")
    parser.add_argument("--n-prompts", type=int, default=100, help="of each kind (default: 100), 4 pictures of each")
    parser.add_argument("--at-once", type=int, default=1, help="runs that train side by side (default: 1)")
    args = parser.parse_args()
    args.out, args.data = args.out.resolve(), args.data.resolve()  # the tools run in the repository's root
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out / "runs.jsonl", Run, Result)
    missing = [run for run in RUNS if run not in journal.read()]
    for n_pictures in sorted({run.n_pictures for run in missing}):
        prepare(n_pictures, args.data)
    with ThreadPoolExecutor(args.at_once) as pool:
        found = {pool.submit(finish, run, args.data, args.out, args.n_prompts): run for run in missing}
        for done in as_completed(found):
            journal.add(found[done], done.result())
    known = journal.read()
    results = {run: known[run] for run in RUNS}
    fits = fits_of(results)
    rows = [row_of(run, result) for run, result in results.items()]
    write_json(args.out / "scaling.json", {"runs": rows, "fit": asdict(fits[0])})
    write_atomic(args.out / "scaling.md", tables(results, fits))
    plot(results, fits[0], args.out / "scaling.png")
    print(tables(results, fits))


if __name__ == "__main__":
    main()

"""Which of four remedies keep a small GPT from diverging at high learning rates in 16 bits, and at which step it does.

CogView (arXiv 2105.13290, §2.4) trained in fp16 by PB-relax and Sandwich-LN; later models use qk-norm (Henry et al.
2020) and z-loss (PaLM, Chowdhery et al. 2022, §5). Each run trains the same GPT on the embedded shapes, without warm-up
or clipping, with one of them, with CogView's two, with all or with none.

- bf16: weights, activations and AdamW's moments are in bf16.
- fp16: fp32 numbers with the range of fp16, simulated, for CPUs are slow in fp16 itself: a run in which a linear map or
  a product of queries and keys gives more than 65,504 ends there, for it would be infinite. PB-relax holds the products
  α times smaller. fp16's precision is not simulated.

A run has diverged at the first step after `SETTLED` at which the image loss of ten steps is more than that of guessing
(ln of the number of ids), or that is not finite or not in range. Writes DIR/runs.jsonl (a row for each finished run;
the same command goes on where it was), stability.json, stability.md and stability.png.

    python experiments/stability.py --out runs/stability
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from journal import Journal, row_of
from torch import Tensor, nn

from vqt2i.files import write_atomic, write_json
from vqt2i.generation.find import find_image_tokenizer
from vqt2i.gpt import GPT, GPTConfig, LayoutConfig, LossWeights, gpt_loss
from vqt2i.nn.attention import RELAXATION
from vqt2i.nn.transformer import Attention, TransformerConfig
from vqt2i.runtime import say
from vqt2i.text import TextTokenizer
from vqt2i.training.batches import TokenSamples, training_loader
from vqt2i.training.encode import ensure_store
from vqt2i.training.run import DataConfig, open_dataset

TEXT_LENGTH, BATCH_SIZE, SETTLED = 24, 16, 40
FP16_LARGEST = 65_504.0
BASE = {
    "width": 64, "n_layers": 4, "n_heads": 4, "mlp_width": 256, "norm": "layer", "norm_eps": 1e-5, "mlp": "gelu_tanh",
    "bias": True, "qk_norm": False,
}  # fmt: skip
COGVIEW = {"pb_relax": True, "norm_placement": "sandwich"}
# what differs in the transformer, and the weight of the z-loss
VARIANTS: dict[str, tuple[dict[str, object], float]] = {
    "none": ({}, 0.0),
    "PB-relax": ({"pb_relax": True}, 0.0),
    "Sandwich-LN": ({"norm_placement": "sandwich"}, 0.0),
    "qk-norm": ({"qk_norm": True}, 0.0),
    "z-loss": ({}, 1e-3),
    "PB-relax + Sandwich-LN": (COGVIEW, 0.0),
    "all": (COGVIEW | {"qk_norm": True}, 1e-3),
}


@dataclass(frozen=True)
class Run:
    variant: str
    precision: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """diverged_at: step, or None. why: "not finite", "out of range" or "worse than guessing". losses: of the image."""

    diverged_at: int | None
    why: str | None
    largest_score: float
    losses: list[float]


class RangeError(Exception):
    """A number that fp16 does not have."""


class Watch:
    """The largest product of queries and keys as it is held, and, of fp16's range, an end to what is out of it."""

    def __init__(self, gpt: GPT, fp16_range: bool) -> None:
        self.fp16_range, self.largest, self._q = fp16_range, 0.0, {}
        for module in gpt.modules():
            if isinstance(module, Attention):
                module.q_norm.register_forward_hook(self._keep_q(module))
                module.k_norm.register_forward_hook(self._multiply(module))
            elif isinstance(module, nn.Linear) and fp16_range:
                module.register_forward_hook(lambda module, inputs, output: self._check(output))

    def _keep_q(self, attention: Attention):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], q_BNLH: Tensor) -> None:
            self._q[attention.layer] = q_BNLH.detach()

        return hook

    def _multiply(self, attention: Attention):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], k_BNLH: Tensor) -> None:
            scale = k_BNLH.shape[-1] ** -0.5 / (RELAXATION if attention.relaxed else 1.0)
            held = self._q.pop(attention.layer).float() @ k_BNLH.detach().float().mT * scale
            self.largest = max(self.largest, float(held.abs().max()))
            if self.fp16_range:
                self._check(held)

        return hook

    def _check(self, x: Tensor) -> None:
        if x.detach().abs().max() > FP16_LARGEST:
            raise RangeError


def train(run: Run, samples: TokenSamples, layout: LayoutConfig, n_steps: int) -> Result:
    """One training; the seed is that of the weights and of the batches."""
    changes, z = VARIANTS[run.variant]
    torch.manual_seed(run.seed)
    gpt = GPT(GPTConfig(
        transformer=TransformerConfig(**BASE | changes), layout=layout, positions="learned", text_tokenizer="none",
        image_tokenizer="none",
    ))  # fmt: skip
    gpt = gpt.bfloat16() if run.precision == "bf16" else gpt
    watch = Watch(gpt, run.precision == "fp16")
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.04)
    batches = training_loader(
        samples, batch_size=BATCH_SIZE, n_steps=n_steps, first_step=0, seed=run.seed, text_length=layout.text_length,
        n_workers=0, rank=0, n_ranks=1,
    )  # fmt: skip
    guess, losses = math.log(layout.n_image_ids), []
    for step, batch in enumerate(batches):
        try:
            loss = gpt_loss(gpt, batch.text, batch.image_ids.flatten(1), 0, LossWeights(z=z))
        except RangeError:
            return Result(step, "out of range", watch.largest, losses)
        if not loss.total.isfinite():
            return Result(step, "not finite", watch.largest, losses)
        losses.append(round(loss.image.item(), 4))
        if step >= SETTLED and sum(losses[-10:]) / 10 > guess:
            return Result(step, "worse than guessing", watch.largest, losses)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return Result(None, None, watch.largest, losses)


def shapes() -> tuple[TokenSamples, LayoutConfig]:
    """The embedded data set's ids by the shipped tokenizers, made where they are not there yet."""
    dataset, tokenizer = open_dataset(DataConfig()), TextTokenizer.load(Path("tokenizers/bilingual.model"))
    _, vq = find_image_tokenizer(Path("vqt2i/pretrained/shapes32/vq"), Path("runs"))
    store, grid = ensure_store(dataset, vq, tokenizer, ("train", "val")), vq.config.grid_height
    return TokenSamples(store.split("train"), 0), LayoutConfig(
        n_text_ids=tokenizer.n_ids, n_image_ids=vq.config.vocab_size, text_length=TEXT_LENGTH, grid_height=grid,
        grid_width=grid,
    )  # fmt: skip


def _train(task: tuple[Run, TokenSamples, LayoutConfig, int]) -> tuple[Run, Result]:
    torch.set_num_threads(1)
    return task[0], train(*task)


def finish(
    runs: list[Run], n_steps: int, n_processes: int, journal: Journal[Run, Result]
) -> Iterator[tuple[Run, Result]]:
    """Train those that `journal` does not hold; write and yield each as it ends."""
    missing = [run for run in runs if run not in journal.read()]
    if not missing:
        return
    samples, layout = shapes()
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes) as pool:
        for run, result in pool.imap_unordered(_train, [(run, samples, layout, n_steps) for run in missing]):
            journal.add(run, result)
            yield run, result


def cell(results: list[Result]) -> str:
    """How many diverged, why and at which steps, and the last loss of the others."""
    diverged = [r for r in results if r.diverged_at is not None]
    parts = [f"{len(diverged)} of {len(results)}"]
    for why in sorted({r.why for r in diverged}):
        steps = sorted(r.diverged_at for r in diverged if r.why == why)
        parts.append(f"{why} at {', '.join(map(str, steps))}")
    last = [sum(r.losses[-10:]) / len(r.losses[-10:]) for r in results if r.diverged_at is None]
    return "; ".join(parts + ([f"loss {sum(last) / len(last):.2f}"] if last else []))


def table(results: dict[Run, Result]) -> str:
    """Markdown: variants down, precisions and learning rates across."""
    columns = sorted({(run.precision, run.learning_rate) for run in results})
    head = ["diverged", *(f"{precision}, {rate:g}" for precision, rate in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in VARIANTS:
        found = [[r for run, r in results.items() if (run.variant, run.precision, run.learning_rate) == (name, *column)]
                 for column in columns]  # fmt: skip
        if any(found):
            lines.append("| " + " | ".join([name, *(cell(part) if part else "" for part in found)]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[Run, Result], path: Path) -> None:
    """A row for each precision, a column for each rate, a colour for each variant; a cross where a run diverged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = sorted({run.precision for run in results})
    rates = sorted({run.learning_rate for run in results})
    size = (3.8 * len(rates), 2.6 * len(precisions) + 0.4)
    figure, axes = pyplot.subplots(
        len(precisions), len(rates), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, column in zip(axes.flat, product(precisions, rates), strict=True):
        for colour, name in enumerate(VARIANTS):
            for run, result in results.items():
                if (run.variant, run.precision, run.learning_rate) != (name, *column) or not result.losses:
                    continue
                look = {"color": f"C{colour}", "label": name if run.seed == 0 else None}
                axis.plot(result.losses, linewidth=0.9, **look)
                if result.diverged_at is not None:
                    axis.plot(len(result.losses) - 1, min(result.losses[-1], 12), "x", color=f"C{colour}", markersize=8)
        axis.set(title=f"{column[0]}, learning rate {column[1]:g}", ylim=(0, 12))
    figure.supxlabel("step")
    figure.supylabel("image loss, nats per id")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5, 1.0])
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp16"), default=["bf16", "fp16"])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(variant, precision, rate, seed)
        for seed, precision, rate, variant in product(range(args.seeds), args.precisions, args.rates, VARIANTS)
    ]
    journal = Journal(args.out / "runs.jsonl", Run, Result)
    for run, result in finish(runs, args.steps, args.processes, journal):
        say(f"{run}: {result.why or 'trained'} {'' if result.diverged_at is None else result.diverged_at}, "
            f"largest product {result.largest_score:,.0f}")  # fmt: skip
    results = {run: result for run, result in journal.read().items() if run in runs}
    rows = [row_of(run, result) for run, result in results.items()]
    write_json(args.out / "stability.json", {"steps": args.steps, "batch_size": BATCH_SIZE, "runs": rows})
    write_atomic(args.out / "stability.md", table(results))
    plot(results, args.out / "stability.png")
    print(table(results))


if __name__ == "__main__":
    main()

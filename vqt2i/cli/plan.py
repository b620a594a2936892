"""What training a GPT needs, before it starts: parameters, memory per GPU, time and cost.

Lists every ZeRO stage, with and without offloading and activation checkpointing, and names the first that fits. Memory
is calculated, not measured: docs/scale.md compares it with measurements. Nothing is allocated or trained.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vqt2i.cli.options import add_config_arguments

if TYPE_CHECKING:
    from vqt2i.training.gpt_config import GPTRunConfig, TokenizerSizes
    from vqt2i.training.plan import Estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, "gpt")
    parser.add_argument("--gpus", type=_positive(int), default=1, metavar="N", help="over all nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=_positive(int), default=8, metavar="N", help="default: 8")
    parser.add_argument("--gpu-memory", type=_positive(float), default=80.0, metavar="GB",
                        help="of one GPU, in 10^9 bytes (default: 80)")  # fmt: skip
    parser.add_argument("--batch-per-gpu", type=_positive(int), metavar="N", help="samples that a GPU holds at once "
                        "(default: its share of trainer.batch_size, by trainer.accumulate)")  # fmt: skip
    parser.add_argument("--tokens", type=_positive(float), metavar="T", help="to train on, all positions of the "
                        "sequences counted (default: those of trainer.max_steps)")  # fmt: skip
    parser.add_argument("--tokens-per-second", type=_positive(float), metavar="X",
                        help="measured rate of all GPUs together (default: assumed from the next two)")  # fmt: skip
    parser.add_argument("--peak-tflops", type=_positive(float), default=312.0, metavar="X",
                        help="of one GPU at dense bf16 products (default: 312, an A100)")  # fmt: skip
    parser.add_argument("--mfu", type=_positive(float), default=0.4, metavar="SHARE",
                        help="share of the peak that the step is assumed to reach (default: 0.4)")  # fmt: skip
    parser.add_argument("--price", type=_positive(float), metavar="X", help="of one GPU for one hour; tells the cost")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the plan as JSON (default: print only)")


def run(args: argparse.Namespace) -> None:
    import dataclasses
    from datetime import timedelta

    from vqt2i.config import load_config
    from vqt2i.errors import ConfigError
    from vqt2i.files import write_json
    from vqt2i.training.gpt_config import GPTRunConfig
    from vqt2i.training.plan import GB, Hardware, cost, count_parameters, estimate_all

    config = load_config(GPTRunConfig, args.config, args.overrides)
    model = config.model(config.sizes or _sizes_on_disk(config, args.runs), "planned", "planned")
    hardware = Hardware(args.gpus, int(args.gpu_memory * GB), args.gpus_per_node)
    share, rest = divmod(config.trainer.batch_size, args.gpus)
    at_once = args.batch_per_gpu or share // config.trainer.accumulate
    if rest or not at_once or share % at_once:
        raise ConfigError(f"trainer.batch_size {config.trainer.batch_size}: cannot be split over {args.gpus} GPUs of "
                          f"{at_once or 1} samples at once; expected a multiple of their product")  # fmt: skip
    precision = "bf16" if config.trainer.precision == "auto" else config.trainer.precision
    estimates = estimate_all(model, hardware, batch_per_gpu=at_once, precision=precision)
    chosen = next((e for e in estimates if e.fits), None)
    length = model.sequence_layout.length
    costs = cost(
        model, args.gpus, int(args.tokens or config.trainer.max_steps * config.trainer.batch_size * length),
        tokens_per_second=args.tokens_per_second, peak_tflops=args.peak_tflops, mfu=args.mfu,
        activation_checkpointing=chosen is not None and chosen.setting.activation_checkpointing,
    )  # fmt: skip
    n_parameters = count_parameters(model).total
    print(f"{args.config}: {n_parameters:,} parameters, sequences of {length:,} positions")
    print(f"{args.gpus} GPUs of {args.gpu_memory:g} GB, of which {hardware.usable / GB:g} GB are planned with; "
          f"{precision}; {at_once} samples at once on each, {share // at_once} times per step")  # fmt: skip
    _print_table(estimates)
    fewer = next((f"; {e.setting} fits {e.largest_batch} samples at once" for e in estimates if e.largest_batch), "")
    print(f"smallest setting that fits: {chosen.setting if chosen else f'none{fewer}'}")
    money = f", {costs.gpu_hours * args.price:,.0f} at {args.price:g} per GPU hour" if args.price else ""
    print(f"{costs.tokens:.3g} tokens, {costs.flops:.3g} FLOP at {costs.tokens_per_second:,.0f} tokens/s "
          f"({costs.throughput}):")  # fmt: skip
    print(f"{timedelta(seconds=round(costs.seconds))}, {costs.gpu_hours:,.2f} GPU hours{money}")
    if args.out:
        plan = {
            "config": str(args.config),
            "model": model.model_dump(mode="json"),
            "parameters": n_parameters,
            "hardware": dataclasses.asdict(hardware) | {"usable": hardware.usable},
            "precision": precision,
            "batch_per_gpu": at_once,
            "accumulated": share // at_once,
            "estimates": [dataclasses.asdict(e) | {"name": str(e.setting), "total": e.total} for e in estimates],
            "chosen": str(chosen.setting) if chosen else None,
            "cost": dataclasses.asdict(costs) | {"price": costs.gpu_hours * args.price if args.price else None},
        }
        write_json(args.out, plan)


def _positive(number: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = number(text)
        if value <= 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {number.__name__}"  # argparse tells it
    return parse


def _sizes_on_disk(config: "GPTRunConfig", runs: Path) -> "TokenizerSizes":
    from vqt2i.generation.find import find_image_tokenizer
    from vqt2i.text import load_tokenizer
    from vqt2i.training.gpt_config import tokenizer_sizes

    _, vq = find_image_tokenizer(config.image_tokenizer, runs)
    return tokenizer_sizes(load_tokenizer(config.text_tokenizer), vq)


def _print_table(estimates: "list[Estimate]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from vqt2i.training.plan import GB

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("setting (GB per GPU)")
    for name in ("states", "buffers", "activations", "total", "fits", "samples that fit", "host per node"):
        table.add_column(name, justify="right")
    for e in estimates:
        sizes = [f"{size / GB:,.2f}" for size in (e.states, e.buffers, e.activations, e.total)]
        table.add_row(str(e.setting), *sizes, "yes" if e.fits else "no", f"{e.largest_batch:,}", f"{e.host / GB:,.1f}")
    Console(width=116, highlight=False).print(table)

"""Measure how fast a part of this stack is on this machine, or how good the kinds of quantizer are."""

import argparse
from pathlib import Path
from typing import Any

from vqt2i.cli import benchmark_generate
from vqt2i.cli.benchmark_generate import add_gpt_argument, load_untrained_gpt
from vqt2i.cli.options import add_config_arguments, add_number, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    data = parts.add_parser("data", help="sequences a second that training gets out of a token store")
    data.add_argument("--store", type=Path, metavar="DIR", help="default: one of random ids, made for the measurement")
    data.add_argument("--split", default="train", help="default: train")
    add_number(data, "--batch-size", 64)
    add_number(data, "--text-length", 120)
    add_number(data, "--workers", 0, "0 is all in this process", least=0)
    add_number(data, "--seconds", 10.0, "how long to measure", least=0.01, metavar="S")
    data.set_defaults(run=_data)

    train = parts.add_parser("train", help="training steps a second of a GPT, beside transformers' Llama of its size")
    add_gpt_argument(train)
    train.add_argument("--text-ids", type=at_least(1), metavar="N", help="another text vocabulary than the "
                       "configuration's")  # fmt: skip
    add_number(train, "--batch-size", 4)
    train.add_argument("--precision", choices=("fp32", "bf16"), help="default: one after the other")
    add_number(train, "--rounds", 5, "steps of each, in turns")
    train.add_argument("--no-compile", action="store_true", help="time plain PyTorch only")
    train.set_defaults(run=_train)

    generate = parts.add_parser("generate", help="image tokens a second drawn by a GPT, beside transformers' Llama; "
                                "memory, parts, growth with the tokens")  # fmt: skip
    benchmark_generate.add_arguments(generate)
    generate.set_defaults(run=benchmark_generate.run)

    vqgan = parts.add_parser("vqgan", help="images a second of an image tokenizer, beside diffusers' VQModel")
    vqgan.add_argument(
        "--config", type=Path, default=Path("configs/vqgan/taming_128.yaml"), metavar="FILE",
        help="an image tokenizer of architecture taming (default: configs/vqgan/taming_128.yaml)",
    )  # fmt: skip
    add_number(vqgan, "--batch-size", 4)
    add_number(vqgan, "--rounds", 7, "of each, in turns")
    vqgan.set_defaults(run=_vqgan)

    quantizers = parts.add_parser("quantizers", help="an image tokenizer trained with each kind of quantizer")
    add_config_arguments(quantizers, "vqgan")
    quantizers.add_argument("--out", type=Path, metavar="FILE", help="also write the table here, and beside it as JSON")
    quantizers.set_defaults(run=_quantizers)


def run(args: argparse.Namespace) -> None:
    args.run(args)


def _data(args: argparse.Namespace) -> None:
    from vqt2i.training.benchmark import measure_store

    rate = measure_store(
        args.store, args.split, batch_size=args.batch_size, text_length=args.text_length, n_workers=args.workers,
        seconds=args.seconds,
    )  # fmt: skip
    print(f"{rate.median:,.0f} sequences/s (median of {rate.n}; {rate.lowest:,.0f} to {rate.highest:,.0f}), "
          f"batches of {args.batch_size}")  # fmt: skip


def _train(args: argparse.Namespace) -> None:
    import torch

    from vqt2i.runtime import pick_device
    from vqt2i.training.compare import compare_training
    from vqt2i.training.plan import count_parameters

    config = load_untrained_gpt(args.config)
    sizes = config.sizes.model_copy(update={"n_text_ids": args.text_ids or config.sizes.n_text_ids})
    config = config.model_copy(update={"sizes": sizes})
    gpt, device = config.model(sizes, "none", "none"), pick_device()
    print(f"{count_parameters(gpt).total / 1e6:,.1f} M parameters, {sizes.n_text_ids:,} text and {sizes.n_image_ids:,} "
          f"image ids, {config.text_length} + {sizes.grid_height * sizes.grid_width} tokens, batches of "
          f"{args.batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    for precision in (args.precision,) if args.precision else ("fp32", "bf16"):
        found = compare_training(
            gpt, precision, batch_size=args.batch_size, loss=config.training.loss, n_rounds=args.rounds,
            n_reversed=round(config.training.reversed_share * args.batch_size), compiled=not args.no_compile,
            device=device,
        )  # fmt: skip
        print(f"{precision}: matrix products run at {found.matmul_rate / 1e9:,.0f} GFLOP/s here")
        _print_timings(found.timings, found.n_tokens, "tokens", "vqt2i", "transformers")
        best = min(timing.median for name, timing in found.timings.items() if name.startswith("vqt2i"))
        print(f"  vqt2i at its best: {found.flops / best / found.matmul_rate:.0%} of the rate of matrix products")


def _vqgan(args: argparse.Namespace) -> None:
    import torch

    from vqt2i.config import load_config
    from vqt2i.runtime import pick_device
    from vqt2i.training.compare import Timing, compare_tokenizers
    from vqt2i.training.vqgan import VQGANRunConfig

    config, device = load_config(VQGANRunConfig, args.config).model, pick_device()
    found = compare_tokenizers(config, batch_size=args.batch_size, n_rounds=args.rounds, device=device)
    print(f"widths {config.channels}, {config.image_size_px} px, batches of {args.batch_size}, fp32, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    both = {
        name: Timing([a + b for a, b in zip(found.encode[name].seconds, found.decode[name].seconds, strict=True)])
        for name in found.encode
    }
    parts = {"encode": found.encode, "decode": found.decode, "encode + decode": both, "training step": found.train}
    for part, timings in parts.items():
        print(f"{part}:")
        _print_timings(timings, args.batch_size, "images", "vqt2i", "diffusers")


def _quantizers(args: argparse.Namespace) -> None:
    from vqt2i.config import load_config
    from vqt2i.files import write_atomic, write_json
    from vqt2i.training.compare_quantizers import as_markdown, compare_quantizers
    from vqt2i.training.vqgan import VQGANRunConfig

    config = load_config(VQGANRunConfig, args.config, args.overrides)
    scores = compare_quantizers(config, args.runs)
    table = as_markdown(scores)
    print(table)
    if args.out:
        write_atomic(args.out, table + "\n")
        write_json(args.out.with_suffix(".json"), [score._asdict() for score in scores])


def _print_timings(timings: dict[str, Any], n_units: int, unit: str, ours: str, theirs: str) -> None:
    """A line for each contestant, and one for each pair of ours and theirs."""
    for name, timing in timings.items():
        print(f"  {name:24} {timing.median:8.3f} s  {n_units / timing.median:10,.1f} {unit}/s")
    for mine in (name for name in timings if name.startswith(ours)):
        for other in (name for name in timings if name.startswith(theirs)):
            middle, lowest, highest = timings[mine].times_as_fast_as(timings[other])
            print(f"  {mine} : {other} = {middle:.2f} x ({lowest:.2f} to {highest:.2f})")

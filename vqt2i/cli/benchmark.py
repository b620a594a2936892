"""Measure how fast a part of this stack is on this machine."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    data = parts.add_parser("data", help="sequences a second that training gets out of a token store")
    data.add_argument("--store", type=Path, metavar="DIR", help="default: one of random ids, made for the measurement")
    data.add_argument("--split", default="train", help="default: train")
    data.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    data.add_argument("--text-length", type=int, default=120, metavar="N", help="default: 120")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="default: 0, all in this process")
    data.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to measure (default: 10)")
    data.set_defaults(run=_data)

    train = parts.add_parser("train", help="training steps a second of a GPT, beside transformers' Llama of its size")
    train.add_argument(
        "--config", type=Path, default=Path("configs/gpt/llamagen_b.yaml"), metavar="FILE",
        help="a GPT with `sizes` (default: configs/gpt/llamagen_b.yaml, 111 M parameters); dropout is left out",
    )  # fmt: skip
    train.add_argument("--text-ids", type=int, metavar="N", help="another text vocabulary than the configuration's")
    train.add_argument("--batch-size", type=int, default=4, metavar="N", help="default: 4")
    train.add_argument("--precision", choices=("fp32", "bf16"), help="default: one after the other")
    train.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each, in turns (default: 5)")
    train.add_argument("--no-compile", action="store_true", help="time plain PyTorch only")
    train.set_defaults(run=_train)

    generate = parts.add_parser("generate", help="image tokens a second drawn by a GPT, beside transformers' Llama")
    generate.add_argument(
        "--config", type=Path, default=Path("configs/gpt/llamagen_b.yaml"), metavar="FILE",
        help="a GPT with `sizes` (default: configs/gpt/llamagen_b.yaml, 111 M parameters)",
    )  # fmt: skip
    generate.add_argument("--images", type=int, nargs="+", default=[1, 4, 16], metavar="N",
                          help="candidates of one text drawn together (default: 1, 4 and 16)")  # fmt: skip
    generate.add_argument("--tokens", type=int, metavar="N", help="of an image (default: the configuration's grid)")
    generate.add_argument("--precision", choices=("fp32", "bf16", "int8"), help="of the weights (default: fp32, then "
                          "bf16); int8 has ours in 8 bits beside theirs in fp32")  # fmt: skip
    generate.add_argument("--rounds", type=int, default=3, metavar="N", help="of each, in turns (default: 3)")
    generate.set_defaults(run=_generate)

    vqgan = parts.add_parser("vqgan", help="images a second of an image tokenizer, beside diffusers' VQModel")
    vqgan.add_argument(
        "--config", type=Path, default=Path("configs/vqgan/taming_128.yaml"), metavar="FILE",
        help="an image tokenizer of architecture taming (default: configs/vqgan/taming_128.yaml)",
    )  # fmt: skip
    vqgan.add_argument("--batch-size", type=int, default=4, metavar="N", help="default: 4")
    vqgan.add_argument("--rounds", type=int, default=7, metavar="N", help="of each, in turns (default: 7)")
    vqgan.set_defaults(run=_vqgan)


def run(args: argparse.Namespace) -> None:
    args.run(args)


def _require_at_least(args: argparse.Namespace, **least: float) -> None:
    from vqt2i.errors import UserError

    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {bound} or more")


def _data(args: argparse.Namespace) -> None:
    from vqt2i.training.benchmark import measure_store

    _require_at_least(args, batch_size=1, text_length=1, workers=0, seconds=0.01)
    rate = measure_store(
        args.store, args.split, batch_size=args.batch_size, text_length=args.text_length, n_workers=args.workers,
        seconds=args.seconds,
    )  # fmt: skip
    print(f"{rate.median:,.0f} sequences/s (median of {rate.n}; {rate.lowest:,.0f} to {rate.highest:,.0f}), "
          f"batches of {args.batch_size}")  # fmt: skip


def _load_gpt(path: Path) -> Any:
    """A GPT's run configuration with `sizes`; a benchmark reads no tokenizers."""
    from vqt2i.config import load_config
    from vqt2i.errors import ConfigError
    from vqt2i.training.gpt import GPTRunConfig

    config = load_config(GPTRunConfig, path)
    if config.sizes is None:
        raise ConfigError(f"{path}: sizes is null; a benchmark needs it, for it reads no tokenizers")
    if config.condition.kind != "text":
        raise ConfigError(f"{path}: condition {config.condition.kind}; a benchmark reads texts")
    return config


def _train(args: argparse.Namespace) -> None:
    import torch

    from vqt2i.runtime import pick_device
    from vqt2i.training.compare import compare_training
    from vqt2i.training.plan import count_parameters

    _require_at_least(args, text_ids=1, batch_size=1, rounds=1)
    config = _load_gpt(args.config)
    sizes = config.sizes.model_copy(update={"n_text_ids": args.text_ids or config.sizes.n_text_ids})
    config = config.model_copy(update={
        "sizes": sizes, "transformer": config.transformer.model_copy(update={"dropout": 0.0}),
    })  # fmt: skip
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


def _generate(args: argparse.Namespace) -> None:
    import torch

    from vqt2i.runtime import matmul_rate, memory_bandwidth, pick_device
    from vqt2i.training.compare_decoding import compare_decoding
    from vqt2i.training.plan import count_parameters

    _require_at_least(args, tokens=1, rounds=1)
    for n in args.images:
        _require_at_least(argparse.Namespace(images=n), images=1)
    config = _load_gpt(args.config)
    grid = {"grid_height": 1, "grid_width": args.tokens} if args.tokens else {}
    sizes = config.sizes.model_copy(update=grid)
    config = config.model_copy(update={"sizes": sizes})
    gpt, device, n_tokens = config.model(sizes, "none", "none"), pick_device(), sizes.grid_height * sizes.grid_width
    print(f"{count_parameters(gpt).total / 1e6:,.1f} M parameters, {sizes.n_image_ids:,} image ids, "
          f"{config.text_length} + {n_tokens} tokens, {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; memory is read at {memory_bandwidth(device.type) / 1e9:,.1f} GB/s")  # fmt: skip
    for precision in (args.precision,) if args.precision else ("fp32", "bf16"):
        if precision != "int8":
            print(f"{precision}: matrix products run at {matmul_rate(device.type, precision) / 1e9:,.0f} GFLOP/s here")
        for found in compare_decoding(gpt, precision, counts=args.images, n_rounds=args.rounds, device=device):
            print(f"{precision}, {found.n_images} images, {'guided' if found.guided else 'not guided'}:")
            _print_timings(found.timings, found.n_images * n_tokens, "tokens", "vqt2i", "transformers")
            ours = found.timings["vqt2i"].median
            print(f"  vqt2i: {found.n_images / ours:.3f} images/s")
            if found.least_s is not None:
                print(f"  vqt2i: {found.least_s / ours:.0%} of what the memory's or the products' rate allows")


def _vqgan(args: argparse.Namespace) -> None:
    import torch

    from vqt2i.config import load_config
    from vqt2i.runtime import pick_device
    from vqt2i.training.compare import Timing, compare_tokenizers
    from vqt2i.training.vqgan import VQGANRunConfig

    _require_at_least(args, batch_size=1, rounds=1)
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


def _print_timings(timings: dict[str, Any], n_units: int, unit: str, ours: str, theirs: str) -> None:
    """A line for each contestant, and one for each pair of ours and theirs."""
    for name, timing in timings.items():
        print(f"  {name:24} {timing.median:8.3f} s  {n_units / timing.median:10,.1f} {unit}/s")
    for mine in (name for name in timings if name.startswith(ours)):
        for other in (name for name in timings if name.startswith(theirs)):
            middle, lowest, highest = timings[mine].times_as_fast_as(timings[other])
            print(f"  {mine} : {other} = {middle:.2f} x ({lowest:.2f} to {highest:.2f})")

"""Measure how fast a part of this stack is on this machine."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    data = parts.add_parser("data", help="sequences a second that training gets out of a token store")
    data.add_argument("--store", type=Path, metavar="DIR", help="default: one of random ids, made for the measurement")
    data.add_argument("--split", default="train", help="default: train")
    data.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    data.add_argument("--text-length", type=int, default=120, metavar="N", help="default: 120")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="default: 0, all in this process")
    data.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to measure (default: 10)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.errors import UserError
    from vqt2i.training.benchmark import measure_store

    for name, least in (("batch_size", 1), ("text_length", 1), ("workers", 0), ("seconds", 0.01)):
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}: expected {least} or more")
    rate = measure_store(
        args.store, args.split, batch_size=args.batch_size, text_length=args.text_length, n_workers=args.workers,
        seconds=args.seconds,
    )  # fmt: skip
    print(f"{rate.median:,.0f} sequences/s (median of {rate.n}; {rate.lowest:,.0f} to {rate.highest:,.0f}), "
          f"batches of {args.batch_size}")  # fmt: skip

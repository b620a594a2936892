"""Turn any checkpoint of a run into a model folder.

The folder is the one that the run itself wrote after that step: of every stage, trained in one process, by DDP or by
DeepSpeed at any ZeRO stage. Needs one process and no GPU.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_checkpoint", type=Path, metavar="RUN|CHECKPOINT",
                        help="a run folder, or RUN/checkpoints/step-....ckpt")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="of a run: which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> None:
    from vqt2i.training.export import export_checkpoint

    fingerprint = export_checkpoint(args.run_or_checkpoint, args.step, args.out)
    print(f"{args.out}: {fingerprint[:8]}")

"""Train the GPT that turns captions into image ids.

Writes runs/NAME/: config.yaml, run.json, metrics.csv, tensorboard/, samples/, checkpoints/ and model/, the newest
export. SIGTERM and Ctrl-C finish the step, write a checkpoint and exit with code 75; the same command with --resume
goes on from there.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import add_deepspeed_argument, add_training_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, "gpt")
    add_deepspeed_argument(parser)
    parser.add_argument("--vq", type=Path, metavar="DIR", help="the image tokenizer's model folder (default: that of "
                        "the settings, else the newest in the runs folder, else the shipped one)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import load_config
    from vqt2i.generation.find import find_image_tokenizer
    from vqt2i.processes import one_command
    from vqt2i.training.gpt import train_gpt
    from vqt2i.training.gpt_config import GPTRunConfig

    with one_command():
        config = load_config(GPTRunConfig, args.config, args.overrides)
        folder, vq = find_image_tokenizer(args.vq or config.image_tokenizer, args.runs)
        train_gpt(config, folder, vq, args.runs, resume=args.resume, deepspeed=args.deepspeed)

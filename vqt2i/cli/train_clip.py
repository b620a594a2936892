"""Train a scorer (CLIP) that reranks pictures.

Writes runs/NAME/: config.yaml, run.json, metrics.csv, tensorboard/, samples/, checkpoints/ and model/, the newest
export. SIGTERM and Ctrl-C finish the step, write a checkpoint and exit with code 75; the same command with --resume
goes on from there.
"""

import argparse

from vqt2i.cli.options import add_deepspeed_argument, add_training_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, "clip")
    add_deepspeed_argument(parser)


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import load_config
    from vqt2i.processes import one_command
    from vqt2i.training.clip import CLIPRunConfig, train_clip

    with one_command():
        config = load_config(CLIPRunConfig, args.config, args.overrides)
        train_clip(config, args.runs, resume=args.resume, deepspeed=args.deepspeed)

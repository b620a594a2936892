"""Train a prior: it makes the embedding of a prompt that of an image, for a GPT trained on images alone.

Reads captioned pairs and a trained scorer, which stays as it is. Writes runs/NAME/: config.yaml, run.json, metrics.csv,
tensorboard/, checkpoints/ and model/, the newest export, which `generate --prior runs/NAME` takes. SIGTERM and Ctrl-C
finish the step, write a checkpoint and exit with code 75; the same command with --resume goes on from there.
"""

import argparse

from vqt2i.cli.options import add_training_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, "prior")


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import load_config
    from vqt2i.processes import one_command
    from vqt2i.training.prior import PriorRunConfig, train_prior

    with one_command():
        train_prior(load_config(PriorRunConfig, args.config, args.overrides), args.runs, resume=args.resume)

"""Train an image tokenizer (VQ-VAE or VQGAN).

Writes runs/NAME/: config.yaml, run.json, metrics.csv, tensorboard/, samples/, checkpoints/ and model/, the newest
export. SIGTERM and Ctrl-C finish the step, write a checkpoint and exit with code 75; the same command with --resume
goes on from there.
"""

import argparse

from vqt2i.cli.options import add_training_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, "vqgan")


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import load_config
    from vqt2i.processes import one_command
    from vqt2i.training.vqgan import VQGANRunConfig, train_vqgan

    with one_command():
        train_vqgan(load_config(VQGANRunConfig, args.config, args.overrides), args.runs, resume=args.resume)

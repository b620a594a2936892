"""Train an image tokenizer: VQ-VAE, VQGAN, DALL·E's, or a palette of colours.

Writes runs/NAME/: config.yaml, run.json, metrics.csv, tensorboard/, samples/, checkpoints/ and model/, the newest
export. SIGTERM and Ctrl-C finish the step, write a checkpoint and exit with code 75; the same command with --resume
goes on from there. A palette is fitted in one go, so there are no checkpoints and no metrics.csv of it; card.json in
model/ has what was measured.
"""

import argparse

from vqt2i.cli.options import add_training_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, "vqgan")


def run(args: argparse.Namespace) -> None:
    from vqt2i.processes import one_command
    from vqt2i.training.palette import PaletteRunConfig, load_tokenizer_run, train_palette
    from vqt2i.training.vqgan import train_vqgan

    with one_command():
        config = load_tokenizer_run(args.config, args.overrides)
        train = train_palette if isinstance(config, PaletteRunConfig) else train_vqgan
        train(config, args.runs, resume=args.resume)

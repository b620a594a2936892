"""Linear probe: how well the features of a trained GPT tell the classes of images, layer by layer.

Beside it stand the same GPT with random weights, the images' pixels and their counts of ids, all by the same logistic
regression on the training split, measured on the validation split (iGPT, Chen et al. 2020, section 2.4).
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a pipeline folder, a GPT run, or a shipped model's name")
    parser.add_argument("data", type=Path, metavar="DATA", help="a data set of classes (make_dataset ... --labels)")
    parser.add_argument("--n-train", type=int, metavar="N", help="images that the regression learns (default: 4000)")
    parser.add_argument("--n-validation", type=int, metavar="N", help="images that it is tried on (default: 1000)")
    parser.add_argument("--train-split", metavar="NAME", help="default: train")
    parser.add_argument("--validation-split", metavar="NAME", help="default: val")
    parser.add_argument("--penalty", type=float, metavar="X", help="of the squared weights (default: 0.001)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the random weights (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the result (default: print only)")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import build_config
    from vqt2i.data.shards import DataSet
    from vqt2i.evaluation.probe import ProbeConfig, probe
    from vqt2i.files import write_json
    from vqt2i.generation.find import open_pipeline
    from vqt2i.runtime import say

    given = {k: v for k, v in vars(args).items() if k in ProbeConfig.model_fields and v is not None}
    config = build_config(ProbeConfig, given, "probe")
    dataset = DataSet.open(args.data)
    pipeline = open_pipeline(args.model, args.runs)
    found = probe(pipeline, dataset, config, say)
    print(f"{found.n_classes} classes, {found.n_train:,} images to learn from, {found.n_validation:,} to be told")
    print("layer   trained   random weights")
    for layer, (trained, random) in enumerate(zip(found.layers, found.random, strict=True)):
        print(f"{layer:5}   {trained:7.1%}   {random:14.1%}   {'#' * round(40 * trained)}")
    print(f"best layer {found.best}: {found.layers[found.best]:.1%} (± {found.standard_error:.1%}); best of random "
          f"weights {max(found.random):.1%}, pixels {found.pixels:.1%}, counts of ids {found.id_counts:.1%}, guessing "
          f"{found.guess:.1%}")  # fmt: skip
    if args.out:
        about = {"model": args.model, "models": pipeline.fingerprints, "data": dataset.fingerprint}
        write_json(args.out, about | {"protocol": config.model_dump(), "results": found.to_json()})

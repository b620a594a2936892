"""Check that a pipeline still draws as well as is recorded beside its weights, or record what it does.

Draws a few prompts in about a minute and measures PSNR, R-precision and, of shapes, the share that is all right. Exits
with 1 where a figure is below the recorded one by more than its tolerance. The suite checks every shipped pipeline.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import add_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", type=Path, metavar="DIR", help="a pipeline folder")
    parser.add_argument("--record", action="store_true", help="write gate.json and gate.png into it anew")
    parser.add_argument("--data", type=Path, metavar="DATA", help="record captions and pictures of this data set "
                        "(default: prompts and pictures of the shapes)")  # fmt: skip
    parser.add_argument("--split", default="val", metavar="NAME", help="of DATA (default: val)")
    add_number(parser, "--n-prompts", 48, "to record")
    add_number(parser, "--candidates", 4, "to record, of each prompt")


def run(args: argparse.Namespace) -> int | None:
    import shlex

    from vqt2i.data.shards import DataSet
    from vqt2i.evaluation.gate import GATE, check_gate, record_gate
    from vqt2i.generation import TextToImage

    split = DataSet.open(args.data).split(args.split) if args.data else None
    pipeline = TextToImage.load(args.pipeline, "cpu")
    if args.record:
        command = shlex.join(["python", "tools/gate.py", *args.argv[1:]])
        sizes = {"n_prompts": args.n_prompts, "candidates": args.candidates}
        gate = record_gate(args.pipeline, pipeline, split, command=command, **sizes)
        for name, figure in gate.figures.items():
            print(f"{name:22} {figure.value:8.3f}  may fall by {figure.tolerance:.3f}")
        print(f"Recorded in {args.pipeline / GATE}")
        return None
    fallen = 0
    for name, (value, figure) in check_gate(pipeline, args.pipeline).items():
        fallen += not (reached := figure.is_reached(value))
        print(f"{name:22} {value:8.3f}  {'reaches' if reached else 'IS BELOW'} {figure.value:.3f} "
              f"less {figure.tolerance:.3f}")  # fmt: skip
    return 1 if fallen else None

"""Bind trained parts into one pipeline folder: what `generate --model` loads and what people share.

Copies the text tokenizer, image tokenizer, GPT and, where there are any, scorer and prior that belong together, and
writes pipeline.yaml with the sampling defaults.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS, add_part_arguments, add_sampling_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a GPT run or another pipeline folder (default: the newest GPT "
                        "in the runs folder)")  # fmt: skip
    add_part_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--prompt", action="append", default=[], dest="prompts", metavar="PROMPT",
                        help="an example, drawn where no prompt is given; may be repeated")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32",
                        help="of the weights of GPT and scorer (default: fp32)")  # fmt: skip
    add_sampling_arguments(parser)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.cli.options import sampling_from
    from vqt2i.generation.find import find_parts, write_pipeline
    from vqt2i.generation.parts import PipelineConfig

    folders, config = find_parts(args.model, args.runs, ("gpt", "upscaler"), clip=args.clip, prior=args.prior)
    prompts = tuple(args.prompts) or config.example_prompts
    config = PipelineConfig(sampling=sampling_from(args, config.sampling), example_prompts=prompts)
    write_pipeline(folders, config, args.out, args.dtype)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")

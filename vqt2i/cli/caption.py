"""Say what is in pictures: the likeliest captions, or drawn ones, in the languages of the training captions.

Prints for each picture its captions with their log p(caption | picture) per token, best first. For models that were
trained on the order image to text too (training.reversed_share above 0).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vqt2i.cli.options import RUNS

if TYPE_CHECKING:
    from vqt2i.generation.captions import BeamConfig, DrawConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="captions of each picture (default: 1)")
    add_caption_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of drawn captions (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder, a GPT run, or a shipped model's name "
                        "(default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write them to a .jsonl file too, a line each")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """--beams, --length-exponent, --ids, --text-weight, --no-rerank, --draw, --temperature, --top-p."""
    parser.add_argument("--beams", type=int, metavar="K", help="beginnings kept by the search (default: 64)")
    parser.add_argument("--length-exponent", type=float, metavar="A", help="captions of n ids are compared by "
                        "log p / n^A; 0 prefers short ones (default: 0.5)")  # fmt: skip
    parser.add_argument("--ids", type=int, metavar="N", help="of every caption, by a GPT that cannot end one, such as "
                        "CogView's (default: 20)")  # fmt: skip
    parser.add_argument("--no-rerank", action="store_const", const=False, dest="caption_rerank", help="the search's "
                        "order: do not ask the GPT how well it would draw the picture from each")  # fmt: skip
    parser.add_argument("--text-weight", type=float, metavar="W", help="what the search finds is put in the order of "
                        "log p(picture | caption) + W log p(caption | picture) (default: 2)")  # fmt: skip
    parser.add_argument("--draw", action="store_true", help="draw captions instead of searching for the likeliest")
    parser.add_argument("--temperature", type=float, metavar="T", help="of drawing (default: 1)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest ids of probability P only")


def caption_config_from(args: argparse.Namespace) -> "BeamConfig | DrawConfig":
    """What the options of `add_caption_arguments` say.

    Raises:
        ConfigError: a value out of range, or one of the other way's.
    """
    from vqt2i.config import build_config
    from vqt2i.errors import ConfigError
    from vqt2i.generation.captions import BeamConfig, DrawConfig

    options = {
        BeamConfig: {
            "n_beams": args.beams,
            "length_exponent": args.length_exponent,
            "rerank": args.caption_rerank,
            "text_weight": args.text_weight,
        },
        DrawConfig: {"temperature": args.temperature, "top_p": args.top_p},
    }
    cls, other = (DrawConfig, BeamConfig) if args.draw else (BeamConfig, DrawConfig)
    foreign = [name for name, value in options[other].items() if value is not None]
    if foreign:
        raise ConfigError(f"{', '.join(foreign)}: of {'a beam search' if args.draw else 'drawing'}, which "
                          f"{'--draw replaces' if args.draw else 'needs --draw'}")  # fmt: skip
    values = options[cls] | {"n_ids": args.ids}
    return build_config(cls, {name: value for name, value in values.items() if value is not None}, "caption")


def run(args: argparse.Namespace) -> None:
    import json

    from vqt2i.data.sources import read_image
    from vqt2i.files import write_atomic
    from vqt2i.generation.find import open_pipeline

    how = caption_config_from(args)
    images = [read_image(path) for path in args.images]
    pipeline = open_pipeline(args.model, args.runs)
    captions = pipeline.caption(images, n=args.n, how=how, seed=args.seed)
    lines = []
    for path, found in zip(args.images, captions, strict=True):
        print(path)
        for caption in found:
            print(f"  {caption.log_p:7.3f}  {caption.text}")
            lines.append(json.dumps({"image": str(path), "caption": caption.text, "log_p_per_token": caption.log_p},
                                    ensure_ascii=False))  # fmt: skip
    if args.out:
        write_atomic(args.out, "\n".join(lines) + "\n")

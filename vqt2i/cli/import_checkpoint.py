"""Turn a published checkpoint into a model folder: offline, running nothing that is in the file.

Families: see docs/checkpoints.md, with the files of each public release. What the weights do not tell is read from the
settings beside them, or given here.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import REPOSITORY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", metavar="FAMILY", help="for example taming-vqgan or llamagen-gpt-c2i; a wrong one is "
                        "told with the right one")  # fmt: skip
    parser.add_argument("path", type=Path, metavar="PATH", help="the checkpoint as it is published")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="settings in the family's own format (default: "
                        "those beside the checkpoint)")  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the images that an image tokenizer is "
                        "for (default: as the settings say)")  # fmt: skip
    parser.add_argument("--vq", type=Path, metavar="DIR", help="of a GPT: its image tokenizer, imported before")
    parser.add_argument("--text-encoder", type=Path, metavar="DIR", help="of a GPT that reads features of texts: the "
                        "encoder's local folder")  # fmt: skip
    parser.add_argument("--text", type=Path, metavar="PATH", help="of a scorer or a GPT of texts: its tokenizer "
                        "(default: the one beside the checkpoint)")  # fmt: skip
    parser.add_argument("--sampling", type=Path, metavar="FILE", help="of a GPT: the sampling defaults that its folder "
                        "says (default: its authors', configs/sampling/FAMILY.yaml)")  # fmt: skip
    parser.add_argument("--check", type=Path, metavar="IO", help="safetensors of recorded inputs and outputs, which "
                        "the model must reproduce")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import load_config
    from vqt2i.errors import UserError
    from vqt2i.generation.sampling import SamplingConfig
    from vqt2i.peers import FAMILIES, Options
    from vqt2i.peers.convert import import_checkpoint

    if args.family not in FAMILIES:
        raise UserError(f"family {args.family!r}: expected one of {', '.join(FAMILIES)}")
    if args.sampling and FAMILIES[args.family].kind not in ("gpt", "upscaler"):
        raise UserError(f"--sampling {args.sampling}: of a GPT, and {args.family} is none; leave it out")
    options, facts = Options(args.settings, args.image_size, args.vq, args.text_encoder, args.text), {}
    preset = REPOSITORY / "configs" / "sampling" / f"{args.family}.yaml"
    if args.sampling or preset.is_file():
        facts["sampling"] = load_config(SamplingConfig, args.sampling or preset).model_dump(mode="json")
    fingerprint = import_checkpoint(FAMILIES[args.family], args.path, args.out, options, facts=facts, check=args.check)
    print(f"{args.out}: {fingerprint[:8]}")

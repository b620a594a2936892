"""Draw pictures in twice their height and width, window by window, by a GPT that was trained for it.

The pictures go into a folder as those of `generate` do, and before-after.png shows the first of them beside the given
ones. Pictures that `generate` wrote are drawn for the prompts that they hold.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS, add_engine_arguments, add_sampling_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="PICTURE", help="of sides that a cell of the model's "
                        "image tokenizer divides")  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="what they show (default: the prompt that `generate` wrote "
                        "into a picture, of others none)")  # fmt: skip
    parser.add_argument("--n", type=int, default=1, metavar="N", help="pictures drawn of each (default: 1)")
    add_sampling_arguments(parser)
    parser.add_argument("--negative", metavar="TEXT", help="guidance leads away from this (default: from no text)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pictures (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a run of train_gpt for super-resolution "
                        "(configs/gpt/superres_tiny.yaml), or a pipeline folder made of one (default: the newest in "
                        "the runs folder)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: outputs/0001 and so on)")
    add_engine_arguments(parser)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from PIL import Image

    from vqt2i.cli.options import sampling_from
    from vqt2i.data.images import png_bytes
    from vqt2i.data.sources import read_image
    from vqt2i.files import require_free, sha256_of_parts, write_atomic
    from vqt2i.generation.find import open_upscaler
    from vqt2i.generation.output import OutputFolder, Request, next_folder, read_prompt, strip
    from vqt2i.runtime import counter
    from vqt2i.text import clean_text

    pictures = [read_image(path) for path in args.images]
    prompts = [clean_text(read_prompt(path) if args.prompt is None else args.prompt) for path in args.images]
    out = args.out or next_folder(Path("outputs"))
    require_free(out)
    pipeline = open_upscaler(args.model, args.runs, engine=args.engine, precision=args.precision)
    sampling = sampling_from(args, pipeline.config.sampling)
    with counter("drawing", max(0, args.n) * len(pictures), unit="images") as advance:
        samples = pipeline.upscale(
            pictures, prompts, n=args.n, sampling=sampling, negative=args.negative, seed=args.seed, on_progress=advance
        )
    settings = {
        **sampling.model_dump(), "upscaled": [sha256_of_parts(picture.tobytes()) for picture in pictures],
        "negative": args.negative, "seed": args.seed, "precision": pipeline.engine.precision,
    }  # fmt: skip
    with OutputFolder(out, Request(prompts, args.n, settings, pipeline.fingerprints)) as outputs:
        for start in range(0, len(samples), args.n):
            outputs.write(samples[start : start + args.n])
    shown = [(picture, samples[args.n * i]) for i, picture in enumerate(pictures[:4])]
    tiles = [tile for given, drawn in shown for tile in (("given", Image.fromarray(given)), ("drawn", drawn.image))]
    write_atomic(out / "before-after.png", png_bytes(strip(tiles)))
    print(f"{len(samples)} pictures in {out}, beside given ones in {out / 'before-after.png'}")

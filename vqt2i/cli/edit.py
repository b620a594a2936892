"""Draw a part of a picture anew: fill a hole, complete it, draw around it, vary it.

The rest stays. The pictures and their scores go into a folder as those of `generate` do, and before-after.png shows
them beside the given one.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vqt2i.cli.options import RUNS, add_engine_arguments, add_grid_argument, add_sampling_arguments

if TYPE_CHECKING:
    from vqt2i.generation.edit import Change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture, of the shape of the model's grid")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the whole picture is to show (default: what "
                        "the model makes of no text)")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mask", type=Path, metavar="FILE", help="draw anew where this picture, of the same size, is "
                      "white")  # fmt: skip
    what.add_argument("--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"), help="draw this rectangle of pixels "
                      "anew")  # fmt: skip
    what.add_argument("--keep-top", type=float, metavar="SHARE", help="keep this share from the top, complete the rest")
    what.add_argument("--extend", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="draw so many "
                      "pixels around the picture")  # fmt: skip
    what.add_argument("--vary", type=float, metavar="SHARE", help="draw this share of the cells anew, others in each "
                      "candidate")  # fmt: skip
    parser.add_argument("--rerank", type=int, metavar="K", help="draw K candidates and score them")
    parser.add_argument("--n", type=int, metavar="N", help="pictures kept (default: 4, at most K)")
    parser.add_argument("--scorer", choices=("likelihood", "clip", "caption", "both", "all"), help="what ranks the "
                        "candidates (default: likelihood, that of the whole picture, what was kept behind the hole "
                        "included; all adds both others to it)")  # fmt: skip
    parser.add_argument("--paste", type=int, nargs="?", const=0, metavar="FEATHER", help="put the kept pixels "
                        "themselves back, at their size, going over into the drawn ones over FEATHER of them "
                        "(default: 0)")  # fmt: skip
    add_sampling_arguments(parser)
    parser.add_argument("--negative", metavar="TEXT", help="guidance leads away from this (default: from no text)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pictures (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder, a GPT run, or a shipped model's name "
                        "(default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: outputs/0001 and so on)")
    add_grid_argument(parser)
    add_engine_arguments(parser)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from PIL import Image

    from vqt2i.cli.options import sampling_from
    from vqt2i.data.images import png_bytes
    from vqt2i.data.sources import read_image
    from vqt2i.errors import PromptError
    from vqt2i.files import require_free, sha256_of_parts, write_atomic
    from vqt2i.generation.edit import Mask, Paste, Vary, open_canvas
    from vqt2i.generation.find import open_pipeline
    from vqt2i.generation.output import OutputFolder, Request, next_folder, strip
    from vqt2i.runtime import counter
    from vqt2i.text import clean_text

    if args.scorer and not args.rerank:
        raise PromptError(f"--scorer {args.scorer}: nothing is ranked without --rerank K")
    n = min(4, args.rerank or 4) if args.n is None else args.n
    image_HW3, change = read_image(args.image), _change(args)
    canvas = open_canvas(image_HW3, change)  # what is wrong with it is told before anything is loaded
    out = args.out or next_folder(Path("outputs"))
    require_free(out)
    pipeline = open_pipeline(args.model, args.runs, engine=args.engine, precision=args.precision)
    if args.grid:
        pipeline = pipeline.with_grid(*args.grid)
    sampling = sampling_from(args, pipeline.config.sampling)
    scorer, prompt = args.scorer or "likelihood", clean_text(args.prompt)
    count, tokens_per_image = args.rerank or n, pipeline.gpt.layout.image_length
    with counter("drawing", max(0, count), unit="images") as advance:
        samples = pipeline.edit(
            image_HW3, prompt, change, n=n, rerank=args.rerank, scorer=scorer, sampling=sampling,
            negative=args.negative, pasted=None if args.paste is None else Paste(args.paste), seed=args.seed,
            on_token=lambda n_tokens: advance(n_tokens / tokens_per_image),
        )  # fmt: skip
    numbers = sha256_of_parts(change.redrawn_HW.tobytes()) if isinstance(change, Mask) else change
    settings = {
        **sampling.model_dump(), "image": sha256_of_parts(image_HW3.tobytes()),
        "change": {type(change).__name__: numbers}, "paste": args.paste,
        "negative": args.negative, "rerank": args.rerank, "scorer": scorer if args.rerank else None,
        "seed": args.seed, "precision": pipeline.engine.precision, "grid": args.grid,
    }  # fmt: skip
    with OutputFolder(out, Request([prompt], n, settings, pipeline.fingerprints)) as outputs:
        outputs.write(samples)
    before = [("given", Image.fromarray(image_HW3))]
    if not isinstance(change, Vary):
        before.append(("kept", Image.fromarray(canvas.shown())))
    after = [(f"{scorer} {s.scores[scorer]:.2f}" if s.scores else "", s.image) for s in samples[:8]]
    write_atomic(out / "before-after.png", png_bytes(strip([*before, *after])))
    print(f"{n} pictures in {out}, beside the given one in {out / 'before-after.png'}")


def _change(args: argparse.Namespace) -> "Change":
    """The one that was given."""
    from vqt2i.data.sources import read_image
    from vqt2i.generation.edit import Box, Extend, KeepTop, Mask, Vary

    if args.mask:
        return Mask(read_image(args.mask).mean(-1) > 127)
    if args.box:
        return Box(*args.box)
    if args.extend:
        return Extend(*args.extend)
    return Vary(args.vary) if args.keep_top is None else KeepTop(args.keep_top)

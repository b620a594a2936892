"""Draw pictures from prompts, or variations of pictures, rerank them, keep the best.

Without a prompt, a few examples of what the model was trained on. Pictures, labelled grids and scores.jsonl go into a
folder, which is printed last, as they come. Stopped, the same command with `--out` that folder goes on.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS, add_sampling_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, in any language")
    parser.add_argument("--prompts", type=Path, metavar="FILE", dest="file", help="draw each line of a text file, or "
                        "the first column of a .tsv or of a table whose first column is called Prompt")  # fmt: skip
    parser.add_argument("--image", type=Path, action="append", default=[], dest="images", metavar="FILE",
                        help="draw variations of a picture, by a model that reads embeddings (configs/gpt/clip_gen*); "
                             "may be repeated")  # fmt: skip
    parser.add_argument("--rerank", type=int, metavar="K", help="draw K candidates per prompt and score them")
    parser.add_argument("--n", type=int, metavar="N", help="pictures kept per prompt (default: 4, at most K)")
    parser.add_argument("--scorer", choices=("clip", "caption", "both"), help="what ranks the candidates "
                        "(default: both where the model has a CLIP, else caption)")  # fmt: skip
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pictures (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder, a GPT run, or a shipped model's name "
                        "(default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder, or one to go on with "
                        "(default: outputs/0001 and so on)")  # fmt: skip
    parser.add_argument("--preview", action="store_true", help="show what is drawn while its tokens come: writes "
                        "preview.png in the folder over and over")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from vqt2i.cli.options import sampling_from
    from vqt2i.errors import PromptError
    from vqt2i.generation.find import open_pipeline
    from vqt2i.generation.output import OutputFolder, PreviewFile, Request, next_folder
    from vqt2i.generation.prompts import Picture, read_prompts
    from vqt2i.runtime import counter, say
    from vqt2i.text import clean_text

    _check(args)
    n = args.n or min(4, args.rerank or 4)
    if args.rerank and n > args.rerank:
        raise PromptError(f"--n {n}: only {args.rerank} candidates are drawn; give --rerank {n} or more")
    prompts = read_prompts(args.file) if args.file else args.prompts
    pictures = [Picture.read(path) for path in args.images]
    pipeline = open_pipeline(args.model, args.runs)
    sampling = sampling_from(args, pipeline.config.sampling)
    examples = () if pictures else pipeline.config.example_prompts or [""]
    prompts = [*(clean_text(prompt) for prompt in prompts or examples), *pictures]
    names = [prompt if isinstance(prompt, str) else prompt.name for prompt in prompts]
    scorer = (args.scorer or pipeline.default_scorer) if args.rerank else None
    settings = {**sampling.model_dump(), "rerank": args.rerank, "scorer": scorer, "seed": args.seed}
    out = args.out or next_folder(Path("outputs"))
    outputs = OutputFolder(out, Request(names, n, settings, pipeline.fingerprints))
    if args.preview:
        say(f"preview: {out / 'preview.png'}")
    if outputs.n_done:
        say(f"{out}: {outputs.n_done:,} of {len(prompts):,} prompts are there")
    count = args.rerank or n
    total, tokens_per_image = (len(prompts) - outputs.n_done) * count, pipeline.gpt.layout.image_length
    preview = PreviewFile(out / "preview.png") if args.preview else None
    truncated = []
    try:
        with counter("drawing", total, unit="images") as advance:
            groups = pipeline.stream(
                prompts, count, first=outputs.n_done, scorer=scorer, scored=args.rerank is not None,
                sampling=sampling, seed=args.seed, on_token=lambda n_images: advance(n_images / tokens_per_image),
                on_preview=preview,
            )  # fmt: skip
            with outputs, preview or nullcontext():
                for group in groups:
                    outputs.write(group)
                    if group[0].n_truncated:
                        truncated.append((group[0].prompt[:40], group[0].n_truncated))
    except KeyboardInterrupt:
        say(f"{outputs.n_done:,} of {len(prompts):,} prompts are in {out}; the same command with --out {out} goes on")
        raise
    for prompt, n_ids in truncated[:3]:
        say(f"prompt {prompt!r}: its last {n_ids} ids did not fit and were left out")
    if truncated[3:]:
        say(f"so it was with {len(truncated) - 3:,} more prompts; scores.jsonl has how many ids (n_truncated_ids)")
    grids = f"{outputs.grids[0]}" + (f" to {outputs.grids[-1].name}" if len(outputs.grids) > 1 else "")
    print(f"{len(prompts) * n:,} pictures in {out}, all of them in {grids}")


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that make no sense, before anything is loaded."""
    from vqt2i.errors import PromptError, UserError

    if args.file and args.prompts:
        raise PromptError(f"--prompts {args.file}: prompts are given too ({args.prompts[0]!r}); give one or the other")
    for name, value in (("--rerank", args.rerank), ("--n", args.n)):
        if value is not None and value < 1:
            raise PromptError(f"{name}: found {value}, expected 1 or more")
    if args.scorer and not args.rerank:
        raise PromptError(f"--scorer {args.scorer}: nothing is ranked without --rerank K")
    if args.out and args.out.is_file():
        raise UserError(f"--out {args.out}: a file; expected a folder")

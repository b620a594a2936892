"""Draw pictures from prompts, or variations of pictures, rerank them, keep the best.

Without a prompt, a few examples of what the model was trained on. Pictures, labelled grids and scores.jsonl go into a
folder, which is printed last, as they come. Stopped, the same command with `--out` that folder goes on.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vqt2i.cli.options import (
    RUNS,
    add_engine_arguments,
    add_grid_argument,
    add_machine_arguments,
    add_part_arguments,
    add_sampling_arguments,
)

if TYPE_CHECKING:
    from vqt2i.generation import Sample, TextToImage
    from vqt2i.generation.output import OutputFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, in any language; of a "
                        "model of classes, the name of one, of a model of images alone, nothing")  # fmt: skip
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
    parser.add_argument("--negative", metavar="TEXT", help="guidance leads away from this (default: from no text)")
    parser.add_argument("--mix", nargs=2, metavar=("TEXT", "SHARE"), help="mix each prompt with another text, which "
                        "gets this share, between 0 and 1, of the say")  # fmt: skip
    parser.add_argument("--upscale", metavar="DIR", help="draw the pictures that are kept in twice their height and "
                        "width, by this run for super-resolution (configs/gpt/superres_tiny.yaml) or pipeline "
                        "folder")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pictures (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder, a GPT run, or a shipped model's name "
                        "(default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder, or one to go on with "
                        "(default: outputs/0001 and so on)")  # fmt: skip
    add_part_arguments(parser)
    add_grid_argument(parser)
    add_engine_arguments(parser)
    parser.add_argument("--preview", action="store_true", help="show what is drawn while its tokens come: writes "
                        "preview.png in the folder over and over")  # fmt: skip
    add_machine_arguments(parser)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> int | None:
    from vqt2i.processes import find_launcher, one_command, start_processes

    _check(args)
    if args.devices and args.devices > 1 and find_launcher() is None:
        return start_processes(args.devices, args.argv)
    with one_command(stopped="stopped"):
        _draw(args)
    return None


def _draw(args: argparse.Namespace) -> None:
    """One process's part; alone it is all of it."""
    from functools import partial

    from vqt2i.cli.options import placement_from, sampling_from
    from vqt2i.generation.filling import fill_folder
    from vqt2i.generation.find import open_pipeline, open_upscaler
    from vqt2i.generation.output import Request, next_folder
    from vqt2i.generation.prompts import Picture, prompt_name, read_prompts
    from vqt2i.generation.samples import Mix
    from vqt2i.processes import find_place
    from vqt2i.text import clean_text

    place = find_place(args.devices)
    prompts = read_prompts(args.file) if args.file else args.prompts
    pictures = [Picture.read(path) for path in args.images]
    placement = placement_from(args, place) | {"engine": args.engine, "precision": args.precision}
    pipeline = open_pipeline(args.model, args.runs, clip=args.clip, prior=args.prior, **placement)
    if args.grid:
        pipeline = pipeline.with_grid(*args.grid)
    upscaler = open_upscaler(args.upscale, args.runs, **placement) if args.upscale else None
    sampling = sampling_from(args, pipeline.config.sampling)
    negative, mix = args.negative and clean_text(args.negative), args.mix and Mix(clean_text(args.mix[0]), _share(args))
    examples = () if pictures else pipeline.config.example_prompts or [""]
    prompts = [*(clean_text(prompt) for prompt in prompts or examples), *pictures]
    scorer = (args.scorer or pipeline.default_scorer) if args.rerank else None
    settings = {
        **sampling.model_dump(), "negative": negative, "mix": mix, "rerank": args.rerank, "scorer": scorer,
        "seed": args.seed, "precision": pipeline.engine.precision, "grid": args.grid,
    }  # fmt: skip
    n, models = args.n or min(4, args.rerank or 4), pipeline.fingerprints
    if upscaler:
        models |= {f"upscaler's {part}": name for part, name in upscaler.fingerprints.items()}
    request = Request([prompt_name(prompt) for prompt in prompts], n, settings, models)

    tokens_per_image = pipeline.gpt.layout.image_length
    stream = partial(
        pipeline.stream, prompts, args.rerank or n, scorer=scorer, scored=args.rerank is not None, sampling=sampling,
        negative=negative, mix=mix, seed=args.seed,
    )  # fmt: skip
    if upscaler:
        enlarged = partial(_upscaled, n=n, pipeline=pipeline, upscaler=upscaler, prompts=prompts, seed=args.seed)
        small, stream = stream, lambda **options: map(enlarged, small(**options))
    outputs = fill_folder(
        lambda: args.out or next_folder(Path("outputs")), request, stream, place, count=args.rerank or n,
        tokens_per_image=tokens_per_image, preview=args.preview,
    )  # fmt: skip
    if outputs:
        _report(outputs, tokens_per_image)


def _upscaled(
    group: "list[Sample]", *, n: int, pipeline: "TextToImage", upscaler: "TextToImage", prompts: list, seed: int
) -> "list[Sample]":
    """A prompt's candidates, the first `n` in twice their size: from their pixels where their ids are of another image
    tokenizer."""
    from dataclasses import replace

    kept = group[:n]
    if pipeline.vq.ids_fingerprint != upscaler.vq.ids_fingerprint:
        kept = [replace(sample, image_ids_HW=upscaler.image_ids(sample.image_HW3).numpy()) for sample in kept]
    text = None if isinstance(prompts[group[0].prompt_index], str) else ""  # in place of a picture's name
    return [*upscaler.upscale(kept, text, seed=seed), *group[n:]]


def _report(outputs: "OutputFolder", tokens_per_image: int) -> None:
    from vqt2i.runtime import say

    for prompt, n_ids in outputs.truncated[:3]:
        say(f"prompt {prompt!r}: its last {n_ids} ids did not fit and were left out")
    if outputs.truncated[3:]:
        say(f"so it was with {len(outputs.truncated) - 3:,} more prompts; scores.jsonl has how many ids "
            "(n_truncated_ids)")  # fmt: skip
    if outputs.request.settings["jacobi_window"] and outputs.n_passes:
        mean = sum(outputs.n_passes) / len(outputs.n_passes)
        say(f"{mean:.1f} passes of the GPT for the {tokens_per_image} tokens of an image")
    grids = f"{outputs.grids[0]}" + (f" to {outputs.grids[-1].name}" if len(outputs.grids) > 1 else "")
    n_pictures = len(outputs.request.prompts) * outputs.request.n
    print(f"{n_pictures:,} pictures in {outputs.path}, all of them in {grids}")


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that make no sense, before anything is loaded."""
    from vqt2i.errors import PromptError, UserError

    if args.file and args.prompts:
        raise PromptError(f"--prompts {args.file}: prompts are given too ({args.prompts[0]!r}); give one or the other")
    for name, value in (("--rerank", args.rerank), ("--n", args.n), ("--devices", args.devices)):
        if value is not None and value < 1:
            raise PromptError(f"{name}: found {value}, expected 1 or more")
    if args.rerank and args.n and args.n > args.rerank:
        raise PromptError(f"--n {args.n}: only {args.rerank} candidates are drawn; give --rerank {args.n} or more")
    if args.scorer and not args.rerank:
        raise PromptError(f"--scorer {args.scorer}: nothing is ranked without --rerank K")
    if args.mix:
        _share(args)
    if args.out and args.out.is_file():
        raise UserError(f"--out {args.out}: a file; expected a folder")


def _share(args: argparse.Namespace) -> float:
    """The number in --mix TEXT SHARE."""
    from vqt2i.errors import PromptError

    try:
        return float(args.mix[1])
    except ValueError:
        raise PromptError(f"--mix: found a share of {args.mix[1]!r}, expected a number between 0 and 1") from None

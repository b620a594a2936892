"""Draw pictures from prompts, rerank them, keep the best.

Without a prompt, a few examples of what the model was trained on. Pictures, a labelled grid and scores.json go into
a new folder, which is printed last.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS, add_sampling_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, in any language")
    parser.add_argument("--rerank", type=int, metavar="K", help="draw K candidates per prompt and score them")
    parser.add_argument("--n", type=int, metavar="N", help="pictures kept per prompt (default: 4, at most K)")
    parser.add_argument("--scorer", choices=("clip", "caption", "both"), help="what ranks the candidates "
                        "(default: both where the model has a CLIP, else caption)")  # fmt: skip
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pictures (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder, a GPT run, or a shipped model's name "
                        "(default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: outputs/0001 and so on")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.cli.options import sampling_from
    from vqt2i.errors import PromptError, UserError
    from vqt2i.generation.find import open_pipeline
    from vqt2i.generation.output import next_folder, write_outputs
    from vqt2i.runtime import counter, say

    for name, value in (("--rerank", args.rerank), ("--n", args.n)):
        if value is not None and value < 1:
            raise PromptError(f"{name}: found {value}, expected 1 or more")
    n = args.n or min(4, args.rerank or 4)
    if args.rerank and n > args.rerank:
        raise PromptError(f"--n {n}: only {args.rerank} candidates are drawn; give --rerank {n} or more")
    if args.scorer and not args.rerank:
        raise PromptError(f"--scorer {args.scorer}: nothing is ranked without --rerank K")
    if args.out and args.out.is_file():
        raise UserError(f"--out {args.out}: a file; expected a folder")
    pipeline = open_pipeline(args.model, args.runs)
    sampling = sampling_from(args, pipeline.config.sampling)
    prompts = args.prompts or list(pipeline.config.example_prompts) or [""]
    count = args.rerank or n
    scorer = (args.scorer or pipeline.default_scorer) if args.rerank else None
    total = len(prompts) * count * pipeline.gpt.layout.image_length
    with counter(f"drawing {len(prompts) * count} pictures", total, unit="tokens") as on_token:
        groups = pipeline.candidates(
            prompts, count, scorer=scorer, scored=args.rerank is not None, sampling=sampling, seed=args.seed,
            on_token=on_token,
        )  # fmt: skip
    for group in groups:
        if group[0].n_truncated:
            say(f"prompt {group[0].prompt[:40]!r}: its last {group[0].n_truncated} ids did not fit and were left out")
    settings = {**sampling.model_dump(), "rerank": args.rerank, "scorer": scorer, "seed": args.seed}
    out = args.out or next_folder(Path("outputs"))
    paths = write_outputs(out, groups, n, settings, pipeline.fingerprints)
    print(f"{len(paths) - 1} pictures in {out}, all of them in {paths[0]}")

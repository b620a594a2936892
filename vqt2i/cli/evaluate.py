"""Measure a model: its pictures, how well they fit their prompts, its image tokenizer, its captions.

MEASURES, of which --measure chooses:
  alignment       CLIP score, caption score, R-precision and, for prompts of the shapes, an oracle that reads each
                  picture back into its objects; unreranked, and of 1, 2, 4, ... candidates the best by each ranking
  fidelity        FID, KID, IS, precision and recall beside DATA; without --inception, distances by a CLIP image tower
  reconstruction  PSNR, SSIM, LPIPS, distances and use of the codes on DATA
  sweep           alignment and distance over sampling settings
  memorisation    how near pictures come to those of DATA's train split, beside how near those of --split do
  captions        how often what the model says of a rendered scene of the shapes is true
  upscaling       how near pictures of DATA, halved and drawn in their size again by a model for super-resolution, come
                  to the real ones, beside bicubic interpolation
  style           how often prompts with a style's words, and without, give what they ask for, of objects that the
                  pictures in DATA (make_dataset shapes --style) do not show
Writes result.json and report.html into a folder, which is printed last. Stopped, the same command with --out that
folder goes on; other measures of the same model may be added to it.
"""

import argparse
from pathlib import Path
from typing import Any

from vqt2i.cli.options import (
    RUNS,
    add_engine_arguments,
    add_machine_arguments,
    add_part_arguments,
    add_sampling_arguments,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a pipeline folder, a GPT run, or a shipped model's "
                        "name (default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="a data set to compare with")
    parser.add_argument("--measure", metavar="M,M,...", help="which (default: alignment, and with DATA fidelity and "
                        "reconstruction too)")  # fmt: skip
    parser.add_argument("--prompts", metavar="WHICH", help="drawn: from the shapes; captions: of DATA; or a file as "
                        "`generate --prompts` reads it (default: captions if there is DATA, else drawn)")  # fmt: skip
    parser.add_argument("--kinds", metavar="K,K,...", help="of drawn prompts: single_seen, single_unseen, two_seen, "
                        "two_unseen, three, full_seen, full_unseen (default: all); of scenes to caption: "
                        "single_, two_ and three_ of both (default: single_seen,single_unseen)")  # fmt: skip
    parser.add_argument("--n-prompts", type=int, metavar="N", help="prompts (default: 100 of each kind, half English, "
                        "half Chinese; at most 1,000 captions; all of a file), or scenes of each kind")  # fmt: skip
    parser.add_argument("--rerank", type=int, metavar="K", dest="candidates",
                        help="candidates of each prompt (default: 16; 1 is no reranking)")  # fmt: skip
    parser.add_argument("--scorer", choices=("clip", "caption", "both"), help="what ranks them where one is to be "
                        "kept (default: both where the model has a CLIP, else caption)")  # fmt: skip
    parser.add_argument("--sweep", nargs="+", metavar="SETTING=V,V", help="what the sweep goes over (default: "
                        "guidance=1,2,3,4 temperature=0.5,0.7,1)")  # fmt: skip
    parser.add_argument("--split", metavar="NAME", help="of DATA (default: val)")
    parser.add_argument("--n-images", type=int, metavar="N", help="of the split, the first N (default: 5,000)")
    parser.add_argument("--judge", metavar="MODEL", help="whose CLIP and GPT judge the pictures, or a scorer's "
                        "folder (tools/import_checkpoint.py); models are comparable by one judge only (default: the "
                        "model's own)")  # fmt: skip
    parser.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's Inception weights; without "
                        "them distances are those of the judge's CLIP")  # fmt: skip
    parser.add_argument("--lpips", type=Path, nargs=2, metavar=("VGG16", "LPIPS"), help="weights: torchvision's VGG16 "
                        "and torch-fidelity's weights-vgg16-lpips.pth")  # fmt: skip
    add_part_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, metavar="S", help="of prompts and pictures (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder, or one to go on with "
                        "(default: evaluations/0001 and so on)")  # fmt: skip
    add_engine_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> int | None:
    from vqt2i.errors import ResourceError, UserError
    from vqt2i.processes import find_launcher, one_command, start_processes

    if args.devices is not None and args.devices < 1:
        raise ResourceError(f"--devices: found {args.devices}, expected 1 or more")
    if args.out and args.out.is_file():
        raise UserError(f"--out {args.out}: a file; expected a folder")
    if args.devices and args.devices > 1 and find_launcher() is None:
        return start_processes(args.devices, args.argv)
    with one_command(stopped="stopped"):
        _evaluate(args)
    return None


def _evaluate(args: argparse.Namespace) -> None:
    """One process's part; alone it is all of it."""
    from vqt2i.cli.options import placement_from, sampling_from
    from vqt2i.config import build_config
    from vqt2i.data.report import section_text
    from vqt2i.data.shards import DataSet
    from vqt2i.evaluation.judge import Judge, open_judge
    from vqt2i.evaluation.measure import Evaluation, EvaluationConfig, evaluate
    from vqt2i.evaluation.page import PAGE, sections_of
    from vqt2i.generation.find import open_pipeline
    from vqt2i.generation.output import next_folder
    from vqt2i.processes import LOADING, find_place, from_first

    place = find_place(args.devices)
    given = {name: value for name, value in _given(args).items() if value is not None}
    build_config(EvaluationConfig, given | {"sampling": {}}, "evaluate")  # before anything is loaded
    data = DataSet.open(args.data) if args.data else None
    placement = placement_from(args, place) | {"engine": args.engine, "precision": args.precision}
    kinds = ("upscaler",) if "upscaling" in given["measures"] else ("gpt",)
    pipeline = open_pipeline(args.model, args.runs, kinds=kinds, clip=args.clip, prior=args.prior, **placement)
    sampling = sampling_from(args, pipeline.config.sampling)
    config = build_config(EvaluationConfig, given | {"sampling": sampling.model_dump()}, "evaluate")
    judge = open_judge(args.judge, args.runs, place.device) if args.judge else Judge.of(pipeline)
    out = from_first(lambda: args.out or next_folder(Path("evaluations")), LOADING)
    evaluation = Evaluation(pipeline, config, judge, data, place, out)
    result = evaluate(evaluation, args.model or "the newest, or the shipped one")
    for measure, measured in result.measures.items() if result else ():
        print(f"# {measure}", *map(section_text, sections_of(measure, measured.rows, intervals=False)), "", sep="\n")
    if result:
        print(f"See {out / PAGE}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of `EvaluationConfig`."""
    default = "alignment,fidelity,reconstruction" if args.data else "alignment"
    names = ("n_prompts", "candidates", "scorer", "seed", "split", "n_images", "inception", "lpips")
    return {name: getattr(args, name) for name in names} | {
        "measures": (args.measure or default).split(","),
        "prompts": args.prompts or ("captions" if args.data else "drawn"),
        "kinds": args.kinds and args.kinds.split(","),
        "sweep": args.sweep and dict(map(_setting, args.sweep)),
    }


def _setting(text: str) -> tuple[str, list[str]]:
    """A name and its values."""
    name, _, values = text.partition("=")
    return name, values.split(",")

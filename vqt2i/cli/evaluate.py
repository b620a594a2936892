"""Measure a model trained on the shapes: how often do its pictures show what the prompt says?

The oracle reads each picture back into its objects, without a trained model. With --captions: how often is what the
model says of a picture true?
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqt2i.cli.options import RUNS, add_engine_arguments, add_sampling_arguments

if TYPE_CHECKING:
    from vqt2i.evaluation.oracle import OracleProtocol
    from vqt2i.generation import TextToImage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a pipeline folder, a GPT run, or a shipped model's name "
                        "(default: the newest in the runs folder, else the shipped one)")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--captions", action="store_true", help="judge captions of rendered scenes that no training "
                      "has seen, instead of pictures of prompts")  # fmt: skip
    what.add_argument("--style", type=Path, metavar="DIR", help="judge pictures of prompts with a style's words and "
                      "without, of objects not in the pictures in DIR (make_dataset shapes --style)")  # fmt: skip
    parser.add_argument("--kinds", help="of prompts, from single_seen, single_unseen, two_seen, two_unseen, three "
                        "(default: single_unseen,two_unseen; with --style the seen ones too); of scenes to caption, "
                        "three_seen and three_unseen too (default: single_seen,single_unseen)")  # fmt: skip
    parser.add_argument("--n-prompts", type=int, default=100, help="prompts of each kind, half English, half Chinese, "
                        "or scenes (default: 100)")  # fmt: skip
    parser.add_argument("--rerank", type=int, default=16, metavar="K", help="candidates per prompt (default: 16)")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and pictures (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the result (default: print only)")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.generation.find import open_pipeline

    pipeline = open_pipeline(args.model, args.runs, engine=args.engine, precision=args.precision)
    (_run_captions if args.captions else _run_style if args.style else _run_oracle)(args, pipeline)


def _run_oracle(args: argparse.Namespace, pipeline: "TextToImage") -> None:
    from vqt2i.evaluation.oracle import measure_oracle
    from vqt2i.runtime import counter

    protocol = _protocol(args, pipeline, "single_unseen,two_unseen")
    with counter("drawing and judging", _n_tokens(protocol, pipeline), unit="tokens") as on_token:
        results = measure_oracle(pipeline, protocol, on_token)
    for kind, result in results.items():
        by_scorer = result["accuracy"]
        line = "  ".join(f"{name} {value['right']:.1%}" for name, value in by_scorer.items())
        error = max(value["standard_error"] for value in by_scorer.values())
        retrieved = f"  R-precision {result['r_precision']:.1%}" if "r_precision" in result else ""
        print(f"{kind:14} {line}  (± {error:.1%}){retrieved}")
    _write(args, pipeline, protocol, {"results": results})


def _run_style(args: argparse.Namespace, pipeline: "TextToImage") -> None:
    import dataclasses

    from vqt2i.data.shards import DataSet
    from vqt2i.evaluation.style import measure_style
    from vqt2i.runtime import counter

    pictures = DataSet.open(args.style)
    protocol = _protocol(args, pipeline, "single_seen,single_unseen,two_seen,two_unseen")
    with counter("drawing and judging", 2 * _n_tokens(protocol, pipeline), unit="tokens") as on_token:
        results = measure_style(pipeline, protocol, pictures.split("train"), on_token)
    for kind, by_asked in results.items():
        for asked, found in by_asked.items():
            print(f"{kind:14} {asked:6} in the style {found.in_style:6.1%}  right {found.right:6.1%}  "
                  f"as asked for {found.wanted:6.1%}  (± {found.standard_error:.1%})")  # fmt: skip
    shares = {kind: {asked: dataclasses.asdict(found) for asked, found in by.items()} for kind, by in results.items()}
    _write(args, pipeline, protocol, {"pictures": pictures.fingerprint, "style": shares})


def _protocol(args: argparse.Namespace, pipeline: "TextToImage", kinds: str) -> "OracleProtocol":
    from vqt2i.cli.options import sampling_from
    from vqt2i.evaluation.oracle import OracleProtocol

    asked = tuple((args.kinds or kinds).split(","))
    return OracleProtocol(asked, args.n_prompts, args.rerank, args.seed, sampling_from(args, pipeline.config.sampling))


def _n_tokens(protocol: "OracleProtocol", pipeline: "TextToImage") -> int:
    n_pictures = len(protocol.kinds) * protocol.n_prompts * protocol.n_candidates
    return n_pictures * pipeline.gpt.layout.image_length


def _write(
    args: argparse.Namespace, pipeline: "TextToImage", protocol: "OracleProtocol", results: dict[str, Any]
) -> None:
    import dataclasses

    from vqt2i.files import write_json

    if args.out:
        facts = dataclasses.asdict(protocol) | {
            "sampling": protocol.sampling.model_dump(), "precision": pipeline.engine.precision,
        }  # fmt: skip
        write_json(args.out, {"protocol": facts, "models": pipeline.fingerprints, **results})


def _run_captions(args: argparse.Namespace, pipeline: "TextToImage") -> None:
    import dataclasses

    from vqt2i.evaluation.captions import CaptionProtocol, measure_captions
    from vqt2i.files import write_json
    from vqt2i.generation import BeamConfig
    from vqt2i.runtime import counter

    kinds = tuple((args.kinds or "single_seen,single_unseen").split(","))
    protocol = CaptionProtocol(kinds, args.n_prompts, args.seed, BeamConfig())
    with counter("captioning and judging", len(kinds) * args.n_prompts, unit="pictures") as on_image:
        results = measure_captions(pipeline, protocol, on_image)
    for kind, found in results.items():
        print(f"{kind:14} right {found.right:.1%}  colour and shape {found.colour_shape:.1%}  "
              f"a sentence {found.sentence:.1%}  (± {found.standard_error:.1%})")  # fmt: skip
    if args.out:
        facts = dataclasses.asdict(protocol) | {"how": protocol.how.model_dump()}
        accuracies = {kind: dataclasses.asdict(found) for kind, found in results.items()}
        write_json(args.out, {"protocol": facts, "models": pipeline.fingerprints, "captions": accuracies})

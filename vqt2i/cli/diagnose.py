"""Find the weak stage of a trained pipeline: image tokenizer, GPT, text conditioning or sampling.

Writes DIR/report.html, a page with pictures of what each stage makes of validation samples, and DIR/diagnosis.json with
the numbers; prints the verdict.
"""

import argparse
from pathlib import Path

from vqt2i.cli.options import RUNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a pipeline folder, a GPT run, or a shipped model's name")
    parser.add_argument("data", type=Path, metavar="DATA", help="a data set like the one that it was trained on")
    parser.add_argument("--n-samples", type=int, metavar="N", help="of each split, measured (default: 64)")
    parser.add_argument("--n-drawn", type=int, metavar="N", help="of these, drawn and shown (default: 8)")
    parser.add_argument("--train-split", metavar="NAME", help="default: train")
    parser.add_argument("--validation-split", metavar="NAME", help="default: val")
    parser.add_argument("--overfit-steps", type=int, metavar="N", help="of learning one batch by heart (default: 30)")
    parser.add_argument("--seed", type=int, metavar="S", help="of what is drawn (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), metavar="DIR", help="default: diagnosis")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> None:
    from vqt2i.config import build_config
    from vqt2i.data.shards import DataSet
    from vqt2i.errors import UserError
    from vqt2i.evaluation.diagnosis import DiagnosisConfig, diagnose
    from vqt2i.evaluation.diagnosis_page import write_page
    from vqt2i.files import write_atomic, write_json
    from vqt2i.generation.find import open_pipeline
    from vqt2i.runtime import say

    if args.out.is_file():
        raise UserError(f"--out {args.out}: a file; expected a folder")
    given = {k: v for k, v in vars(args).items() if k in DiagnosisConfig.model_fields and v is not None}
    config = build_config(DiagnosisConfig, given, "diagnose")
    dataset = DataSet.open(args.data)
    pipeline = open_pipeline(args.model, args.runs)
    found = diagnose(pipeline, dataset, config, lambda stage: say(f"measuring: {stage}"))
    args.out.mkdir(parents=True, exist_ok=True)
    marks = ", ".join(f"{part} {fingerprint[:8]}" for part, fingerprint in pipeline.fingerprints.items())
    facts = f"data set {args.data} ({dataset.fingerprint[:8]}), {config.n_samples} samples of each split · {marks}"
    write_atomic(args.out / "report.html", write_page(found, f"Diagnosis of {args.model}", facts))
    about = {"model": args.model, "fingerprints": pipeline.fingerprints, "data": dataset.fingerprint}
    write_json(args.out / "diagnosis.json", about | {"settings": config.model_dump()} | found.to_json())
    for stage in found.stages:
        print(f"{'weak' if stage.weak else 'fine'}  {stage.name}: {stage.reason}")
    print(f"{found.verdict} See {args.out / 'report.html'}")

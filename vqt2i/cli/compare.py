"""Put results of `evaluate` side by side; different protocols are refused, with what differs.

For instance: two models by one judge, `evaluate A --judge J --out a`, `evaluate B --judge J --out b`, `compare a b`.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="folders that `evaluate` wrote")
    parser.add_argument("--measure", metavar="M,M,...", help="these only (default: all that the results share)")
    parser.add_argument("--anyway", action="store_true", help="show different protocols too, marked as such")


def run(args: argparse.Namespace) -> None:
    from vqt2i.data.report import section_text
    from vqt2i.errors import DataError
    from vqt2i.evaluation.comparison import compare, section_of
    from vqt2i.evaluation.result import read_result

    if len(args.results) < 2:
        raise DataError(f"{args.results[0]}: one result; expected two or more to compare")
    results = [read_result(folder) for folder in args.results]
    compared = compare(results, args.measure and args.measure.split(","))
    unlike = [f"{one.measure}: {'; '.join(one.differences)}" for one in compared if one.differences]
    if unlike and not args.anyway:
        raise DataError(f"measured by different protocols: {' | '.join(unlike)}. Measure alike, choose others with "
                        "--measure, or give --anyway")  # fmt: skip
    for one in compared:
        print(section_text(section_of(one, list(map(str, args.results)))))

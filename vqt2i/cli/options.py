"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

RUNS = Path("runs")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --set, --name, --runs, --resume."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file (default: the built-in settings, "
                        "which train on the embedded shapes)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one setting, for example trainer.max_steps=100; may be repeated")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on with the newest run of this name")

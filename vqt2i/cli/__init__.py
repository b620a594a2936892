"""The `vqt2i` command and `tools/*.py`: one module per verb, with `add_arguments(parser)` and `run(args)`.

`run` returns None, or an exit code. `args.argv` is the command itself, from the verb on.

Modules import the heavy libraries inside `run`, so that `--help` answers at once.
"""

import argparse
import importlib
import sys

from vqt2i import __version__
from vqt2i.errors import UserError
from vqt2i.runtime import is_first_process, keep_freed_memory

VERBS = (
    "make_dataset",
    "train_tokenizer",
    "train_vqgan",
    "encode_dataset",
    "plan",
    "train_gpt",
    "train_clip",
    "train_prior",
    "export",
    "generate",
    "edit",
    "upscale",
    "caption",
    "evaluate",
    "compare",
    "gate",
    "diagnose",
    "probe",
    "make_pipeline",
    "import_checkpoint",
    "benchmark",
)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, or 2 for an error the user can mend (told without a traceback)."""
    keep_freed_memory()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "--version"):
        _top_parser().parse_args(argv or ["--help"])
        return 0
    verb = argv[0].replace("-", "_")
    if verb not in VERBS:
        print(f"vqt2i: unknown command {argv[0]!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    args = parser_of(verb).parse_args(argv[1:], argparse.Namespace(argv=argv))
    try:
        return importlib.import_module(f"vqt2i.cli.{verb}").run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not is_first_process():
            return 0  # as in `Stopped`
        print("interrupted", file=sys.stderr)
        return 130


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The argument parser of one of `VERBS`; its description is the docstring of the verb's module."""
    module = importlib.import_module(f"vqt2i.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"vqt2i {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return parser


def _top_parser() -> argparse.ArgumentParser:
    lines = []
    for verb in VERBS:
        module = importlib.import_module(f"vqt2i.cli.{verb}")
        lines.append(f"  {verb:16} {(module.__doc__ or '').splitlines()[0]}")
    parser = argparse.ArgumentParser(
        prog="vqt2i",
        usage="vqt2i COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(lines) + "\n\n`vqt2i COMMAND --help` explains one.",
    )
    parser.add_argument("--version", action="version", version=f"vqt2i {__version__}")
    return parser

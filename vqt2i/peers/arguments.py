"""A model's arguments as JSON, which some families' own code builds a model from and no release has beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqt2i.errors import CheckpointError


def find_arguments(path: Path, given: Path | None) -> dict[str, Any]:
    """The model's arguments in a JSON file: the one given, else `config.json` beside the checkpoint, if it is one.

    Raises:
        CheckpointError: the file that was given cannot be read as such.
    """
    file = given or path.parent / "config.json"
    if given is None and not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not the model's arguments as JSON ({error})") from None
    return values | {"file": file} if isinstance(values, dict) else {}


def require_same_arguments(path: Path, told: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the weights are of another size than the arguments say."""
    for name, value in told.items():
        if arguments.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {value} in the weights, {arguments[name]} in "
                                  f"{arguments['file']}; give the right arguments by --settings")  # fmt: skip

"""`result.json`: what was measured of a model, each measure with its whole protocol."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from vqt2i.config import Config, build_config
from vqt2i.errors import ConfigError, DataError
from vqt2i.files import write_json
from vqt2i.origin import Origin

RESULT = "result.json"
Where = dict[str, str | int | float]


@dataclass(frozen=True)
class Row:
    """A value with its 95 % interval over `n` prompts, pictures or the like; None where there is none.

    where: what it is a value of, beside its name: which prompts, chosen by what of how many, at which settings.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    where: Where


class Measured(Config):
    """One measure: the protocol is all that its rows depend on, but for the model and the machine's rounding."""

    protocol: dict[str, Any]
    rows: tuple[Row, ...]
    seconds: float
    origin: Origin


class Result(Config):
    """What is known of a model. fingerprints: of its parts."""

    format_version: int = 1
    model: str
    fingerprints: dict[str, str]
    measures: dict[str, Measured] = Field(default_factory=dict)

    def with_measure(self, name: str, measured: Measured) -> "Result":
        return self.model_copy(update={"measures": self.measures | {name: measured}})


def read_result(folder: Path) -> Result:
    """The result in a folder.

    Raises:
        DataError: none there, or a damaged one.
    """
    path = folder / RESULT
    try:
        return build_config(Result, json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a folder that tools/evaluate.py "
                        "wrote") from None  # fmt: skip
    except (ValueError, ConfigError) as error:
        raise DataError(f"{path}: not a result of tools/evaluate.py ({error})") from None


def write_result(folder: Path, result: Result) -> None:
    write_json(folder / RESULT, result.model_dump(mode="json"))


def differences(first: dict[str, Any], second: dict[str, Any], path: str = "") -> list[str]:
    """What is not equal in two protocols: "sampling.guidance 2.0, 3.0"."""
    found = []
    for key in dict.fromkeys([*first, *second]):
        name, one, other = f"{path}{key}", first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{name}.")
        elif one != other:
            found.append(f"{name} {_shown(one)}, {_shown(other)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:8]  # a fingerprint
    return "none" if value is None else str(value)

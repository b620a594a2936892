"""`run.json`: what was run, from which code and data, on which machine. Reading it executes nothing."""

import json
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from vqt2i.config import Config, build_config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import write_json
from vqt2i.origin import Origin, describe_origin
from vqt2i.runtime import Precision

NAME = "run.json"


class RunStart(Origin):
    """One start of a run, at which step: 0, or that of the checkpoint that it went on from."""

    step: NonNegativeInt
    devices: PositiveInt


class RunRecord(Config):
    """fingerprints: of the data set and the tokenizers, which a resumed run must share. precision: as resolved."""

    kind: str
    fingerprints: dict[str, str]
    precision: Precision
    starts: tuple[RunStart, ...]


def read_record(run: Path) -> RunRecord:
    """Raises CheckpointError where there is no readable run.json."""
    path = run / NAME
    try:
        return build_config(RunRecord, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the run cannot be gone on with") from None


def write_record(run: Path, record: RunRecord) -> None:
    write_json(run / NAME, record.model_dump(mode="json"))


def describe_start(step: int, devices: int) -> RunStart:
    """A start in this process."""
    return RunStart(step=step, devices=devices, **describe_origin().model_dump())

"""`run.json`: what was run, from which code and data, on which machine. Reading it executes nothing."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt

from vqt2i import __version__
from vqt2i.config import Config, build_config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import write_json
from vqt2i.runtime import Precision

NAME = "run.json"
_LIBRARIES = ("torch", "lightning", "deepspeed", "numpy", "sentencepiece", "safetensors", "transformers")


class Origin(Config):
    """What something was made by: when, by which command and code, on which machine."""

    time: str
    command: str
    git_commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]


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


def describe_origin() -> Origin:
    """What is known of this process and its machine."""
    return Origin(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", *sys.argv]),
        git_commit=git_commit(Path(__file__).parents[2]),
        versions={"python": platform.python_version(), "vqt2i": __version__, **_library_versions()},
        machine={
            "host": platform.node(),
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    )


def git_commit(repository: Path) -> str | None:
    """The commit of the code, "+changes" after it where files differ from it; None where there is no repository."""
    if not (repository / ".git").exists():  # installed: a repository further up is another project's
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", repository, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit


def _library_versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # DeepSpeed is for Linux only, transformers for benchmarks
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or a processor that Linux has no name for
        return platform.processor() or platform.machine()

"""What something was made by: which command, code and libraries, on which machine."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vqt2i import __version__
from vqt2i.config import Config

_LIBRARIES = (
    "torch", "lightning", "deepspeed", "numpy", "sentencepiece", "safetensors", "transformers", "torch-fidelity",
)  # fmt: skip


class Origin(Config):
    """What something was made by: when, by which command and code, on which machine."""

    time: str
    command: str
    git_commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]


def describe_origin() -> Origin:
    """What is known of this process and its machine."""
    import torch  # takes seconds

    return Origin(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", *sys.argv]),
        git_commit=git_commit(Path(__file__).parents[1]),
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

"""Published checkpoint files, read without running anything that is in them, and memory-mapped where they can be.

`torch.load(weights_only=True)` builds tensors and plain containers only. What else a file names is refused, but for
classes of frameworks that trainers leave in their checkpoints: an inert placeholder stands in for each.
"""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqt2i.errors import CheckpointError
from vqt2i.weights import Weights

# what placeholders stand in for: names that begin so
INERT = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "deepspeed.", "transformers.",
    "_codecs.encode", "typing.Any", "pathlib.PosixPath", "pathlib.Path", "pathlib.WindowsPath",
)  # fmt: skip
STATES = ("state_dict", "model", "module")  # where trainers put the weights


class Inert(dict):
    """Stands in for an object of a class that is not loaded: takes what it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    __hash__ = object.__hash__


class Checkpoint(NamedTuple):
    """The tensors of a file by their names, and what else is in it. parts: the files of one that lies in several."""

    path: Path
    tensors: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    parts: tuple[Path, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """The weights in a `.safetensors` file or in one that `torch.save` wrote.

    Raises:
        CheckpointError: no such file, a damaged one, one that holds no weights, or names code that is to be run.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {what}; expected a checkpoint file")
    if path.suffix == ".safetensors":
        return Checkpoint(path, Weights([path]), {})
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected tensors by their names")
    for name in STATES:
        if isinstance(inner := loaded.get(name), Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            tensors, rest = inner, {key: value for key, value in loaded.items() if key != name}
            break
    else:
        tensors, rest = loaded, {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: no weights in it, found {', '.join(map(str, list(loaded)[:8])) or 'nothing'}; "
                              f"expected tensors by their names, or such under {', '.join(STATES)}")  # fmt: skip
    return Checkpoint(path, tensors, rest)


def _load(path: Path) -> Any:
    as_zip = zipfile.is_zipfile(path)
    damaged = f"{path}: damaged or not a checkpoint of PyTorch"
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if as_zip else []
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, IndexError, KeyError) as error:
        raise _refused(path, error) if _names_code(error) else CheckpointError(f"{damaged} ({_line(error)})") from None
    allowed: list[Any] = [argparse.Namespace]  # a record of settings; it runs nothing
    for name in foreign:
        if name == "argparse.Namespace":
            continue
        if not name.startswith(INERT):
            raise CheckpointError(f"{path}: not opened, for loading it would run {name}; weights need no code, so ask "
                                  "who made the file for one of weights alone (safetensors)")  # fmt: skip
        allowed.append((Inert, name))
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=as_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) if _names_code(error) else CheckpointError(f"{damaged} ({_line(error)})") from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{damaged} ({_line(error)}); is it whole? Copy it again") from None


def _names_code(error: Exception) -> bool:
    return "GLOBAL" in str(error) or "unrecognized function" in str(error)


def _refused(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: not opened, for loading it would run code that is in it ({_line(error)}); ask who "
                           "made the file for one of weights alone (safetensors)")  # fmt: skip


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)
    return told.split(". ")[0][:200]

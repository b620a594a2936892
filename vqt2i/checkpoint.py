"""Model folders: `config.yaml`, `weights.safetensors`, `card.json`; fingerprints; strict loading that runs no code."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vqt2i.config import ConfigT, load_config, to_yaml
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import new_folder, sha256_of_parts, write_atomic, write_json
from vqt2i.weights import INDEX, SHARD_BYTES, WEIGHTS, Later, Weights, weight_files, write_weights

ModelT = TypeVar("ModelT", bound=nn.Module)
CONFIG, CARD, README = "config.yaml", "card.json", "README.md"


def save_model(
    folder: Path, module: nn.Module, config: ConfigT, card: dict[str, Any], dtype: torch.dtype = torch.float32
) -> str:
    """Write a model folder atomically (an older one is replaced) and return its fingerprint.

    Args:
        dtype: of the floating-point weights on disk; integers keep theirs.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        tensors[name] = Later(tuple(tensor.shape), kept, lambda tensor=tensor, kept=kept: tensor.detach().to(kept))
    with new_folder(folder, replace=True) as partial:
        return fill_model_folder(partial, config, tensors, card)


def fill_model_folder(
    folder: Path,
    config: ConfigT,
    tensors: Mapping[str, Later],
    card: dict[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> str:
    """Write a model's files into an empty folder, tensor by tensor, and return its fingerprint."""
    text = to_yaml(config)
    write_atomic(folder / CONFIG, text)
    files = write_weights(folder, tensors, shard_bytes=shard_bytes, on_bytes=on_bytes)
    fingerprint = sha256_of_parts(text, *files)
    write_json(folder / CARD, {"fingerprint": fingerprint, **card})
    return fingerprint


def load_model(folder: Path, config_class: type[ConfigT], build: Callable[[ConfigT], ModelT]) -> ModelT:
    """Build the model of a folder and load its weights strictly, in evaluation mode.

    The module gets two plain attributes: `config` (by its own constructor) and `fingerprint`.

    Raises:
        CheckpointError: no such folder, a missing or damaged file, weights that do not fit the configuration.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    config_text = _read(folder, CONFIG)
    try:
        config = load_config(config_class, folder / CONFIG)
    except ConfigError as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(f"{first_line}; not a model of the kind expected, or of another version") from None
    weights = Weights(files)
    model = build(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found = weights.shape(name) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            told = folder / (INDEX if len(files) > 1 else WEIGHTS)
            raise CheckpointError(f"{told}: {name}: found {found}, its {CONFIG} expects {wanted}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])
    model.fingerprint = sha256_of_parts(config_text, *files)
    return model.eval()


def read_card(folder: Path) -> dict[str, Any]:
    """The model card of a folder as a dictionary."""
    try:
        card = json.loads(_read(Path(folder), CARD))
    except ValueError as error:
        raise CheckpointError(f"{Path(folder) / CARD}: not JSON ({error})") from None
    if not isinstance(card, dict):
        raise CheckpointError(f"{Path(folder) / CARD}: expected a JSON object, found a {type(card).__name__}")
    return card


def hub_card(name: str, tags: list[str], licence: str | None, text: str) -> str:
    """`README.md` as the Hugging Face Hub reads it, so that a folder can be pushed there as it is."""
    known = f"license: {licence.lower()}\n" if licence else ""
    return f"---\n{known}library_name: vqt2i\ntags: [{', '.join(tags)}]\n---\n\n# {name}\n\n{text}\n"


def require_same(what: str, path: Path | str, *, found: str, expected: str, hint: str) -> None:
    """Raise a CheckpointError unless two fingerprints agree."""
    if found != expected:
        raise CheckpointError(f"{path}: made with {what} {expected[:8]}, but this is {found[:8]}; {hint}")


def _weight_files(folder: Path) -> list[Path]:
    _require_folder(folder)
    files = weight_files(folder)
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise _unreadable(file, error) from None
    return files


def _read(folder: Path, name: str) -> bytes:
    _require_folder(folder)
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise _unreadable(folder / name, error) from None


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; expected one holding {CONFIG} and {WEIGHTS}")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: {error.strerror}; a model folder holds {CONFIG}, {WEIGHTS} and {CARD}")

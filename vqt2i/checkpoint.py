"""Model folders: `config.yaml`, `weights.safetensors`, `card.json`; fingerprints; strict loading that runs no code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from vqt2i.config import ConfigT, load_config, to_yaml
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import new_folder, sha256_of_parts, write_atomic, write_json

ModelT = TypeVar("ModelT", bound=nn.Module)
CONFIG, WEIGHTS, CARD = "config.yaml", "weights.safetensors", "card.json"


def save_model(
    folder: Path, module: nn.Module, config: ConfigT, card: dict[str, Any], dtype: torch.dtype = torch.float32
) -> str:
    """Write a model folder atomically (an older one is replaced) and return its fingerprint.

    Args:
        dtype: of the floating-point weights on disk; integers keep theirs.
    """
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    weights, text = save_tensors(state), to_yaml(config)
    fingerprint = sha256_of_parts(text, weights)
    with new_folder(folder, replace=True) as partial:
        write_atomic(partial / CONFIG, text)
        write_atomic(partial / WEIGHTS, weights)
        write_json(partial / CARD, {"fingerprint": fingerprint, **card})
    return fingerprint


def load_model(folder: Path, config_class: type[ConfigT], build: Callable[[ConfigT], ModelT]) -> ModelT:
    """Build the model of a folder and load its weights strictly, in evaluation mode.

    The module gets two plain attributes: `config` (by its own constructor) and `fingerprint`.

    Raises:
        CheckpointError: no such folder, a missing or damaged file, weights that do not fit the configuration.
    """
    folder = Path(folder)
    weights = _read(folder, WEIGHTS)
    config_text = _read(folder, CONFIG)
    try:
        config = load_config(config_class, folder / CONFIG)
    except ConfigError as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(f"{first_line}; not a model of the kind expected, or of another version") from None
    try:
        state = load_tensors(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged or not safetensors ({error}); copy it again") from None
    model = build(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise CheckpointError(f"{folder / WEIGHTS}: {name}: found {found}, its {CONFIG} expects {wanted}")
    model.load_state_dict(state)
    model.fingerprint = sha256_of_parts(config_text, weights)
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


def require_same(what: str, path: Path | str, *, found: str, expected: str, hint: str) -> None:
    """Raise a CheckpointError unless two fingerprints agree."""
    if found != expected:
        raise CheckpointError(f"{path}: made with {what} {expected[:8]}, but this is {found[:8]}; {hint}")


def _read(folder: Path, name: str) -> bytes:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; expected one holding {CONFIG} and {WEIGHTS}")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        expected = f"a model folder holds {CONFIG}, {WEIGHTS} and {CARD}"
        raise CheckpointError(f"{folder / name}: {error.strerror}; {expected}") from None

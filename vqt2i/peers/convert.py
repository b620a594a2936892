"""From a public checkpoint to a model folder of ours, tensor by tensor, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vqt2i.checkpoint import CARD, README, fill_model_folder, hub_card, load_model
from vqt2i.errors import CheckpointError, DataError, UserError
from vqt2i.files import new_folder, require_free, sha256_of_file, write_atomic
from vqt2i.peers import FAMILIES, Compared, Family, Options
from vqt2i.peers.family import MODELS
from vqt2i.peers.reading import Checkpoint
from vqt2i.peers.table import converted
from vqt2i.runtime import counter, say
from vqt2i.weights import SHARD_BYTES

NO_OPTIONS = Options()


def import_checkpoint(
    family: Family,
    path: Path,
    out: Path,
    options: Options = NO_OPTIONS,
    *,
    facts: dict[str, Any] | None = None,
    check: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the model in a public checkpoint into the new folder `out` and return its fingerprint.

    Args:
        facts: for the card, besides what the family says.
        check: safetensors of recorded inputs and outputs that the model must reproduce, else nothing is written.

    Raises:
        CheckpointError: another family, a damaged file, weights that do not fit, outputs that differ.
        UserError: `out` exists already, or an option that means nothing here.
    """
    require_free(out)
    for name, value in options._asdict().items():
        if value is not None and name in family.unused:
            raise UserError(f"{name} {value}: means nothing to the family {family.name}; leave it out")
    io = None if check is None else read_io(check)
    checkpoint = family.read(path)
    require_family(family, checkpoint)
    family = family.of(checkpoint, options)
    config = family.config(checkpoint, options)
    config_class, model_class = MODELS[family.kind]
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    tensors = converted(
        family.table(config), checkpoint.tensors, expected, str(checkpoint.path), ignored=family.ignored
    )
    card = card_of(family, checkpoint) | family.facts(config, options) | (facts or {})
    files = family.files(checkpoint, options)
    with new_folder(out) as partial:
        megabytes = sum(tensor.n_bytes for tensor in tensors.values()) / 1e6
        with counter("converting", round(megabytes), unit="MB") as advance:
            fingerprint = fill_model_folder(
                partial, config, tensors, card, shard_bytes=shard_bytes, on_bytes=lambda n: advance(n / 1e6)
            )
        for name, content in files.items():
            write_atomic(partial / name, content)
        write_atomic(partial / README, hub_card(out.name, [family.kind, family.name], family.licence, about(card)))
        if io is not None:
            model = load_model(partial, config_class, model_class)
            try:
                compared = list(family.compare(model, io))
            except (KeyError, RuntimeError, ValueError, IndexError, DataError) as error:
                raise CheckpointError(f"--check {check}: holds no inputs and outputs of this model ({error})") from None
            require_agreement(check, compared)
    return fingerprint


def require_family(family: Family, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a checkpoint of another family; names that where it is known."""
    if family.recognises(checkpoint.tensors):
        return
    others = [other.name for other in FAMILIES.values() if other.recognises(checkpoint.tensors)]
    if others:
        raise CheckpointError(f"{checkpoint.path}: of the family {others[0]}, not {family.name}; "
                              f"import it as {others[0]}")  # fmt: skip
    missing = [name for name in family.markers if name not in checkpoint.tensors]
    some = ", ".join(list(checkpoint.tensors)[:4])
    raise CheckpointError(f"{checkpoint.path}: not of the family {family.name}, nor of another that is known: it lacks "
                          f"{', '.join(missing)}; found {some} and so on")  # fmt: skip


def card_of(family: Family, checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a model comes from."""
    source: dict[str, Any] = {"family": family.name, "repository": family.repository, "file": checkpoint.path.name}
    if checkpoint.parts:
        source["parts"] = [{"file": path.name, **_size_of(path)} for path in checkpoint.parts]
    elif checkpoint.path.is_file():
        source |= _size_of(checkpoint.path)
    return {"kind": family.kind, "licence": family.licence, "source": source}


def _size_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def read_io(path: Path) -> dict[str, torch.Tensor]:
    """Recorded inputs and outputs.

    Raises:
        CheckpointError: no such file, or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--check {path}: {error}; expected safetensors of inputs and outputs") from None


def require_agreement(path: Path, compared: list[Compared]) -> None:
    """Tells each comparison; raises CheckpointError where one does not agree, or there is none."""
    if not compared:
        raise CheckpointError(f"--check {path}: has no inputs and outputs that this family is compared by")
    for one in compared:
        what = f"{one.found:g} ids differ" if one.allowed == 0 else f"differs by {one.found:.1e} at most"
        say(f"check: {one.name} {what}" + ("" if one.agrees else f", allowed is {one.allowed:g}"))
    if wrong := [one.name for one in compared if not one.agrees]:
        raise CheckpointError(f"--check {path}: {', '.join(wrong)} differ from what is recorded; nothing was written")


def about(card: dict[str, Any]) -> str:
    """What a model's `README.md` says."""
    source = card["source"]
    return (
        f"Converted from `{source['file']}` of [{source['family']}]({source['repository']}) by `vqt2i "
        f"import_checkpoint`; licence of the weights: {card['licence']}. `{CARD}` has the checksum of the original. "
        "The same numbers in other files: nothing was trained or rounded."
    )

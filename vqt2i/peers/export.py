"""The other way: a model of ours as a checkpoint that a family's own code reads, with the settings it is built from."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from vqt2i.checkpoint import CONFIG, load_model, read_card
from vqt2i.config import load_config
from vqt2i.errors import CheckpointError
from vqt2i.files import new_folder, require_free, write_atomic
from vqt2i.peers import FAMILIES
from vqt2i.peers.family import MODELS, Family
from vqt2i.peers.table import exported


def export_native(folder: Path, project: str, out: Path) -> Family:
    """Write the model of a folder, or of a run, in the form of a project into the new folder `out`; gives its family.

    Raises:
        CheckpointError: no model there, or one that this project has no place for; what does not fit is named.
        UserError: `out` exists already.
    """
    require_free(out)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    kind = read_card(folder).get("kind")
    families = [family for family in FAMILIES.values() if family.project == project and family.kind == kind]
    if not families:
        raise CheckpointError(f"{folder}: a model of kind {kind!r}, of which {project} has none")
    config_class, model_class = MODELS[kind]
    config = load_config(config_class, folder / CONFIG)
    misfits = {family: family.misfits(config) for family in families}
    family = next((family for family in families if not misfits[family]), None)
    if family is None:
        told = "; ".join(f"{family.name} has no place for {', '.join(found)}" for family, found in misfits.items())
        raise CheckpointError(f"{folder}: {told}")
    model = load_model(folder, config_class, model_class)
    with new_folder(out) as partial:
        state = exported(family.table(config), model.state_dict()) | family.more_tensors()
        if family.weights_file.endswith(".safetensors"):
            save_file(state, partial / family.weights_file, {"format": "pt"})
        else:
            torch.save({family.weights_key: state}, partial / family.weights_file)
        for name, content in family.more_files(config, folder).items():
            write_atomic(partial / name, content)
        write_atomic(partial / family.settings_file, _as_text(family.settings_file, family.settings_of(config)))
    return family


def _as_text(name: str, settings: dict[str, Any]) -> str:
    if name.endswith(".yaml"):
        return yaml.safe_dump(settings, sort_keys=False)
    return json.dumps(settings, indent=1) + "\n"

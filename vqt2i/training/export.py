"""Any checkpoint of a run as a model folder, the same that the run itself exported after that step."""

from pathlib import Path
from typing import Any

import torch

from vqt2i.checkpoint import CARD, CONFIG, read_card, save_model
from vqt2i.clip import CLIP, CLIPConfig, Prior, PriorConfig
from vqt2i.config import load_config
from vqt2i.errors import CheckpointError
from vqt2i.files import require_free
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.runtime import say
from vqt2i.training.checkpoints import checkpoint_path, checkpoints_in, damage, step_of
from vqt2i.training.clip import CLIPModule
from vqt2i.training.deepspeed_checkpoint import whole_weights
from vqt2i.training.finetune import is_adapted, merged_weights
from vqt2i.training.gpt import GPTModule
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.metrics import METRICS, validation_at
from vqt2i.training.prior import PriorModule
from vqt2i.training.record import read_record
from vqt2i.training.vqgan import VQGANModule
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

STAGES = {
    "vqgan": (VQGANModule, ImageTokenizerConfig, ImageTokenizer),
    "gpt": (GPTModule, GPTConfig, GPT),
    "upscaler": (GPTModule, GPTConfig, GPT),
    "clip": (CLIPModule, CLIPConfig, CLIP),
    "prior": (PriorModule, PriorConfig, Prior),
}


def export_checkpoint(source: Path, step: int | None, out: Path) -> str:
    """Write the model in a checkpoint into the new folder `out` and return its fingerprint.

    Needs one process and no GPU, whatever trained the run: its `model/` says what the model is made of.

    Args:
        source: a run folder or a checkpoint in one. step: of which step; None is the newest checkpoint.

    Raises:
        CheckpointError: no run, no such checkpoint, one that is damaged or does not fit the run's model.
        UserError: `out` exists already.
    """
    require_free(out)
    checkpoint = find_checkpoint(source, step)
    run = checkpoint.parents[1]
    module_class, config_class, model_class = STAGES[read_record(run).kind]
    if not (run / "model" / CARD).is_file():
        raise CheckpointError(f"{run / 'model'}: not there yet, and it says what the model is made of; "
                              "go on with the run by --resume")  # fmt: skip
    config = load_config(config_class, run / "model" / CONFIG)
    problem = damage(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint}: damaged ({problem}); {_available(run)}")
    prefix = f"{module_class.exported}."
    if checkpoint.is_dir():
        state = whole_weights(checkpoint)
    else:
        state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if is_adapted(weights):
        lora = load_config(GPTRunConfig, run / "config.yaml").training.lora
        weights = merged_weights(weights, lora)
    with torch.device("meta"):
        model = model_class(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: not of the model in {run / 'model' / CONFIG} ({error})") from None
    return save_model(out, model, config, card_of(checkpoint))


def find_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint that is meant, and says which where that was left open.

    Raises:
        CheckpointError: no checkpoint there, or none of that step; names those that there are.
    """
    # a file, a folder of DeepSpeed's, or either without its ending
    named = source if source.suffix == ".ckpt" else source.with_name(f"{source.name}.ckpt")
    if named.name.startswith("step-") and named.exists():
        if step not in (None, step_of(named)):
            raise CheckpointError(f"{source}: a checkpoint, but not of step {step:,}; give the run folder with --step")
        return named
    found = checkpoints_in(source)
    if not found:
        raise CheckpointError(f"{source}: no run with a checkpoint, and no checkpoint; expected a run folder, or "
                              "RUN/checkpoints/step-....ckpt")  # fmt: skip
    if step is None:
        say(f"{source}: {_available(source)}; taking the newest")
        return found[-1]
    if (checkpoint := checkpoint_path(source, step)) not in found:
        raise CheckpointError(f"{source}: no checkpoint of step {step:,}; {_available(source)}")
    return checkpoint


def card_of(checkpoint: Path) -> dict[str, Any]:
    """What the run's own export after that step says, but for the seconds that it took."""
    run, step = checkpoint.parents[1], step_of(checkpoint)
    newest = read_card(run / "model")
    # starts are in the order of time, and a later one may have gone back: the last that began before the step
    start = [start for start in read_record(run).starts if start.step < step][-1]
    card = {key: value for key, value in newest.items() if key not in ("fingerprint", "seconds", "resumed_from")}
    metrics = {name: round(value, 6) for name, value in validation_at(run / METRICS, step).items()}
    card |= {"command": start.command, "steps": step, "metrics": metrics, "checkpoint": str(checkpoint)}
    earlier = [part for part in newest.get("resumed_from", []) if part["steps"] <= start.step]
    return card | ({"resumed_from": earlier} if earlier else {})


def _available(run: Path) -> str:
    return "there are those of steps " + ", ".join(f"{step_of(path):,}" for path in checkpoints_in(run))

"""Fine-tuning: what a run starts from, which parts stay as they are, low-rank adapters.

LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3): W x becomes W x + α/r · B A x, of which only A and B are trained;
B starts at zero, so training starts from W. `peft` puts the adapters into the model. A trained one can be added to W:
W + α/r · B A is a model like any other.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqt2i.checkpoint import CARD, CONFIG, WEIGHTS, load_model, read_card, require_same, save_model
from vqt2i.config import Config, load_config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import require_free
from vqt2i.gpt import GPT, GPTConfig

Part = Literal["embedding", "positions", "attention", "mlp", "norms", "head", "condition"]
Target = Literal["attention", "mlp"]
# names of the linear maps of a block
LINEARS: dict[Target, tuple[str, ...]] = {"attention": ("qkv", "out"), "mlp": ("gate_up", "up", "down")}
# by stage: what the cards of models call it, its part of a pipeline folder, and what it is
_BASES = {"gpt": (("gpt", "upscaler"), "gpt", "GPT"), "vqgan": (("vqgan",), "vq", "image tokenizer")}
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


class LoRAConfig(Config):
    """rank: r, of each adapter. alpha: α; what an adapter adds is scaled by alpha / rank. targets: of every block."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    targets: tuple[Target, ...] = Field(("attention", "mlp"), min_length=1)


class AdapterConfig(Config):
    """`adapter/config.yaml`. base: fingerprint of the model that the adapter is for."""

    base: str
    lora: LoRAConfig


class Adapter(nn.Module):
    """The matrices A and B alone, by the names that they have in the model."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return self.weights


def find_base(folder: Path, stage: Literal["gpt", "vqgan"] = "gpt") -> Path:
    """The model folder that is meant: itself, of a run, or of a pipeline folder.

    Raises:
        CheckpointError: there is none.
    """
    kinds, part, what = _BASES[stage]
    for candidate in (folder, folder / "model", folder / part):
        if (candidate / CARD).is_file() and read_card(candidate).get("kind") in kinds:
            return candidate
    raise CheckpointError(f"start_from {folder}: no {what} there; expected its model folder, a run of train_{stage}, "
                          "or a pipeline folder")  # fmt: skip


def load_base(folder: Path, config: GPTConfig, *, adapted: bool = False) -> GPT:
    """The GPT to start from, in training mode. One that draws from texts alone may become one for super-resolution, and
    the null condition and what a text sees of itself others: no weights depend on these, and what they are to say is
    trained from here.

    Args:
        adapted: whether adapters of it alone are to be trained.

    Raises:
        ConfigError: it is not what the settings describe; all differences are named.
    """
    gpt = load_model(folder, GPTConfig, GPT)
    own = gpt.config
    becomes_upscaler = config.sequence_layout.is_upscaling and own.sequence_layout.predicts_text
    if becomes_upscaler and adapted:
        raise ConfigError(f"training.lora: adapters belong to a GPT that reads what they do, and {folder} reads texts "
                          "alone; leave lora out")  # fmt: skip
    free = ("null_condition", "text_attention")
    layout = own.layout.model_copy(update={name: getattr(config.layout, name) for name in free})
    own = own.model_copy(update={"layout": layout} | ({"condition": config.condition} if becomes_upscaler else {}))
    require_described(folder, own, config)
    return (gpt if gpt.config == config else _rebuilt(gpt, config)).train()


@torch.no_grad()
def _rebuilt(gpt: GPT, config: GPTConfig) -> GPT:
    """The same weights in another GPT; further rows of its tables of positions and of ids are random, those that it has
    no place for are left out."""
    other = GPT(config)
    own = other.state_dict()
    for name, value in gpt.state_dict().items():
        n = min(len(own[name]), len(value))
        own[name][:n] = value[:n]
    return other


def require_described(folder: Path, found: Config, wanted: Config) -> None:
    """Check that a model to start from is what the settings describe.

    Raises:
        ConfigError: it is not; all differences are named.
    """
    there, here = _dotted(found.model_dump(mode="json")), _dotted(wanted.model_dump(mode="json"))
    differences = [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)
    ]  # fmt: skip
    if differences:
        raise ConfigError(f"training.start_from {folder}: another model than the settings describe: "
                          f"{'; '.join(differences)}. Take over its settings, and of a GPT its tokenizers "
                          "(text_tokenizer, --vq)")  # fmt: skip


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def part_of(name: str) -> Part:
    """The part that a parameter of a GPT belongs to."""
    first, *rest = name.split(".")
    parts: dict[str, Part] = {
        "embedding": "embedding", "position_embeddings": "positions", "head": "head", "reader": "condition",
    }  # fmt: skip
    if first in parts:
        return parts[first]
    return next((part for part in ("attention", "mlp") if part in rest), "norms")


def freeze(gpt: GPT, parts: tuple[Part, ...]) -> None:
    """Keep some parts as they are.

    Raises:
        ConfigError: the model has none of a part, or nothing is left to train.
    """
    names = {name: part_of(name) for name, _ in gpt.named_parameters()}
    for part in parts:
        if part not in names.values():
            raise ConfigError(f"training.frozen: this GPT has no part {part!r}; it has "
                              f"{', '.join(dict.fromkeys(names.values()))}")  # fmt: skip
    if set(names.values()) <= set(parts):
        raise ConfigError("training.frozen: nothing is left to train; leave out a part")
    for name, parameter in gpt.named_parameters():
        if names[name] in parts:
            parameter.requires_grad_(False)


def add_adapters(gpt: GPT, config: LoRAConfig) -> None:
    """Put adapters into the blocks, which change no output yet; they alone are trained.

    Raises:
        ConfigError: `peft` is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("training.lora: peft is not installed; pip install 'vqt2i[lora]', or leave it out")
    from peft import LoraConfig, inject_adapter_in_model

    linears = "|".join(f"{target}\\.({'|'.join(LINEARS[target])})" for target in config.targets)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=rf"transformer\.blocks\.\d+\.({linears})")
    inject_adapter_in_model(lora, gpt)


def is_adapted(weights: Mapping[str, Tensor]) -> bool:
    """Whether there are adapters among the weights of a GPT."""
    return any(name.endswith(_A) for name in weights)


def merged_weights(weights: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """The weights of a plain GPT that computes what the adapted one does."""
    merged = {}
    for name, value in weights.items():
        if name.endswith((_A, _B)):
            continue
        whole = name.replace(_BASE, ".")
        stem = whole.removesuffix(".weight")
        if whole != name and name.endswith(".weight"):
            delta = weights[stem + _B].float() @ weights[stem + _A].float()
            value = (value.float() + delta * (config.alpha / config.rank)).to(value.dtype)
        merged[whole] = value
    return merged


def plain_gpt(gpt_config: GPTConfig, weights: Mapping[str, Tensor]) -> GPT:
    """A GPT that has these weights, for saving: what is no weight has no values."""
    with torch.device("meta"):
        gpt = GPT(gpt_config)
    gpt.load_state_dict(weights, assign=True)
    return gpt


def save_adapter(folder: Path, weights: Mapping[str, Tensor], config: AdapterConfig, card: dict[str, Any]) -> str:
    """Write the adapters among a GPT's weights as a folder of their own; returns its fingerprint."""
    own = {name: value for name, value in weights.items() if name.endswith((_A, _B))}
    return save_model(folder, Adapter(own), config, card | {"kind": "adapter"})


def merge_adapter(folder: Path, base: Path, out: Path) -> str:
    """Write the model that `base` is with an adapter into the new folder `out`; returns its fingerprint.

    Raises:
        CheckpointError: no adapter, a damaged one, or one for another base. UserError: `out` exists already.
    """
    require_free(out)
    card = read_card(folder)
    if card.get("kind") != "adapter":
        raise CheckpointError(f"{folder}: a model of kind {card.get('kind')!r}; expected the adapter/ of a LoRA run")
    base = find_base(base)
    gpt = load_model(base, GPTConfig, GPT)
    config = load_config(AdapterConfig, folder / CONFIG)
    hint = "give the model that it started from"
    require_same("base", folder, found=gpt.fingerprint, expected=config.base, hint=hint)
    try:
        matrices = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged or not safetensors ({error}); copy it again") from None
    stems = {name.removesuffix(_A) for name in matrices if name.endswith(_A)}
    adapted = {
        name.removesuffix(".weight") + f"{_BASE}weight" if name.removesuffix(".weight") in stems else name: value
        for name, value in gpt.state_dict().items()
    }
    try:
        weights = merged_weights(adapted | matrices, config.lora)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: does not fit {base} ({error})") from None
    facts = {key: value for key, value in card.items() if key not in ("fingerprint", "kind", "base")}
    return save_model(out, plain_gpt(gpt.config, weights), gpt.config, facts | {"kind": "gpt"})

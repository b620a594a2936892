"""Which trained parts to use when none is named: the newest in the runs folder, else the shipped ones."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from vqt2i.checkpoint import CARD, CONFIG, read_card, save_model
from vqt2i.clip import CLIP
from vqt2i.clip.huggingface import CONFIG_JSON, HuggingFaceCLIP, fingerprint_of, load_scorer
from vqt2i.config import build_config, load_config, save_config
from vqt2i.errors import CheckpointError
from vqt2i.files import new_folder, write_atomic
from vqt2i.generation.parts import PARTS, PIPELINE, PipelineConfig, pipeline_folders
from vqt2i.generation.pipeline import TextToImage
from vqt2i.generation.reading import reads_embeddings
from vqt2i.runtime import say
from vqt2i.vq import AnyImageTokenizer, load_image_tokenizer

SHIPPED = Path(__file__).parents[1] / "pretrained"
DEFAULT_SHIPPED = "shapes"


def find_image_tokenizer(folder: Path | None, runs: Path) -> tuple[Path, AnyImageTokenizer]:
    """The image tokenizer of `folder`, else the newest in `runs` (no palette), else the shipped one; says which."""
    if folder is None:
        trained = trained_models(runs).get("vqgan", [])
        folder = trained[0] if trained else SHIPPED / DEFAULT_SHIPPED / "vq"
        say(f"image tokenizer: {folder}" + ("" if trained else " (shipped; none trained yet)"))
    return folder, load_image_tokenizer(folder)


def find_scorer(folder: Path | None, runs: Path) -> tuple[Path, CLIP | HuggingFaceCLIP]:
    """The scorer of `folder`, else the newest in `runs`, else the shipped one; says which."""
    if folder is None:
        trained = trained_models(runs).get("clip", [])
        folder = trained[0] if trained else SHIPPED / DEFAULT_SHIPPED / "clip"
        say(f"scorer: {folder}" + ("" if trained else " (shipped; none trained yet)"))
    return folder, load_scorer(folder)


def trained_models(runs: Path) -> dict[str, list[Path]]:
    """Model folders of the runs by kind ("vqgan", "palette", "gpt", "clip"), newest first."""
    found: dict[str, list[Path]] = {}
    cards = sorted(runs.glob(f"*/model/{CARD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for card in cards:
        try:
            kind = read_card(card.parent).get("kind", "unknown")
        except CheckpointError as error:
            say(f"left out: {error}")
            continue
        if (card.parent / CONFIG).is_file():
            found.setdefault(kind, []).append(card.parent)
    return found


def trained_parts(gpt_folder: Path, runs: Path) -> dict[str, Path | None]:
    """The parts that belong with a trained GPT: its tokenizers by fingerprint, the newest scorer for its text.

    The scorer of a GPT that reads embeddings is the one that made them.

    Raises:
        CheckpointError: no GPT, or a part that its card names is gone.
    """
    card = read_card(gpt_folder)
    kind = card.get("kind")
    if kind != "gpt":
        raise CheckpointError(f"{gpt_folder}: a model of kind {kind!r}; expected a pipeline folder or a GPT run")
    models = trained_models(runs)
    tokenizers = [*models.get("vqgan", []), *models.get("palette", [])]
    vq = _by_fingerprint("image tokenizer", tokenizers, card["image_tokenizer"], gpt_folder)
    text = Path(card["text_tokenizer"]["path"])
    if "scorer" in card:
        clip = _by_fingerprint("scorer", models.get("clip", []), card["scorer"], gpt_folder)
        return {"text": text, "vq": vq, "gpt": gpt_folder, "clip": clip}
    scorers = [
        clip for clip in models.get("clip", [])
        if _same_text(clip, card) and read_card(clip)["data"]["fingerprint"] == card["data"]["fingerprint"]
    ]  # fmt: skip
    return {"text": text, "vq": vq, "gpt": gpt_folder, "clip": scorers[0] if scorers else None}


def find_parts(model: str | None, runs: Path) -> tuple[dict[str, Path | None], PipelineConfig]:
    """The folders of a pipeline's parts and its defaults; says which.

    Args:
        model: a shipped pipeline's name, a pipeline folder, or a GPT run; None is the newest GPT trained in `runs`,
            else the shipped pipeline.

    Raises:
        CheckpointError: nothing of this name, or a part is gone.
    """
    if model is None:
        trained = trained_models(runs).get("gpt", [])
        if trained:
            return _trained_pipeline(trained[0], runs)
        folder = SHIPPED / DEFAULT_SHIPPED
        say(f"pipeline: {DEFAULT_SHIPPED} (shipped; none trained in {runs} yet)")
    elif (SHIPPED / model / PIPELINE).is_file() and not Path(model).exists():
        folder = SHIPPED / model
        say(f"pipeline: {model} (shipped)")
    else:
        folder = Path(model)
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob(f"*/{PIPELINE}"))) or "none"
            raise CheckpointError(f"{model}: no such folder, and no shipped pipeline of this name (shipped: {shipped})")
        if not (folder / PIPELINE).is_file():
            return _trained_pipeline(folder / "model" if (folder / "model").is_dir() else folder, runs)
        say(f"pipeline: {folder}")
    return pipeline_folders(folder), load_config(PipelineConfig, folder / PIPELINE)


def open_pipeline(model: str | None, runs: Path, device: str = "auto", **placement: Any) -> TextToImage:
    """Load what `find_parts` finds. placement: what `TextToImage.load` takes by name."""
    return TextToImage.from_parts(*find_parts(model, runs), device, **placement)


def _trained_pipeline(gpt_folder: Path, runs: Path) -> tuple[dict[str, Path | None], PipelineConfig]:
    parts = trained_parts(gpt_folder, runs)
    say("pipeline: " + ", ".join(f"{part} {parts[part] or 'none'}" for part in PARTS))
    return parts, _defaults(gpt_folder)


def write_pipeline(
    folders: dict[str, Path | None], config: PipelineConfig, out: Path, dtype: Literal["fp32", "bf16"]
) -> None:
    """Copy parts that belong together into a new pipeline folder.

    The image tokenizer stays as it is, whatever `dtype`, and so does a scorer whose embeddings the GPT reads: the GPT
    knows them by their fingerprints.

    Raises:
        CheckpointError: a part is missing or damaged, or does not belong. UserError: `out` exists already.
    """
    pipeline = TextToImage.from_parts(folders, config, "cpu")
    with new_folder(out) as partial:
        (partial / "text").mkdir()
        for name, content in pipeline.text.files.items():
            write_atomic(partial / "text" / name, content)
        known = ["vq", *(["clip"] if reads_embeddings(pipeline.gpt) else [])]
        for part in known:
            shutil.copytree(folders[part], partial / part)
        for part, module in (("gpt", pipeline.gpt), ("clip", pipeline.clip)):
            if module is not None and part not in known:
                card = {key: value for key, value in read_card(folders[part]).items() if key != "fingerprint"}
                weights = torch.bfloat16 if dtype == "bf16" else torch.float32
                save_model(partial / part, module, module.config, card, weights)
        save_config(config, partial / PIPELINE)


def _defaults(gpt_folder: Path) -> PipelineConfig:
    card = read_card(gpt_folder)
    values = {key: card[key] for key in ("sampling", "example_prompts") if key in card}
    return build_config(PipelineConfig, values, str(gpt_folder / CARD))


def _by_fingerprint(what: str, folders: list[Path], wanted: dict[str, str], gpt_folder: Path) -> Path:
    for folder in [Path(wanted["path"]), *folders]:
        try:
            foreign = (folder / CONFIG_JSON).is_file() and not (folder / CARD).is_file()
            found = fingerprint_of(folder) if foreign else read_card(folder)["fingerprint"]
            if found == wanted["fingerprint"]:
                return folder
        except (CheckpointError, KeyError):
            continue
    raise CheckpointError(f"{gpt_folder}: its {what} {wanted['fingerprint'][:8]} ({wanted['path']}) is gone; "
                          "keep the run that made it beside this one")  # fmt: skip


def _same_text(clip_folder: Path, gpt_card: dict) -> bool:
    return read_card(clip_folder)["text_tokenizer"]["fingerprint"] == gpt_card["text_tokenizer"]["fingerprint"]

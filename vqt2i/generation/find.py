"""Which trained parts to use when none is named: the newest in the runs folder, else the shipped ones."""

from pathlib import Path

from vqt2i.checkpoint import CARD, CONFIG, load_model, read_card
from vqt2i.config import build_config
from vqt2i.errors import CheckpointError
from vqt2i.generation.pipeline import PARTS, PIPELINE, PipelineConfig, TextToImage
from vqt2i.runtime import say
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

SHIPPED = Path(__file__).parents[1] / "pretrained"
DEFAULT_SHIPPED = "shapes"


def find_image_tokenizer(folder: Path | None, runs: Path) -> tuple[Path, ImageTokenizer]:
    """The image tokenizer of `folder`, else the newest in `runs`, else the shipped one; says which."""
    if folder is None:
        trained = trained_models(runs).get("vqgan", [])
        folder = trained[0] if trained else SHIPPED / DEFAULT_SHIPPED / "vq"
        say(f"image tokenizer: {folder}" + ("" if trained else " (shipped; none trained yet)"))
    return folder, load_model(folder, ImageTokenizerConfig, ImageTokenizer)


def trained_models(runs: Path) -> dict[str, list[Path]]:
    """Model folders of the runs by kind ("vqgan", "gpt", "clip"), newest first."""
    found: dict[str, list[Path]] = {}
    cards = sorted(runs.glob(f"*/model/{CARD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for card in cards:
        if (card.parent / CONFIG).is_file():
            found.setdefault(read_card(card.parent).get("kind", "unknown"), []).append(card.parent)
    return found


def trained_parts(gpt_folder: Path, runs: Path) -> dict[str, Path | None]:
    """The parts that belong with a trained GPT: its tokenizers by fingerprint, the newest scorer for its text.

    Raises:
        CheckpointError: an image tokenizer or text tokenizer that its card names is gone.
    """
    card = read_card(gpt_folder)
    models = trained_models(runs)
    vq = _by_fingerprint(models.get("vqgan", []), card["image_tokenizer"], gpt_folder)
    text = Path(card["text_tokenizer"]["path"])
    scorers = [
        clip for clip in models.get("clip", [])
        if _same_text(clip, card) and read_card(clip)["data"]["fingerprint"] == card["data"]["fingerprint"]
    ]  # fmt: skip
    return {"text": text, "vq": vq, "gpt": gpt_folder, "clip": scorers[0] if scorers else None}


def open_pipeline(model: str | None, runs: Path, device: str = "auto") -> TextToImage:
    """A pipeline by name of a shipped one or by folder (a pipeline's, or a GPT run's); None is the newest trained GPT.

    Says what is used.
    """
    if model is None:
        trained = trained_models(runs).get("gpt", [])
        if not trained:
            say(f"pipeline: {DEFAULT_SHIPPED} (shipped; none trained in {runs} yet)")
            return TextToImage.load(SHIPPED / DEFAULT_SHIPPED, device)
        folder = trained[0]
    elif (SHIPPED / model).is_dir() and not Path(model).exists():
        say(f"pipeline: {model} (shipped)")
        return TextToImage.load(SHIPPED / model, device)
    else:
        folder = Path(model)
        if not folder.is_dir():
            shipped = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else []
            raise CheckpointError(f"{model}: no such folder, and no shipped pipeline of this name "
                                  f"(shipped: {', '.join(shipped) or 'none'})")  # fmt: skip
        if (folder / PIPELINE).is_file():
            say(f"pipeline: {folder}")
            return TextToImage.load(folder, device)
        folder = folder / "model" if (folder / "model").is_dir() else folder
    parts = trained_parts(folder, runs)
    say("pipeline: " + ", ".join(f"{part} {parts[part] or 'none'}" for part in PARTS))
    return TextToImage.from_parts(parts, _defaults(folder), device)


def _defaults(gpt_folder: Path) -> PipelineConfig:
    card = read_card(gpt_folder)
    values = {key: card[key] for key in ("sampling", "example_prompts") if key in card}
    return build_config(PipelineConfig, values, str(gpt_folder / CARD))


def _by_fingerprint(folders: list[Path], wanted: dict[str, str], gpt_folder: Path) -> Path:
    for folder in [Path(wanted["path"]), *folders]:
        try:
            if read_card(folder)["fingerprint"] == wanted["fingerprint"]:
                return folder
        except (CheckpointError, KeyError):
            continue
    raise CheckpointError(f"{gpt_folder}: its image tokenizer {wanted['fingerprint'][:8]} ({wanted['path']}) is gone; "
                          "keep the run that made it beside this one")  # fmt: skip


def _same_text(clip_folder: Path, gpt_card: dict) -> bool:
    return read_card(clip_folder)["text_tokenizer"]["fingerprint"] == gpt_card["text_tokenizer"]["fingerprint"]

"""Which trained parts to use when none is named: the newest in the runs folder, else the shipped ones."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from vqt2i.checkpoint import CARD, CONFIG, README, hub_card, load_model, read_card, save_model
from vqt2i.clip import CLIP, CLIPConfig
from vqt2i.config import build_config, load_config, save_config
from vqt2i.errors import CheckpointError
from vqt2i.files import new_folder, write_atomic
from vqt2i.generation.parts import PIPELINE, PipelineConfig, pipeline_folders
from vqt2i.generation.pipeline import TextToImage
from vqt2i.generation.reading import reads_embeddings
from vqt2i.generation.upscale import require_upscaler
from vqt2i.runtime import say
from vqt2i.text import holds_tokenizer
from vqt2i.vq import AnyImageTokenizer, load_image_tokenizer

Kind = Literal["gpt", "upscaler"]  # that cards name; what draws from prompts, and what from smaller pictures
_KINDS: dict[Kind, str] = {"gpt": "a GPT run", "upscaler": "a run for super-resolution"}
SHIPPED = Path(__file__).parents[1] / "pretrained"
DRAWN_BY = "emoji"
"""The shipped pipeline that draws where none is named or trained."""
TRAINED_WITH = "shapes32"
"""The shipped pipeline whose parts a training takes where none is named or trained: they fit the embedded data set."""


def find_image_tokenizer(folder: Path | None, runs: Path) -> tuple[Path, AnyImageTokenizer]:
    """The image tokenizer of `folder`, else the newest in `runs` (no palette), else the shipped one; says which."""
    if folder is None:
        trained = trained_models(runs).get("vqgan", [])
        folder = trained[0] if trained else SHIPPED / TRAINED_WITH / "vq"
        say(f"image tokenizer: {folder}" + ("" if trained else " (shipped; none trained yet)"))
    return folder, load_image_tokenizer(folder)


def find_scorer(folder: Path | None, runs: Path) -> tuple[Path, CLIP]:
    """The scorer of `folder`, else the newest in `runs`, else the shipped one; says which."""
    if folder is None:
        trained = trained_models(runs).get("clip", [])
        folder = trained[0] if trained else SHIPPED / TRAINED_WITH / "clip"
        say(f"scorer: {folder}" + ("" if trained else " (shipped; none trained yet)"))
    return folder, load_model(folder, CLIPConfig, CLIP)


def trained_models(runs: Path) -> dict[str, list[Path]]:
    """Model folders of the runs by kind ("vqgan", "palette", "gpt", "upscaler", "clip"), newest first."""
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


def trained_parts(gpt_folder: Path, runs: Path, kinds: tuple[Kind, ...] = ("gpt",)) -> dict[str, Path | None]:
    """The parts that belong with a trained GPT: its tokenizers by fingerprint, the newest scorer for its text.

    The scorer of a GPT that reads embeddings is the one that made them.

    Raises:
        CheckpointError: no GPT of one of these kinds, or a part that its card names is gone.
    """
    card = read_card(gpt_folder)
    kind = card.get("kind")
    if kind not in kinds:
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise CheckpointError(f"{gpt_folder}: a model of kind {kind!r}; expected a pipeline folder or {expected}")
    models = trained_models(runs)
    tokenizers = [*models.get("vqgan", []), *models.get("palette", [])]
    vq = _by_fingerprint("image tokenizer", tokenizers, card["image_tokenizer"], gpt_folder)
    beside = next((Path(card[part]["path"]) for part in ("text_tokenizer", "text_encoder") if part in card), None)
    text = gpt_folder if holds_tokenizer(gpt_folder) else beside
    if "scorer" in card:
        clip = _by_fingerprint("scorer", models.get("clip", []), card["scorer"], gpt_folder)
        return {"text": text, "vq": vq, "gpt": gpt_folder, "clip": clip}
    scorers = [clip for clip in models.get("clip", []) if _same_training(read_card(clip), card)]
    return {"text": text, "vq": vq, "gpt": gpt_folder, "clip": scorers[0] if scorers else None}


def find_parts(
    model: str | None, runs: Path, kinds: tuple[Kind, ...] = ("gpt",), *,
    clip: Path | None = None, prior: Path | None = None,
) -> tuple[dict[str, Path | None], PipelineConfig]:  # fmt: skip
    """The folders of a pipeline's parts and its defaults; says which.

    Args:
        model: a shipped pipeline's name, a pipeline folder, or a GPT run; None is the newest GPT of the first of
            `kinds` trained in `runs`, else the shipped pipeline, which has a "gpt".
        kinds: what a run may have trained.
        clip, prior: a run or a model folder; None is the pipeline's own, if it has one.

    Raises:
        CheckpointError: nothing of this name, or a part is gone.
    """
    folders, config = _find_pipeline(model, runs, kinds)
    given = {name: _model_in(folder) for name, folder in (("clip", clip), ("prior", prior)) if folder}
    if given:
        say("given: " + ", ".join(f"{name} {folder}" for name, folder in given.items()))
    return folders | given, config


def _find_pipeline(
    model: str | None, runs: Path, kinds: tuple[Kind, ...]
) -> tuple[dict[str, Path | None], PipelineConfig]:
    if model is None:
        trained = trained_models(runs).get(kinds[0], [])
        if trained:
            return _trained_pipeline(trained[0], runs, kinds)
        if kinds[0] == "upscaler":
            raise CheckpointError(f"{runs}: no run for super-resolution in it, and none is shipped; train one "
                                  "(configs/gpt/superres_tiny.yaml), or name a folder")  # fmt: skip
        folder = SHIPPED / DRAWN_BY
        say(f"pipeline: {DRAWN_BY} (shipped; none trained in {runs} yet)")
    elif (SHIPPED / model / PIPELINE).is_file() and not Path(model).exists():
        folder = SHIPPED / model
        say(f"pipeline: {model} (shipped)")
    else:
        folder = Path(model)
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob(f"*/{PIPELINE}"))) or "none"
            raise CheckpointError(f"{model}: no such folder, and no shipped pipeline of this name (shipped: {shipped})")
        if not (folder / PIPELINE).is_file():
            return _trained_pipeline(_model_in(folder), runs, kinds)
        say(f"pipeline: {folder}")
    return pipeline_folders(folder), load_config(PipelineConfig, folder / PIPELINE)


def _model_in(folder: Path) -> Path:
    """The model folder of a run, or the folder itself."""
    return folder / "model" if (folder / "model").is_dir() else folder


def open_pipeline(
    model: str | None, runs: Path, device: str = "auto", kinds: tuple[Kind, ...] = ("gpt",), *,
    clip: Path | None = None, prior: Path | None = None, **placement: Any,
) -> TextToImage:  # fmt: skip
    """Load what `find_parts` finds. placement: what `TextToImage.load` takes by name."""
    return TextToImage.from_parts(*find_parts(model, runs, kinds, clip=clip, prior=prior), device, **placement)


def open_upscaler(model: str | None, runs: Path, device: str = "auto", **placement: Any) -> TextToImage:
    """As `open_pipeline`, for super-resolution: what has `TextToImage.upscale`.

    Raises:
        CheckpointError: nothing of this name, or a part is gone. PromptError: its GPT does not upscale.
    """
    pipeline = open_pipeline(model, runs, device, ("upscaler",), **placement)
    require_upscaler(pipeline.gpt)
    return pipeline


def _trained_pipeline(
    gpt_folder: Path, runs: Path, kinds: tuple[Kind, ...]
) -> tuple[dict[str, Path | None], PipelineConfig]:
    parts = trained_parts(gpt_folder, runs, kinds)
    say("pipeline: " + ", ".join(f"{part} {folder or 'none'}" for part, folder in parts.items()))
    return parts, _defaults(gpt_folder)


def write_pipeline(
    folders: dict[str, Path | None], config: PipelineConfig, out: Path, dtype: Literal["fp32", "bf16"]
) -> None:
    """Copy parts that belong together into a new pipeline folder.

    The image tokenizer stays as it is, whatever `dtype`, and so do a scorer whose embeddings the GPT reads, for the GPT
    knows both by their fingerprints, and a prior.

    Raises:
        CheckpointError: a part is missing or damaged, or does not belong. UserError: `out` exists already.
    """
    pipeline = TextToImage.from_parts(folders, config, "cpu")
    with new_folder(out) as partial:
        known = ["vq", *(["clip"] if reads_embeddings(pipeline.gpt) else []), *(["text"] if pipeline.encoder else []),
                 *(["prior"] if pipeline.prior else [])]  # fmt: skip
        if pipeline.text and not pipeline.encoder:
            (partial / "text").mkdir()
            for name, content in pipeline.text.files.items():
                write_atomic(partial / "text" / name, content)
        for part in known:
            shutil.copytree(folders[part], partial / part)
        for part, module in (("gpt", pipeline.gpt), ("clip", pipeline.clip)):
            if module is not None and part not in known:
                card = {key: value for key, value in read_card(folders[part]).items() if key != "fingerprint"}
                weights = torch.bfloat16 if dtype == "bf16" else torch.float32
                save_model(partial / part, module, module.config, card, weights)
        if pipeline.clip_text is not pipeline.text:
            for name, content in pipeline.clip_text.files.items():
                write_atomic(partial / "clip" / name, content)
        save_config(config, partial / PIPELINE)
        write_atomic(partial / README, _readme(out.name, pipeline, {p: f for p, f in folders.items() if f}))


def _readme(name: str, pipeline: TextToImage, folders: dict[str, Path]) -> str:
    cards = {part: read_card(folder) for part, folder in folders.items() if (folder / CARD).is_file()}
    licences = {card.get("licence") for card in cards.values()}
    told = ["Draw with it: `python tools/generate.py PROMPT --model` and this folder. Its parts by fingerprint:", ""]
    for part, fingerprint in pipeline.fingerprints.items():
        source, licence = (cards.get(part, {}).get(key) for key in ("source", "licence"))
        came = f", from {source['file']} of {source['repository']}" if source else ""
        told.append(f"- `{part}/` {fingerprint[:8]}{came}{f', licence {licence}' if licence else ''}")
    return hub_card(name, ["text-to-image"], licences.pop() if len(licences) == 1 else None, "\n".join(told))


def _defaults(gpt_folder: Path) -> PipelineConfig:
    card = read_card(gpt_folder)
    values = {key: card[key] for key in ("sampling", "example_prompts") if key in card}
    return build_config(PipelineConfig, values, str(gpt_folder / CARD))


def _by_fingerprint(what: str, folders: list[Path], wanted: dict[str, str], gpt_folder: Path) -> Path:
    for folder in [Path(wanted["path"]), *folders]:
        try:
            if read_card(folder)["fingerprint"] == wanted["fingerprint"]:
                return folder
        except (CheckpointError, KeyError):
            continue
    raise CheckpointError(f"{gpt_folder}: its {what} {wanted['fingerprint'][:8]} ({wanted['path']}) is gone; "
                          "keep the run that made it beside this one")  # fmt: skip


def _same_training(card: dict[str, Any], gpt_card: dict[str, Any]) -> bool:
    """Whether a scorer was trained on what a GPT was, texts and all; one that was imported was not."""
    names = ("text_tokenizer", "data")
    return all(name in card and name in gpt_card and card[name]["fingerprint"] == gpt_card[name]["fingerprint"]
               for name in names)  # fmt: skip

"""A pipeline folder: parts that belong together, and the defaults that they draw with."""

from pathlib import Path
from typing import NamedTuple

from vqt2i.checkpoint import load_model, require_same
from vqt2i.clip import CLIP, CLIPConfig, Prior, PriorConfig
from vqt2i.config import Config
from vqt2i.errors import CheckpointError
from vqt2i.generation.reading import READS, reads_embeddings
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, FeatureCondition, GPTConfig, LabelCondition
from vqt2i.text import TextTokenizer, load_own_tokenizer, load_tokenizer
from vqt2i.text.encoder import TextEncoder
from vqt2i.vq import AnyImageTokenizer, load_image_tokenizer

PARTS = ("text", "vq", "gpt", "clip", "prior")
OPTIONAL = ("text", "clip", "prior")
PIPELINE = "pipeline.yaml"


class PipelineConfig(Config):
    """`pipeline.yaml`: sampling defaults and prompts that show what the pipeline can do."""

    sampling: SamplingConfig = SamplingConfig()
    example_prompts: tuple[str, ...] = ()


class Parts(NamedTuple):
    """A pipeline's models. text: None where nothing reads texts. clip_text: the tokenizer that `clip` reads, often
    `text`. encoder: of the texts whose features a GPT reads.
    """

    text: TextTokenizer | None
    vq: AnyImageTokenizer
    gpt: GPT
    clip: CLIP | None
    clip_text: TextTokenizer | None = None
    prior: Prior | None = None
    encoder: TextEncoder | None = None


def pipeline_folders(folder: Path) -> dict[str, Path | None]:
    """The folder of each part of a pipeline folder; None for those that it need not have and does not.

    Raises:
        CheckpointError: `folder` is no pipeline folder.
    """
    if not (folder / PIPELINE).is_file():
        raise CheckpointError(f"{folder}: no {PIPELINE} in it; expected a pipeline folder with {', '.join(PARTS)}")
    return {part: folder / part if part not in OPTIONAL or (folder / part).is_dir() else None for part in PARTS}


def load_parts(folders: dict[str, Path | None]) -> Parts:
    """Load the parts from a folder each (None for what there is not) and check that they belong together.

    Raises:
        CheckpointError: a part is missing or damaged, or does not belong with the others.
    """
    vq = load_image_tokenizer(folders["vq"])
    gpt = load_model(folders["gpt"], GPTConfig, GPT)
    hint = "use the parts it was trained with"
    trained, encoder = gpt.config, None
    reads_texts = not isinstance(trained.condition, LabelCondition)
    if folders["text"] is None and reads_texts:
        raise CheckpointError(f"{folders['gpt'].with_name('text')}: no such folder; the GPT beside it reads texts, so "
                              "put its text tokenizer there")  # fmt: skip
    if isinstance(trained.condition, FeatureCondition):
        encoder = TextEncoder.load(folders["text"])
        require_same("text encoder", folders["gpt"], found=encoder.fingerprint, expected=trained.condition.encoder,
                     hint=hint)  # fmt: skip
    text = encoder.tokenizer if encoder else folders["text"] and load_tokenizer(folders["text"])
    if trained.text_tokenizer is not None:
        require_same(
            "text tokenizer", folders["gpt"], found=text.fingerprint, expected=trained.text_tokenizer, hint=hint
        )
    require_same(
        "image tokenizer", folders["gpt"], found=vq.ids_fingerprint, expected=trained.image_tokenizer, hint=hint
    )
    clip, clip_text = None, text
    if folders["clip"] is not None:
        clip, clip_text = load_scorer(folders["clip"], text, hint)
    if reads_embeddings(gpt):
        wanted = trained.condition.encoder
        if clip is None:
            raise CheckpointError(f"{folders['gpt']}: reads embeddings of the scorer {wanted[:8]}, found none; "
                                  "put that one beside it")  # fmt: skip
        require_same("scorer", folders["gpt"], found=clip.fingerprint, expected=wanted, hint=hint)
    prior = _load_prior(folders["prior"], gpt, clip) if folders.get("prior") else None
    return Parts(text, vq, gpt, clip, clip_text, prior, encoder)


def load_scorer(folder: Path, text: TextTokenizer | None, hint: str) -> tuple[CLIP, TextTokenizer]:
    """A scorer and its tokenizer: its own, where it has one, else the pipeline's."""
    clip, tokenizer = load_model(folder, CLIPConfig, CLIP), load_own_tokenizer(folder) or text
    found = tokenizer.fingerprint if tokenizer else "none"
    require_same("text tokenizer", folder, found=found, expected=clip.config.text_tokenizer, hint=hint)
    return clip, tokenizer


def _load_prior(folder: Path, gpt: GPT, clip: CLIP) -> Prior:
    if not reads_embeddings(gpt):
        read = READS[gpt.config.condition.kind]
        raise CheckpointError(f"{folder}: a prior makes embeddings, but the GPT reads {read}; leave the prior out")
    prior = load_model(folder, PriorConfig, Prior)
    require_same("scorer", folder, found=clip.fingerprint, expected=prior.config.scorer,
                 hint="train a prior for this scorer with tools/train_prior.py")  # fmt: skip
    return prior

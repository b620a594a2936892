"""A pipeline folder: four parts that belong together, and the defaults that they draw with."""

from pathlib import Path
from typing import NamedTuple

from vqt2i.checkpoint import load_model, require_same
from vqt2i.clip import CLIP
from vqt2i.clip.huggingface import load_scorer
from vqt2i.config import Config
from vqt2i.errors import CheckpointError
from vqt2i.generation.reading import reads_embeddings
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.text import TextTokenizer, load_tokenizer
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

PARTS = ("text", "vq", "gpt", "clip")
PIPELINE = "pipeline.yaml"


class PipelineConfig(Config):
    """`pipeline.yaml`: sampling defaults and prompts that show what the pipeline can do."""

    sampling: SamplingConfig = SamplingConfig()
    example_prompts: tuple[str, ...] = ()


class Parts(NamedTuple):
    """A pipeline's models. `clip` may be None."""

    text: TextTokenizer
    vq: ImageTokenizer
    gpt: GPT
    clip: CLIP | None


def pipeline_folders(folder: Path) -> dict[str, Path | None]:
    """The folder of each part of a pipeline folder; None for a scorer that it does not have.

    Raises:
        CheckpointError: `folder` is no pipeline folder.
    """
    if not (folder / PIPELINE).is_file():
        raise CheckpointError(f"{folder}: no {PIPELINE} in it; expected a pipeline folder with {', '.join(PARTS)}")
    return {part: folder / part if part != "clip" or (folder / part).is_dir() else None for part in PARTS}


def load_parts(folders: dict[str, Path | None]) -> Parts:
    """Load the parts from a folder each (None for no `clip`) and check that they belong together.

    Raises:
        CheckpointError: a part is missing or damaged, or does not belong with the others.
    """
    text = load_tokenizer(folders["text"])
    vq = load_model(folders["vq"], ImageTokenizerConfig, ImageTokenizer)
    gpt = load_model(folders["gpt"], GPTConfig, GPT)
    hint = "use the parts it was trained with"
    trained = gpt.config
    if trained.text_tokenizer is not None:
        require_same(
            "text tokenizer", folders["gpt"], found=text.fingerprint, expected=trained.text_tokenizer, hint=hint
        )
    require_same(
        "image tokenizer", folders["gpt"], found=vq.ids_fingerprint, expected=trained.image_tokenizer, hint=hint
    )
    clip = None
    if folders["clip"] is not None:
        clip = load_scorer(folders["clip"])
        require_same(
            "text tokenizer",
            folders["clip"],
            found=text.fingerprint,
            expected=clip.config.text_tokenizer,
            hint=hint,
        )
    if reads_embeddings(gpt):
        encoder = trained.condition.encoder
        if clip is None:
            raise CheckpointError(f"{folders['gpt']}: reads embeddings of the scorer {encoder[:8]}, found none; "
                                  "put that one beside it")  # fmt: skip
        require_same("scorer", folders["gpt"], found=clip.fingerprint, expected=encoder, hint=hint)
    return Parts(text, vq, gpt, clip)

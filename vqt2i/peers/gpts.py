"""What the importers of GPTs share.

B batch, I image ids
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.config import load_config
from vqt2i.errors import CheckpointError
from vqt2i.gpt import GPT, ConditionBatch, GPTConfig
from vqt2i.peers.family import Compared, Options, largest_difference, n_different
from vqt2i.peers.table import Changed
from vqt2i.text import TextTokenizer, load_tokenizer
from vqt2i.vq import ImageTokenizerConfig

TOLERANCE = 1e-4


def image_tokenizer_of(
    family: str, first: str, path: Path, options: Options, n_image_ids: int | None
) -> ImageTokenizerConfig:
    """The configuration of the image tokenizer that is given with a GPT.

    Args:
        first: the family of the image tokenizer.
        n_image_ids: how many it must have; None is any number.

    Raises:
        CheckpointError: none is given, something else, or one of another vocabulary.
    """
    if options.vq is None:
        raise CheckpointError(f"{family}: its ids mean nothing without their image tokenizer; import that one "
                              f"first ({first}) and give its folder by --vq")  # fmt: skip
    if (kind := read_card(options.vq).get("kind")) != "vqgan":
        raise CheckpointError(f"--vq {options.vq}: a model of kind {kind!r}, expected an image tokenizer")
    vq = load_config(ImageTokenizerConfig, options.vq / "config.yaml")
    if n_image_ids not in (None, vq.vocab_size):
        raise CheckpointError(f"{path}: has {n_image_ids:,} image ids, {options.vq} {vq.vocab_size:,}; give the image "
                              "tokenizer that it was trained with by --vq")  # fmt: skip
    return vq


def require_length(path: Path, length: int, options: Options, vq: ImageTokenizerConfig) -> None:
    """Raises CheckpointError where a GPT is for images of another number of ids than the image tokenizer's."""
    if length != vq.n_image_ids:
        raise CheckpointError(f"{path}: for images of {length:,} ids, those of {options.vq} have {vq.n_image_ids:,}; "
                              "import that one with another --image-size")  # fmt: skip


def text_tokenizer_of(path: Path, options: Options, n_ids: int | None = None) -> TextTokenizer:
    """The text tokenizer that is given with a GPT.

    Args:
        n_ids: how many ids the model knows; None is any number.

    Raises:
        CheckpointError: none is given, a damaged one, or one of more ids.
    """
    if options.text is None:
        raise CheckpointError(f"{path}: its text tokenizer is published beside it; give that file by --text")
    tokenizer = load_tokenizer(options.text)
    if n_ids is not None and tokenizer.n_ids > n_ids:
        raise CheckpointError(f"{options.text}: has {tokenizer.n_ids:,} ids, {path} knows {n_ids:,}; give the model's "
                              "own tokenizer by --text")  # fmt: skip
    return tokenizer


def behind_zero(name: str) -> Changed:
    """A table of positions behind a row of zeros, which is that of whatever has no place in it."""
    return Changed(name, lambda rows: F.pad(rows, (0, 0, 1, 0)), lambda rows: rows[1:])


def image_tokenizer_facts(config: GPTConfig, options: Options) -> dict[str, Any]:
    """What the card of a GPT says of its image tokenizer."""
    return {"image_tokenizer": {"path": str(options.vq), "fingerprint": config.image_tokenizer}}


@torch.inference_mode()
def image_logits(gpt: GPT, condition: ConditionBatch, image_BI: Tensor) -> Tensor:
    """Scores of each image id after those before it, (B, I, n_image_ids)."""
    sequences = gpt.reader(condition).then(gpt.layout.image_part(image_BI)).until(-1)
    return gpt.image_logits(gpt(sequences)[:, -image_BI.shape[1] :])  # the condition may be padded less than most


def compare_drawn(gpt: GPT, condition: ConditionBatch, io: Mapping[str, Tensor]) -> Iterator[Compared]:
    """Of ids `gen_codes` that were drawn greedily: the logits at each step, and whether each id is the likeliest."""
    logits = image_logits(gpt, condition, io["gen_codes"])
    yield Compared("gen_logits", largest_difference(logits, io["gen_logits"]), TOLERANCE)
    yield Compared("gen_codes", n_different(logits.argmax(-1), io["gen_codes"]), 0)

"""Train a SentencePiece unigram model (Kudo 2018) with byte fallback."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from pydantic import Field, PositiveInt

from vqt2i.config import Config
from vqt2i.errors import DataError
from vqt2i.files import write_atomic, write_json
from vqt2i.text.tokenizer import TextTokenizer


class TextTokenizerConfig(Config):
    """vocabulary_size counts the 256 bytes of the fallback; character_coverage leaves rarer characters to them."""

    vocabulary_size: PositiveInt = 4096
    character_coverage: float = Field(0.9995, gt=0.9, le=1)


def train_text_tokenizer(texts: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
    """Train on `texts` (captions, one at a time). Deterministic: one thread, no sampling.

    Raises:
        DataError: no text, or too little for the vocabulary asked for.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("no captions to train a text tokenizer on; expected at least a few hundred")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram",
            vocab_size=config.vocabulary_size, character_coverage=config.character_coverage,
            byte_fallback=True, normalization_rule_name="nmt_nfkc", split_digits=True,
            hard_vocab_limit=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise DataError(f"{len(lines)} captions do not fill a vocabulary of {config.vocabulary_size} "
                        f"({str(error).splitlines()[-1]}); ask for a smaller one") from None  # fmt: skip
    return TextTokenizer(model.getvalue(), "the model just trained")


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file. Raises DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def save_text_tokenizer(tokenizer: TextTokenizer, path: Path, facts: dict[str, Any]) -> None:
    """Write `NAME.model` and, beside it, its card `NAME.json`."""
    write_atomic(path, tokenizer.model)
    card = {"kind": "text", "fingerprint": tokenizer.fingerprint, "n_ids": tokenizer.n_ids, **facts}
    write_json(path.with_suffix(".json"), card)

"""Train a SentencePiece model with byte fallback."""

import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from pydantic import Field, PositiveInt
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from vqt2i.config import Config
from vqt2i.errors import DataError
from vqt2i.files import write_atomic, write_json
from vqt2i.text.tokenizer import TextTokenizer

_HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]")
_NORMALISATION = "nmt_nfkc_cf"  # NFKC and case folding
_MAX_PIECE = 16  # characters, as SentencePiece has it
_MAX_WORD = 100  # characters of a word that are searched for pieces; longer ones are no words


class TextTokenizerConfig(Config):
    """vocabulary_size counts the 256 bytes of the fallback; character_coverage leaves rarer characters to them.

    model_type: "unigram" (Kudo 2018) or "bpe" (Sennrich et al. 2016), of which BPE-dropout needs the latter.
    """

    model_type: Literal["unigram", "bpe"] = "unigram"
    vocabulary_size: PositiveInt = 4096
    character_coverage: float = Field(0.9995, gt=0.9, le=1)


def train_text_tokenizer(texts: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
    """Train on the different lines of `texts`. Deterministic: one thread, no sampling.

    A Han character is always a piece of its own. Chinese has no spaces, so the pieces would otherwise grow into whole
    phrases ("red circle"), and a phrase never seen would be spelt unlike its parts.

    Raises:
        DataError: no text, or too little for the vocabulary asked for.
    """
    lines = dict.fromkeys(line for text in texts for line in text.splitlines() if line.strip())
    if not lines:
        raise DataError("no captions to train a text tokenizer on; expected at least a few hundred")
    normaliser = sentencepiece.SentencePieceNormalizer(rule_name=_NORMALISATION)
    words = Counter(
        word for line in lines for word in _HAN.sub(r" \g<0> ", normaliser.Normalize(line)).replace("▁", " ").split()
    )
    model = io.BytesIO()
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as seeds:
            seeds.writelines(f"{piece}\t{score}\n" for piece, score in _candidates(words).items())
            seeds.flush()
            own = {"seed_sentencepieces_file": seeds.name} if config.model_type == "unigram" else {}
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=(f"{word}\t{count}" for word, count in words.items()), input_format="tsv",
                model_writer=model, model_type=config.model_type, **own,
                vocab_size=config.vocabulary_size, character_coverage=config.character_coverage,
                byte_fallback=True, normalization_rule_name=_NORMALISATION, split_digits=True,
                hard_vocab_limit=False, num_threads=1, minloglevel=2, max_sentence_length=100_000,
            )  # fmt: skip
    except RuntimeError as error:
        raise DataError(f"{len(lines)} captions do not fill a vocabulary of {config.vocabulary_size} "
                        f"({str(error).splitlines()[-1]}); ask for a smaller one") from None  # fmt: skip
    return TextTokenizer(_without_seed_path(model.getvalue()), "the model just trained")


def _without_seed_path(model: bytes) -> bytes:
    """The model without the name of the temporary file, which SentencePiece keeps: equal corpora give equal bytes."""
    proto = ModelProto.FromString(model)
    proto.trainer_spec.ClearField("seed_sentencepieces_file")
    return proto.SerializeToString(deterministic=True)


def _candidates(words: Counter[str]) -> Counter[str]:
    """Every substring that a piece could be, with SentencePiece's own score, frequency times length.

    SentencePiece finds them with a suffix array, which has no entry for a word that is always followed by a space
    ("small" in the corpus of the shapes); so it is given the list.
    """
    frequency: Counter[str] = Counter()
    for word, count in words.items():
        if _HAN.fullmatch(word):
            frequency.update({"▁": count, word: count})
            continue
        marked = "▁" + word[:_MAX_WORD]
        for start in range(len(marked)):
            for stop in range(start + 1, min(start + _MAX_PIECE, len(marked)) + 1):
                frequency[marked[start:stop]] += count
    return Counter({piece: n * len(piece) for piece, n in frequency.items() if n > 1 or len(piece) == 1})


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

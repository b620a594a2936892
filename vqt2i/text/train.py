"""Train a SentencePiece unigram model (Kudo 2018) with byte fallback."""

import io
from collections.abc import Iterable

import sentencepiece

from vqt2i.config import Config
from vqt2i.errors import DataError
from vqt2i.text.tokenizer import TextTokenizer


class TextTokenizerConfig(Config):
    """vocabulary_size counts the 256 bytes of the fallback; character_coverage leaves rarer characters to them."""

    vocabulary_size: int = 4096
    character_coverage: float = 0.9995


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

"""Captions to ids and back with SentencePiece, or with the tokenizer of a CLIP from `transformers`."""

from vqt2i.text.batch import TextBatch, pad_texts
from vqt2i.text.huggingface import holds_tokenizer, load_own_tokenizer, load_tokenizer
from vqt2i.text.tokenizer import TextTokenizer, clean_text

__all__ = [
    "TextBatch",
    "TextTokenizer",
    "clean_text",
    "holds_tokenizer",
    "load_own_tokenizer",
    "load_tokenizer",
    "pad_texts",
]

"""Captions to ids and back with SentencePiece."""

from vqt2i.text.batch import TextBatch, pad_texts
from vqt2i.text.tokenizer import TextTokenizer, clean_text

__all__ = ["TextBatch", "TextTokenizer", "clean_text", "pad_texts"]

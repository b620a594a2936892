"""Captions to ids and back with SentencePiece."""

from vqt2i.text.tokenizer import TextTokenizer

__all__ = ["TextTokenizer"]

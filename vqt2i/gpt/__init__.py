"""The joint text and image decoder."""

from vqt2i.gpt.loss import LossWeights, gpt_loss
from vqt2i.gpt.model import GPT, GPTConfig
from vqt2i.gpt.sequence import SequenceLayout, Sequences, TextBatch, pad_texts

__all__ = ["GPT", "GPTConfig", "LossWeights", "SequenceLayout", "Sequences", "TextBatch", "gpt_loss", "pad_texts"]

"""The joint text and image decoder."""

from vqt2i.gpt.loss import GPTLoss, LossWeights, caption_log_probability, gpt_loss, token_nll
from vqt2i.gpt.model import GPT, GPTConfig, Positions
from vqt2i.gpt.sequence import LayoutConfig, SequenceLayout, Sequences

__all__ = [
    "GPT",
    "GPTConfig",
    "GPTLoss",
    "LayoutConfig",
    "LossWeights",
    "Positions",
    "SequenceLayout",
    "Sequences",
    "caption_log_probability",
    "gpt_loss",
    "token_nll",
]

"""The joint decoder of a condition and an image."""

from vqt2i.gpt.condition import (
    Condition,
    ConditionBatch,
    ConditionConfig,
    FeatureCondition,
    LabelCondition,
    LinearProjection,
    LowResolution,
    LowResolutionBatch,
    LowResolutionCondition,
    MLPProjection,
    Projection,
    TextCondition,
    VectorBatch,
    VectorCondition,
    Vectors,
)
from vqt2i.gpt.loss import GPTLoss, LossWeights, caption_log_probability, gpt_loss
from vqt2i.gpt.model import GPT, GPTConfig, HeadConfig, Positions
from vqt2i.gpt.sequence import LayoutConfig, SequenceLayout, Sequences

__all__ = [
    "GPT",
    "Condition",
    "ConditionBatch",
    "ConditionConfig",
    "FeatureCondition",
    "GPTConfig",
    "GPTLoss",
    "HeadConfig",
    "LabelCondition",
    "LayoutConfig",
    "LinearProjection",
    "LossWeights",
    "LowResolution",
    "LowResolutionBatch",
    "LowResolutionCondition",
    "MLPProjection",
    "Positions",
    "Projection",
    "SequenceLayout",
    "Sequences",
    "TextCondition",
    "VectorBatch",
    "VectorCondition",
    "Vectors",
    "caption_log_probability",
    "gpt_loss",
]

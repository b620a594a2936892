"""Prompts to pictures: sampling, decoding with a cache, reranking."""

from vqt2i.generation.decode import decode_image_ids
from vqt2i.generation.edit import Box, Extend, KeepTop, Mask, Paste, Vary
from vqt2i.generation.pipeline import Mix, Preview, Sample, TextToImage
from vqt2i.generation.sampling import SamplingConfig

__all__ = [
    "Box",
    "Extend",
    "KeepTop",
    "Mask",
    "Mix",
    "Paste",
    "Preview",
    "Sample",
    "SamplingConfig",
    "TextToImage",
    "Vary",
    "decode_image_ids",
]

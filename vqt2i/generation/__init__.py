"""Prompts to pictures, and pictures to captions: sampling, decoding with a cache, reranking."""

from vqt2i.generation.captions import BeamConfig, DrawConfig, ImageCaption
from vqt2i.generation.decode import decode_image_ids
from vqt2i.generation.pipeline import Mix, Preview, Sample, TextToImage
from vqt2i.generation.prompts import Picture
from vqt2i.generation.sampling import SamplingConfig

__all__ = [
    "BeamConfig",
    "DrawConfig",
    "ImageCaption",
    "Mix",
    "Picture",
    "Preview",
    "Sample",
    "SamplingConfig",
    "TextToImage",
    "decode_image_ids",
]

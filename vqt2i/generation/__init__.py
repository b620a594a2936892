"""Prompts to pictures: sampling, decoding with a cache, reranking."""

from vqt2i.generation.decode import decode_image_ids
from vqt2i.generation.pipeline import Preview, Sample, TextToImage
from vqt2i.generation.prompts import Picture
from vqt2i.generation.sampling import SamplingConfig

__all__ = ["Picture", "Preview", "Sample", "SamplingConfig", "TextToImage", "decode_image_ids"]

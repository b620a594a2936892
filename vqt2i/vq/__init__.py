"""Image tokenizers: pictures to grids of ids and back."""

from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.load import AnyImageTokenizer, load_image_tokenizer
from vqt2i.vq.palette import PaletteConfig, PaletteTokenizer

__all__ = [
    "AnyImageTokenizer",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "PaletteConfig",
    "PaletteTokenizer",
    "load_image_tokenizer",
]

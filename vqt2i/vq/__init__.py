"""Image tokenizers: pictures to grids of ids and back."""

from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig

__all__ = ["ImageTokenizer", "ImageTokenizerConfig"]

"""vqt2i: autoregressive text-to-image, from captioned images to reranked pictures."""

__version__ = "0.1.0"

"""Image tokenizers from their model folders, whatever kind they are of."""

from pathlib import Path

from vqt2i.checkpoint import CONFIG, load_model
from vqt2i.config import read_yaml_mapping
from vqt2i.errors import ConfigError
from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.palette import PaletteConfig, PaletteTokenizer

AnyImageTokenizer = ImageTokenizer | PaletteTokenizer


def load_image_tokenizer(folder: Path) -> AnyImageTokenizer:
    """The image tokenizer of a model folder, in evaluation mode.

    Raises:
        CheckpointError: as `load_model`.
    """
    try:
        kind = read_yaml_mapping(folder / CONFIG).get("kind")
    except ConfigError:
        kind = None  # `load_model` tells what is wrong
    if kind == "palette":
        return load_model(folder, PaletteConfig, PaletteTokenizer)
    return load_model(folder, ImageTokenizerConfig, ImageTokenizer)

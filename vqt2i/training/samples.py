"""Which images and captions a run trains and validates on."""

from typing import NamedTuple

from vqt2i.data.shards import DataSet
from vqt2i.data.stream import Stream
from vqt2i.text import TextTokenizer
from vqt2i.training.batches import ImageSamples
from vqt2i.training.run import DataConfig


class RunSamples(NamedTuple):
    train: ImageSamples
    validation: ImageSamples


def image_samples(
    config: DataConfig, dataset: DataSet, size_px: int, tokenizer: TextTokenizer | None, seed: int
) -> RunSamples:
    """The images of a run; `dataset` is the one in `config.path`.

    Raises:
        DataError: a split that the data set does not have, or a pattern that gives no address.
    """
    train = Stream(config.stream, seed) if config.stream else dataset.split(config.train_split)
    splits = (train, dataset.split(config.validation_split))
    return RunSamples(*(ImageSamples(split, size_px, tokenizer, seed, config.variants) for split in splits))

"""Which images and captions a run trains and validates on."""

from typing import NamedTuple

from vqt2i.clip import CLIP
from vqt2i.data.shards import DataSet, Split
from vqt2i.data.stream import Stream
from vqt2i.text import TextTokenizer
from vqt2i.training.batches import ImageSamples, MixedSamples, SampleSource, TokenSamples
from vqt2i.training.encode import ensure_store
from vqt2i.training.run import DataConfig, open_also
from vqt2i.vq import ImageTokenizer


class RunSamples(NamedTuple):
    train: SampleSource
    validation: SampleSource


def image_samples(
    config: DataConfig, dataset: DataSet, size_px: int, tokenizer: TextTokenizer | None, seed: int,
    bpe_dropout: float = 0.0,
) -> RunSamples:  # fmt: skip
    """The images of a run; `dataset` is the one in `config.path`.

    Raises:
        DataError: a split that a data set does not have, or a pattern that gives no address.
    """

    def samples(split: Split | Stream) -> ImageSamples:
        return ImageSamples(split, size_px, tokenizer, seed, config.variants, bpe_dropout)

    train = samples(Stream(config.stream, seed) if config.stream else dataset.split(config.train_split))
    if also := open_also(config):
        train = MixedSamples(train, samples(also.split(config.also.train_split)), config.also.share)
    return RunSamples(train, samples(dataset.split(config.validation_split)))


def token_samples(
    config: DataConfig, dataset: DataSet, vq: ImageTokenizer, tokenizer: TextTokenizer, scorer: CLIP | None, seed: int,
    bpe_dropout: float, n_workers: int,
) -> RunSamples:  # fmt: skip
    """The same from the token stores beside the data sets; what they lack is encoded first.

    Raises:
        DataError: a split that a data set does not have, or a store that is not of this data set.
    """

    def samples(of: DataSet, *splits: str) -> list[TokenSamples]:
        store = ensure_store(of, vq, tokenizer, splits, scorer=scorer, variants=config.variants, n_workers=n_workers)
        return [TokenSamples(store.split(split), seed, tokenizer, bpe_dropout) for split in splits]

    train, validation = samples(dataset, config.train_split, config.validation_split)
    if also := open_also(config):
        train = MixedSamples(train, *samples(also, config.also.train_split), config.also.share)
    return RunSamples(train, validation)

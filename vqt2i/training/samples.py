"""Which images and captions a run trains and validates on."""

from typing import Any, NamedTuple

from vqt2i.data.shards import DataSet, Split
from vqt2i.data.stream import Stream
from vqt2i.errors import DataError
from vqt2i.text import TextTokenizer
from vqt2i.training.batches import ImageSamples, MixedSamples, SampleSource, TokenSamples
from vqt2i.training.encode import ensure_store
from vqt2i.training.run import DataConfig, open_also
from vqt2i.vq import AnyImageTokenizer


class RunSamples(NamedTuple):
    train: SampleSource
    validation: SampleSource


def image_samples(
    config: DataConfig, dataset: DataSet, size_px: int, tokenizer: TextTokenizer | None, seed: int, *,
    labels: tuple[str, ...] = (), **options: Any,
) -> RunSamples:  # fmt: skip
    """The images of a run; `dataset` is the one in `config.path`.

    Args:
        labels, options: of `ImageSamples`.

    Raises:
        DataError: a split that a data set does not have, other classes in the second one, or a pattern that gives no
            address.
    """

    def samples(split: Split | Stream) -> ImageSamples:
        return ImageSamples(split, size_px, tokenizer, seed, config.variants, labels=labels, **options)

    train = samples(Stream(config.stream, seed) if config.stream else dataset.split(config.train_split))
    if also := open_also(config):
        _require_classes(also, labels)
        train = MixedSamples(train, samples(also.split(config.also.train_split)), config.also.share)
    return RunSamples(train, samples(dataset.split(config.validation_split)))


def token_samples(
    config: DataConfig, dataset: DataSet, vq: AnyImageTokenizer, tokenizer: TextTokenizer, seed: int, *,
    bpe_dropout: float, labels: tuple[str, ...], **options: Any,
) -> RunSamples:  # fmt: skip
    """The same from the token stores beside the data sets; what they lack is encoded first.

    Args:
        labels: names of the classes, where they are asked for. options: of `ensure_store`.

    Raises:
        DataError: a split that a data set does not have, other classes in the second one, or a store that is not of
            this data set.
    """

    def samples(of: DataSet, *splits: str) -> list[TokenSamples]:
        store = ensure_store(of, vq, tokenizer, splits, variants=config.variants, **options)
        return [TokenSamples(store.split(split), seed, tokenizer, bpe_dropout) for split in splits]

    also = open_also(config)
    if also:
        _require_classes(also, labels)
    train, validation = samples(dataset, config.train_split, config.validation_split)
    if also:
        train = MixedSamples(train, *samples(also, config.also.train_split), config.also.share)
    return RunSamples(train, validation)


def _require_classes(also: DataSet, labels: tuple[str, ...]) -> None:
    """Check that the second data set numbers its classes as the first one does, where they are asked for."""
    if labels and also.labels != labels:
        raise DataError(f"{also.folder}: data.also has the classes {', '.join(also.labels) or 'none'}; expected those "
                        f"of data.path: {', '.join(labels)}")  # fmt: skip

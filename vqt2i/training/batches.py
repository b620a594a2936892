"""From a data set or a token store to the batches of each stage.

B batch, S longest text
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vqt2i.data.images import Variants, fit_variant, n_variants, require_side, to_tensor
from vqt2i.data.pairs import Pair
from vqt2i.data.sampling import LaneSampler, MixedSampler, StepSampler, Visits, draw
from vqt2i.data.shards import Split
from vqt2i.data.store import TokenSplit
from vqt2i.data.stream import Stream
from vqt2i.errors import ConfigError, DataError, UserError
from vqt2i.text import TextBatch, TextTokenizer, pad_texts


class Batch(NamedTuple):
    """Samples together: images, float (B, 3, H, W) in [-1, 1], or their codes, long (B, H, W); one caption of each.

    `text` is None where texts were not asked for; `chance_B` in [0, 1) draws the dropped conditions. `embedding_BE` is
    the image's by a scorer, where the store has it. For super-resolution `low_ids` are the codes of the image at half
    its size, long (B, H / 2, W / 2), where the store has them, and `place_B2` in [0, 1) draws the window's place: row,
    column. `label_B`, long, are the numbers of the classes, where those are known.
    """

    image: Tensor | None
    image_ids: Tensor | None
    text: TextBatch | None
    chance_B: Tensor
    embedding_BE: Tensor | None = None
    low_ids: Tensor | None = None
    place_B2: Tensor | None = None
    label_B: Tensor | None = None


class SampleSource(Protocol):
    """What batches are made of.

    batch: `text_length` ids of each caption, or no texts for None; `augment` draws one of the image's variants, else
        it is the first, the plain one.
    """

    def __len__(self) -> int: ...
    def batch(self, visits: Visits, text_length: int | None, *, augment: bool) -> Batch: ...


@dataclass(frozen=True)
class ImageSamples:
    """Samples from images: pixels fitted to `size_px`, one caption of all, whatever their language.

    A stream is for training only: it has no length. bpe_dropout: of merges of a caption, drawn anew at each visit where
    batches are augmented. windowed: for super-resolution: smaller pictures are refused, and places of windows drawn.
    labels: names of the classes, where they are asked for; each sample must be of one.
    """

    split: Split | Stream
    size_px: int
    tokenizer: TextTokenizer | None
    seed: int
    variants: Variants = "centre"
    bpe_dropout: float = 0.0
    windowed: bool = False
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, visits: Visits, text_length: int | None, *, augment: bool) -> Batch:
        caption_draw_B = draw("caption", self.seed, visits)
        variant_B = _variants(n_variants(self.variants) if augment else 1, self.seed, visits)
        images, texts, labels = [], [], []
        for index, u, variant in zip(visits.index_B.tolist(), caption_draw_B.tolist(), variant_B.tolist(), strict=True):
            pair = self.split[index]
            if self.windowed:
                require_side(pair.image_HW3, self.size_px, pair.key)
            images.append(fit_variant(pair.image_HW3, self.size_px, self.variants, variant))
            captions = [c for captions in pair.captions.values() for c in captions] if self.tokenizer else []
            texts.append(captions[int(u * len(captions))] if captions else "")
            labels += [self._number(pair)] if self.labels else []
        text = None
        if text_length is not None:
            dropout = self.bpe_dropout if augment else 0.0
            text = pad_texts(_encoded(self.tokenizer, texts, dropout, self.seed, visits), text_length)
        place_B2 = _places(self.seed, visits) if self.windowed else None
        label_B = torch.tensor(labels) if labels else None
        chance_B = _chances(self.seed, visits)
        return Batch(to_tensor(np.stack(images)), None, text, chance_B, place_B2=place_B2, label_B=label_B)

    def _number(self, pair: Pair) -> int:
        if pair.label not in self.labels:  # of a stream; data sets have been checked
            known = ", ".join(self.labels[:8]) + (", ..." if self.labels[8:] else "")
            raise DataError(f"sample {pair.key}: its class is {pair.label!r}; expected one of the data set that is "
                            f"validated on: {known}")  # fmt: skip
        return self.labels.index(pair.label)


class TokenSamples:
    """Samples from a token store: the codes and captions that `ImageSamples` of the same seed gives.

    For BPE-dropout captions are read from their ids and split anew, by the tokenizer that made them.
    """

    def __init__(
        self, split: TokenSplit, seed: int, tokenizer: TextTokenizer | None = None, bpe_dropout: float = 0.0
    ) -> None:
        self.split, self.seed, self.tokenizer, self.bpe_dropout = split, seed, tokenizer, bpe_dropout

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, visits: Visits, text_length: int | None, *, augment: bool) -> Batch:
        variant_B = _variants(self.split.n_variants if augment else 1, self.seed, visits)
        image_ids = torch.from_numpy(self.split.image_ids(visits.index_B, variant_B))
        text = None
        caption_draw_B = draw("caption", self.seed, visits)
        if text_length is not None and self.bpe_dropout and augment:
            texts = [self.tokenizer.decode(ids) for ids in self.split.whole_texts(visits.index_B, caption_draw_B)]
            text = pad_texts(_encoded(self.tokenizer, texts, self.bpe_dropout, self.seed, visits), text_length)
        elif text_length is not None:
            text = TextBatch(*map(torch.from_numpy, self.split.texts(visits.index_B, caption_draw_B, text_length)))
        embeddings = self.split.embeddings(visits.index_B, variant_B)
        embedding_BE = None if embeddings is None else torch.from_numpy(embeddings)
        labels = self.split.labels(visits.index_B)
        label_B = None if labels is None else torch.from_numpy(labels)
        batch = Batch(None, image_ids, text, _chances(self.seed, visits), embedding_BE, label_B=label_B)
        low_ids = self.split.low_ids(visits.index_B, variant_B)
        if low_ids is None:
            return batch
        return batch._replace(low_ids=torch.from_numpy(low_ids), place_B2=_places(self.seed, visits))


@dataclass(frozen=True)
class MixedSamples:
    """The samples of two sources, for training: those of `second` have indices from len(first) on.

    share: of each batch, that comes from the second.
    """

    first: SampleSource
    second: SampleSource
    share: float

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def n_second(self, batch_size: int) -> int:
        """How many samples of a batch come from the second source.

        Raises:
            ConfigError: none do, or all.
        """
        count = round(self.share * batch_size)
        if not 0 < count < batch_size:
            raise ConfigError(f"data.also.share {self.share:g}: that is {count} of {batch_size} samples read at once; "
                              "expected at least one of either data set, so change it or the batch size")  # fmt: skip
        return count

    def batch(self, visits: Visits, text_length: int | None, *, augment: bool) -> Batch:
        in_second_B = visits.index_B >= len(self.first)
        batches, places = [], []
        for source, offset, here_B in ((self.first, 0, ~in_second_B), (self.second, len(self.first), in_second_B)):
            if here_B.any():
                own = Visits(visits.index_B[here_B] - offset, visits.epoch_B[here_B])
                batches.append(source.batch(own, text_length, augment=augment))
                places.append(np.flatnonzero(here_B))
        order_B = torch.from_numpy(np.argsort(np.concatenate(places)))
        return Batch(*(_in_order(values, order_B) for values in zip(*batches, strict=True)))


def _in_order(values: tuple[Any, ...], order_B: Tensor) -> Any:
    """One field of several batches as that of one, its rows in this order."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], TextBatch):
        return TextBatch(*(_in_order(parts, order_B) for parts in zip(*values, strict=True)))
    return torch.cat(values)[order_B]


def _encoded(tokenizer: TextTokenizer, texts: list[str], dropout: float, seed: int, visits: Visits) -> list[list[int]]:
    if not dropout:
        return [tokenizer.encode(text) if text else [] for text in texts]
    seeds = (draw("merges", seed, visits) * 2**24).astype(np.int64).tolist()
    return [tokenizer.sample(text, dropout, s) for text, s in zip(texts, seeds, strict=True)]


def _variants(n: int, seed: int, visits: Visits) -> np.ndarray:
    return (draw("variant", seed, visits) * n).astype(np.int64)


def _chances(seed: int, visits: Visits) -> Tensor:
    return torch.from_numpy(draw("chance", seed, visits))


def _places(seed: int, visits: Visits) -> Tensor:
    rows_and_columns = [draw(f"window {axis}", seed, visits) for axis in ("row", "column")]
    return torch.from_numpy(np.stack(rows_and_columns, axis=1))


class BatchLoader(DataLoader):
    """`read(key)` for each of `keys`, in order, in `n_workers` other processes (0: in this one).

    Key i is read by worker i modulo `n_workers`.
    """

    def __init__(self, read: Callable[[Any], Any], keys: Iterable[Any], n_workers: int = 0) -> None:
        super().__init__(
            _Reader(read),
            batch_sampler=keys,
            collate_fn=_as_it_is,
            num_workers=n_workers,
            pin_memory=torch.cuda.is_available(),
            # or the workers' seeds would be taken from the global stream, and reading would change what training draws
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Reader:
    """The data set that torch's loader sees: it asks for a whole batch by `__getitems__`.

    A `UserError` goes to the main process as a value: torch would put the worker's traceback into its message.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitems__(self, key: Any) -> Any:
        try:
            return self.read(key)
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def training_loader(
    source: SampleSource, *, batch_size: int, n_steps: int, first_step: int, seed: int, text_length: int | None,
    n_workers: int, rank: int, n_ranks: int,
) -> BatchLoader:  # fmt: skip
    """Batches for the steps from `first_step` on; this rank's share of each.

    The same seed and step give the same global batch, whatever was read before; on any number of ranks and workers, but
    for streams only on the same number.
    """
    place = {"first_step": first_step, "rank": rank, "n_ranks": n_ranks}
    if isinstance(source, ImageSamples) and isinstance(source.split, Stream):
        block_size = source.split.config.block_size
        sampler = LaneSampler(block_size, batch_size, n_steps, **place, n_workers=n_workers)
        source = replace(source, split=source.split.in_lanes(sampler.n_lanes))
    elif isinstance(source, MixedSamples):
        sizes = len(source.first), len(source.second)
        sampler = MixedSampler(sizes, batch_size, source.n_second(batch_size), n_steps, seed, **place)
    else:
        sampler = StepSampler(len(source), batch_size, n_steps, seed, **place)
    return BatchLoader(partial(source.batch, text_length=text_length, augment=True), sampler, n_workers)


def validation_loader(
    source: SampleSource, *, batch_size: int, n_samples: int, text_length: int | None, rank: int, n_ranks: int
) -> BatchLoader:
    """The first `n_samples` of a split in order (fewer if it is shorter), dealt out to the ranks, always the same.

    Every rank gets as many, for ranks that gather from each other wait for each other: a remainder is left out.
    """
    n_per_rank = max(min(n_samples, len(source)) // n_ranks, 1)
    index = np.arange(rank, n_per_rank * n_ranks, n_ranks) % len(source)
    batches = [index[i : i + batch_size] for i in range(0, len(index), batch_size)]
    visits = [Visits(index_B, np.zeros_like(index_B)) for index_B in batches]
    return BatchLoader(partial(source.batch, text_length=text_length, augment=False), visits)

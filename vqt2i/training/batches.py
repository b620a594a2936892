"""From a data set or a token store to the batches of each stage.

B batch, S longest text
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqt2i.data.images import fit_square, to_tensor
from vqt2i.data.sampling import StepSampler, Visit
from vqt2i.data.shards import Split
from vqt2i.data.store import TokenSplit
from vqt2i.runtime import stream_seed
from vqt2i.text import TextBatch, TextTokenizer, pad_texts


class Sample(NamedTuple):
    """An image (float (3, H, W) in [-1, 1]) or its codes (long (H, W)); the ids of one caption; a number in [0, 1)."""

    image: Tensor | None
    image_ids: Tensor | None
    text_ids: list[int]
    chance: float


class Batch(NamedTuple):
    """Samples together. `text` is None where texts were not asked for; `chance_B` draws the dropped conditions."""

    image: Tensor | None
    image_ids: Tensor | None
    text: TextBatch | None
    chance_B: Tensor


class SampleSource(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, visit: Visit) -> Sample: ...


class ImageSamples(Dataset):
    """Samples from images: pixels fitted to `size_px`, one caption of all, whatever their language."""

    def __init__(self, split: Split, size_px: int, tokenizer: TextTokenizer | None, seed: int) -> None:
        self.split, self.size_px, self.tokenizer, self.seed = split, size_px, tokenizer, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, visit: Visit) -> Sample:
        pair = self.split[visit.index]
        rng = visit_rng(self.seed, visit)
        texts = [text for captions in pair.captions.values() for text in captions] if self.tokenizer else []
        # as in TokenSamples: the caption is the first thing drawn, so that both give the same ids
        ids = self.tokenizer.encode(texts[rng.integers(len(texts))]) if texts else []
        return Sample(to_tensor(fit_square(pair.image_HW3, self.size_px)), None, ids, rng.random())


class TokenSamples(Dataset):
    """Samples from a token store."""

    def __init__(self, split: TokenSplit, seed: int) -> None:
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, visit: Visit) -> Sample:
        rng = visit_rng(self.seed, visit)
        texts = self.split.texts(visit.index)
        ids = texts[rng.integers(len(texts))] if texts else []
        return Sample(None, torch.from_numpy(self.split.image_ids(visit.index)), ids, rng.random())


def visit_rng(seed: int, visit: Visit) -> np.random.Generator:
    """The random stream of one look at one sample: the same on every rank and in every worker."""
    return np.random.default_rng(stream_seed("visit", seed, visit.index, visit.epoch))


class Collate:
    """Stacks samples; texts are truncated to `text_length` ids, or left out for None.

    A class and no closure: data loader workers pickle it.
    """

    def __init__(self, text_length: int | None) -> None:
        self.text_length = text_length

    def __call__(self, samples: list[Sample]) -> Batch:
        def stack(values: list[Tensor | None]) -> Tensor | None:
            return None if values[0] is None else torch.stack(values)

        images, image_ids, texts, chances = zip(*samples, strict=True)
        text = None if self.text_length is None else pad_texts(list(texts), self.text_length)
        return Batch(stack(images), stack(image_ids), text, torch.tensor(chances))


def training_loader(
    source: SampleSource, *, batch_size: int, n_steps: int, first_step: int, seed: int, text_length: int | None,
    n_workers: int, rank: int, n_ranks: int,
) -> DataLoader:  # fmt: skip
    """Batches for the steps from `first_step` on; this rank's share of each."""
    sampler = StepSampler(
        len(source), batch_size, n_steps, seed, first_step=first_step, rank=rank, n_ranks=n_ranks
    )  # fmt: skip
    return DataLoader(source, batch_sampler=sampler, collate_fn=Collate(text_length), num_workers=n_workers)


def validation_loader(
    source: SampleSource, *, batch_size: int, n_samples: int, text_length: int | None, rank: int, n_ranks: int
) -> DataLoader:
    """The first `n_samples` of a split in order (fewer if it is shorter), dealt out to the ranks, always the same.

    Every rank gets as many, for ranks that gather from each other wait for each other: a remainder is left out.
    """
    n_per_rank = max(min(n_samples, len(source)) // n_ranks, 1)
    visits = [Visit(index % len(source), 0) for index in range(rank, n_per_rank * n_ranks, n_ranks)]
    batches = [visits[i : i + batch_size] for i in range(0, len(visits), batch_size)]
    return DataLoader(source, batch_sampler=batches, collate_fn=Collate(text_length))

"""How fast training gets its data."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqt2i.data.shards import ShardSpec, SplitSpec
from vqt2i.data.store import SPEC_NAME, StoreSpec, TokenPart, TokenStore, write_split
from vqt2i.files import write_json
from vqt2i.training.batches import TokenSamples, training_loader

N_MEASUREMENTS = 10
N_SAMPLES, N_CAPTION_IDS, GRID = 200_000, 20, 16  # 102 MB of image ids


class Rate(NamedTuple):
    """Of `n` measurements, in units a second."""

    median: float
    lowest: float
    highest: float
    n: int


def measure_store(
    folder: Path | None, split: str, *, batch_size: int, text_length: int, n_workers: int, seconds: float
) -> Rate:
    """Sequences a second through the loader that the trainer uses; None measures a store of random ids.

    Raises:
        DataError: no such store or split.
    """
    with tempfile.TemporaryDirectory() as temporary:
        store = random_store(Path(temporary), split, N_SAMPLES) if folder is None else TokenStore.open(folder)
        source = TokenSamples(store.split(split), seed=0)
        batches = iter(training_loader(
            source, batch_size=batch_size, n_steps=2**62 // batch_size, first_step=0, seed=0, text_length=text_length,
            n_workers=n_workers, rank=0, n_ranks=1,
        ))  # fmt: skip
        for _ in itertools.islice(batches, 20):  # workers start, files are mapped
            pass
        rates = sorted(_rate(batches, batch_size, seconds / N_MEASUREMENTS) for _ in range(N_MEASUREMENTS))
        del batches  # its workers end before their files go
    return Rate(statistics.median(rates), rates[0], rates[-1], len(rates))


def _rate(batches: Iterator, batch_size: int, seconds: float) -> float:
    start = time.perf_counter()
    for n_batches in itertools.count(1):
        next(batches)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return n_batches * batch_size / elapsed


def random_store(folder: Path, split: str, n_samples: int) -> TokenStore:
    """A store of `n_samples` grids of 16 x 16 ids below 16,384, each with one caption of 20 ids."""
    rng = np.random.default_rng(0)
    shape = (1, GRID, GRID)
    part = TokenPart(
        rng.integers(0, 16_384, (n_samples, *shape), np.uint16),
        rng.integers(0, 8192, n_samples * N_CAPTION_IDS, np.int32),
        np.full(n_samples, N_CAPTION_IDS),
        np.ones(n_samples, np.int64),
    )
    write_split(folder, split, [part], shape, np.uint16)
    shards = (ShardSpec(name=f"{split}-000000.tar", n_samples=n_samples, sha256="random"),)
    spec = StoreSpec(
        image_tokenizer="random", text_tokenizer="random", languages=("en",), variants="centre", grid_height=GRID,
        grid_width=GRID, splits={split: SplitSpec(shards=shards)},
    )  # fmt: skip
    write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
    return TokenStore.open(folder)

"""Which samples make up a step, and what is drawn for each: pure functions of the seed and where a run stands.

So a run can go on anywhere, and any rank or worker can make any batch.

B batch
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from vqt2i.runtime import stream_seed


class Visits(NamedTuple):
    """Looks at samples: index_B says at which, epoch_B seeds what is drawn anew each time (which caption, say).

    Both int64 (B,).
    """

    index_B: np.ndarray
    epoch_B: np.ndarray


def draw(what: str, seed: int, visits: Visits) -> np.ndarray:
    """A random number for each visit, float32 (B,) in [0, 1): the same on every rank and in every worker.

    It is a hash of (what, seed, epoch, index) and not the next number of a generator: a generator for each visit costs
    more than all the rest of reading a sample from a token store.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    hashed = np.uint64(stream_seed("draw", what, seed))
    for part_B in (visits.epoch_B, visits.index_B):
        hashed = _mixed(hashed + part_B.astype(np.uint64) * step)
    return (hashed >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)  # 24 bits: exact in float32, never 1


def _mixed(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): every bit depends on every bit. uint64 to uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `n` in the order of an epoch, int64 (n,)."""
    return np.random.default_rng(stream_seed("order", seed, epoch)).permutation(n)


class StepSampler(Sampler[Visits]):
    """The visits of each step from `first_step` up to `n_steps`.

    Every epoch is a fresh permutation; batches run across its end, so all have `batch_size` samples. The global batch
    is dealt out to the ranks in turn: any number of ranks sees the same samples at the same step.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        n_steps: int,
        seed: int,
        *,
        first_step: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        self.n_samples, self.batch_size, self.n_steps, self.seed = n_samples, batch_size, n_steps, seed
        self.first_step, self.rank, self.n_ranks = first_step, rank, n_ranks

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Visits]:
        orders: dict[int, np.ndarray] = {}  # of the epochs in this step
        for step in range(self.first_step, self.n_steps):
            position_B = np.arange(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.n_ranks)
            epoch_B, place_B = np.divmod(position_B, self.n_samples)
            epochs = range(epoch_B[0], epoch_B[-1] + 1)
            orders = {e: orders[e] if e in orders else shuffled(self.n_samples, self.seed, e) for e in epochs}
            yield Visits(np.concatenate([orders[e][place_B[epoch_B == e]] for e in epochs]), epoch_B)


class MixedSampler(Sampler[Visits]):
    """The visits of two sets of samples together, `n_second` of each step in the second set.

    Each set is gone through as `StepSampler` does. An index from `sizes[0]` on is of the second set. Each step is
    shuffled, so that what is done to the first rows of a batch, or on one rank, falls on both sets.
    """

    def __init__(
        self, sizes: tuple[int, int], batch_size: int, n_second: int, n_steps: int, seed: int, *,
        first_step: int = 0, rank: int = 0, n_ranks: int = 1,
    ) -> None:  # fmt: skip
        counts = (batch_size - n_second, n_second)
        self.parts = [
            StepSampler(size, count, n_steps, seed, first_step=first_step)
            for size, count in zip(sizes, counts, strict=True)
        ]
        self.n_first_samples, self.batch_size, self.n_steps, self.seed = sizes[0], batch_size, n_steps, seed
        self.first_step, self.rank, self.n_ranks = first_step, rank, n_ranks

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Visits]:
        for step, (first, second) in enumerate(zip(*self.parts, strict=True), self.first_step):
            order = np.random.default_rng(stream_seed("mix", self.seed, step)).permutation(self.batch_size)
            index_B = np.concatenate((first.index_B, second.index_B + self.n_first_samples))
            epoch_B = np.concatenate((first.epoch_B, second.epoch_B))
            here = order[self.rank :: self.n_ranks]
            yield Visits(index_B[here], epoch_B[here])


class LaneSampler(Sampler[Visits]):
    """The positions in a stream that each step of a rank reads, from `first_step` up to `n_steps`.

    The stream is cut into blocks, and each worker of each rank (each lane) goes through every n-th of them: so the
    lanes share out all blocks, read only their own, never run out, and where they stand follows from the step. Unlike
    `StepSampler`, another number of ranks or workers reads other samples at a step.

    Worker i of a loader makes every n-th batch from batch i on. After a resume this is another lane than before, which
    is why a step belongs to a lane and not to a worker.
    """

    def __init__(
        self, block_size: int, batch_size: int, n_steps: int, *, first_step: int, rank: int, n_ranks: int,
        n_workers: int,
    ) -> None:  # fmt: skip
        self.block_size, self.batch_size, self.n_steps = block_size, batch_size, n_steps
        self.first_step, self.rank, self.n_ranks = first_step, rank, n_ranks
        self.n_lanes_here = max(n_workers, 1)

    @property
    def n_lanes(self) -> int:
        """Over all ranks; the blocks of a lane are so many apart."""
        return self.n_ranks * self.n_lanes_here

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Visits]:
        share = len(range(self.rank, self.batch_size, self.n_ranks))
        for step in range(self.first_step, self.n_steps):
            turn, worker = divmod(step, self.n_lanes_here)
            lane = self.rank * self.n_lanes_here + worker
            block_B, place_B = np.divmod(np.arange(turn * share, (turn + 1) * share), self.block_size)
            index_B = (block_B * self.n_lanes + lane) * self.block_size + place_B
            yield Visits(index_B, np.zeros_like(index_B))

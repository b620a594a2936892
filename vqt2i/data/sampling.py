"""Which samples make up a step: a pure function of (seed, step), so that a run can go on anywhere, on any rank."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from vqt2i.runtime import stream_seed


class Visit(NamedTuple):
    """One look at one sample: `epoch` seeds what is drawn anew each time (which caption, say)."""

    index: int
    epoch: int


class StepSampler(Sampler[list[Visit]]):
    """A batch of visits for each step from `first_step` up to `n_steps`.

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

    def __iter__(self) -> Iterator[list[Visit]]:
        epoch, order = -1, np.empty(0)
        for step in range(self.first_step, self.n_steps):
            visits = []
            for position in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.n_ranks):
                if position // self.n_samples != epoch:
                    epoch = position // self.n_samples
                    order = np.random.default_rng(stream_seed("order", self.seed, epoch)).permutation(self.n_samples)
                visits.append(Visit(int(order[position % self.n_samples]), epoch))
            yield visits

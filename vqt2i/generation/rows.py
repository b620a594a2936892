"""The rows that images drawn together take in the caches, and the guided logits that come out of them.

B batch (images), R rows that read what the images should show, I image ids, L tokens scored, V vocabulary
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from vqt2i.generation.sampling import SamplingConfig, guide
from vqt2i.gpt import GPT, Condition, caption_log_probability
from vqt2i.nn.cache import BranchedCache, Branches, PrefixCache
from vqt2i.nn.sparsity import DenseConfig

FixedIds = tuple[int | None, ...]
DRAWN = -1  # stands in tensors of fixed ids where none is


class Mixed(NamedTuple):
    """Something else that an image is to show, and its share, in (0, 1), of the conditional logits."""

    condition: Condition
    share: float


class Job(NamedTuple):
    """One image to draw: its condition (of a text, the ids), and what with the seed makes its random stream.

    negative: what guidance leads away from; None is the null condition.
    mixed: a second condition; guided, the two are a conjunction as Liu et al. 2022 (arXiv 2206.01714) compose
        conditions of diffusion models.
    fixed: for each of the image's tokens its id, or None where it is to be drawn; () draws all of them.
    """

    condition: Condition
    prompt_index: int
    image_index: int
    negative: Condition | None = None
    mixed: Mixed | None = None
    fixed: FixedIds = ()

    @property
    def conditions(self) -> tuple[Condition, Condition | None, Mixed | None]:
        """What its logits depend on beside the tokens drawn: jobs with equal ones may share rows."""
        return self.condition, self.negative, self.mixed

    def n_passes(self, n: int) -> int:
        """How many passes of the GPT give its `n` tokens one by one, that of its text included."""
        return self.fixed.count(None) + (self.fixed[0] is not None) if self.fixed else n


class _Prefilled(NamedTuple):
    """Rows that have read their conditions: the logits of their first token, (rows, 1, V), and their branches."""

    logits: Tensor
    branches: list[Branches]


class GuidedRows:
    """A row for each image's condition, one more where one is mixed in, and one for guidance to lead away from.

    Each condition is read at once, and the rows that stand beside it continue it; the rows for guidance read image
    tokens only when logits are asked for that it acts on.
    """

    def __init__(self, gpt: GPT, jobs: Sequence[Job], sampling: SamplingConfig) -> None:
        """Read the conditions. Jobs of equal ones side by side share them."""
        self.gpt, self.jobs = gpt, jobs
        n = gpt.layout.image_length
        self.guided = sampling.guided_tokens(n)
        self.scale_I1 = torch.tensor(sampling.guidance_scales(n), device=gpt.device)[:, None]
        mixed = {row: job.mixed for row, job in enumerate(jobs) if job.mixed}
        self.image_R = torch.tensor([*range(len(jobs)), *mixed], device=gpt.device)
        shares = [1 - job.mixed.share if job.mixed else 1.0 for job in jobs] + [m.share for m in mixed.values()]
        self.share_R11 = torch.tensor(shares, device=gpt.device)[:, None, None] if mixed else None
        conditions = [job.condition for job in jobs]
        self.first, branches = _prefill(gpt, conditions + [m.condition for m in mixed.values()], n - 1)
        self.conditional = self.all = BranchedCache(branches)
        self.caches = [self.conditional]
        if self.guided:
            null_of = gpt.reader.null
            led_from = [null_of(job.condition) if job.negative is None else job.negative for job in jobs]
            # where these can go on to their texts: room for all of image → text but its mark and the EOT at its end
            self._led_from_images = gpt.layout.config.null_condition == "image_first" and not any(led_from)
            n_more = gpt.layout.length - 2 if self._led_from_images else n - 1
            self.first_null, null = _prefill(gpt, led_from, n_more)
            self.null, self.all = BranchedCache(null), BranchedCache([*branches, *null])
            self.caches.append(self.null)

    def logits(self, image_BI: Tensor, n_scored: int = 1) -> Tensor:
        """Read the tokens of `image_BI` that are new and return the guided logits after its last `n_scored`, fp32.

        Args:
            image_BI: all tokens from the image's first on; none gives the logits of the first token.

        Returns (B, n_scored, V).
        """
        n, new_BI = image_BI.shape[1], image_BI[:, self.conditional.n_filled :]
        if not any(index in self.guided for index in range(n - n_scored + 1, n + 1)):
            logits = self.gpt.step(new_BI[self.image_R], self.conditional, n_scored) if n else self.first
            return self._mixed(logits.float())
        if not n:
            logits, null = self.first, self.first_null
        elif self.null.n_filled == self.conditional.n_filled:
            rows = torch.cat((new_BI[self.image_R], new_BI))
            logits, null = self.gpt.step(rows, self.all, n_scored).split((len(self.image_R), len(new_BI)))
        else:  # guidance begins: its rows read all that they have not read yet at once
            logits = self.gpt.step(new_BI[self.image_R], self.conditional, n_scored)
            null = self.gpt.step(image_BI[:, self.null.n_filled :], self.null, n_scored)
        return guide(self._mixed(logits.float()), null.float(), self.scale_I1[n - n_scored + 1 : n + 1])

    def rewind_to(self, n: int) -> None:
        """Forget all image tokens but the first `n`."""
        for cache in self.caches:
            cache.rewind(max(0, cache.n_filled - n))

    def caption_scores(self, image_BI: Tensor) -> Tensor | None:
        """log p(text | image) per token in nats, (B,), of whole images and the texts that they were drawn for, by the
        rows for guidance, which have read the images already; None where these cannot go on to a text.

        Call it once, at the end: the rows are of no use for images after it.
        """
        dense = isinstance(self.gpt.config.sparsity, DenseConfig)  # a text sees all of an image, its ids not
        if not (self.guided and self._led_from_images and dense):
            return None
        reader = self.gpt.reader
        text = reader.collate([job.condition for job in self.jobs], self.gpt.device, whole=True)
        return caption_log_probability(self.gpt, text, image_BI, self.null)

    def _mixed(self, logits_RLV: Tensor) -> Tensor:
        if self.share_R11 is None:
            return logits_RLV
        mixed_BLV = logits_RLV.new_zeros(len(self.jobs), *logits_RLV.shape[1:])
        return mixed_BLV.index_add_(0, self.image_R, logits_RLV * self.share_R11)


class Prefixes(NamedTuple):
    """Conditions that were read: logits of their images' first token, (G, V), keys, and which are no padding."""

    logits_GV: Tensor
    cache: PrefixCache
    real_GP: Tensor


def read_conditions(gpt: GPT, conditions: Sequence[Condition], *, whole: bool = False) -> Prefixes:
    """Read conditions as prefixes of images, padded to the longest of them or, `whole`, to the longest possible."""
    prefix = gpt.reader(gpt.reader.collate(conditions, gpt.device, whole=whole))
    return Prefixes(*gpt.prefill(prefix), prefix.real_BL)


def fixed_ids(jobs: Sequence[Job], n: int) -> Tensor:
    """The ids of each image that are fixed, (B, n), and DRAWN elsewhere."""
    return torch.tensor([[DRAWN if id is None else id for id in job.fixed or (None,) * n] for job in jobs])


def count_runs(conditions: Iterable[Condition]) -> list[tuple[Condition, int]]:
    """Conditions with the number of times that each stands side by side."""
    return [(condition, len(list(rows))) for condition, rows in groupby(conditions)]


def _prefill(gpt: GPT, conditions: Sequence[Condition], n_more: int) -> _Prefilled:
    """Read conditions, one for each row; equal ones side by side are read once, and equally many of each together.

    Args:
        n_more: positions that rows may add.
    """
    logits, branches = [], []
    for n_each, group in groupby(count_runs(conditions), key=lambda run: run[1]):
        read = read_conditions(gpt, [condition for condition, _ in group])
        logits.append(read.logits_GV.repeat_interleave(n_each, dim=0))
        branches.append(Branches(read.cache, read.real_GP, n_each, n_more))
    return _Prefilled(torch.cat(logits)[:, None], branches)

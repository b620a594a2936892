"""Samples read in passing from webdataset tars: too many to keep, or far away.

A tar is read from its start to its end or not at all, so the stream is made of blocks: a few whole shards, in memory,
whose samples are shuffled together. Which shards make up a block, and in what order its samples come, follow from the
seed and the block's number, and every block has the same size. So where a run stands follows from its step: a resume
fetches the present block again and nothing before it. Webdataset's own shuffle and split over nodes are not used,
because they could only be resumed by reading everything again.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from vqt2i.config import Config
from vqt2i.data.decode import RefusedError, clean_captions, decode_image
from vqt2i.data.pairs import Pair
from vqt2i.data.sampling import shuffled
from vqt2i.data.sources import Item, Rejection
from vqt2i.data.tars import DAMAGED, TIMEOUT_S, UNOPENED, expand, is_remote, tar_items
from vqt2i.errors import DataError
from vqt2i.runtime import say, stream_seed

T = TypeVar("T")


class StreamConfig(Config):
    """Webdataset tars to train from, on this machine or over http.

    urls: paths or addresses; patterns like https://host/train-{0000..0999}.tar.
    samples_per_shard: how many each visit to a shard counts for. Of a shard that holds more, each visit leaves out
        others; of one that holds fewer, some come twice.
    shuffled_shards: so many are in memory and shuffled together, and as many more on their way, in each worker.
    unreadable: a shard or an image that cannot be read ends the run ("stop"), or others of its block take its place
        and it is told ("skip").
    timeout_s: a server that sends nothing for so long has failed.
    attempts: how often a shard is asked for over http before it counts as unreadable.
    first_wait_s: before the second attempt; each further wait is twice as long.
    """

    urls: tuple[str, ...] = Field(min_length=1)
    samples_per_shard: PositiveInt = 1000
    shuffled_shards: PositiveInt = 4
    unreadable: Literal["stop", "skip"] = "stop"
    timeout_s: PositiveFloat = TIMEOUT_S
    attempts: PositiveInt = 5
    first_wait_s: PositiveFloat = 1.0

    @field_validator("urls", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _another_can_take_its_place(self) -> "StreamConfig":
        if self.unreadable == "skip" and self.shuffled_shards == 1:
            raise ValueError("unreadable=skip needs shuffled_shards of 2 or more: the others take an unreadable "
                             "one's place")  # fmt: skip
        return self

    @property
    def block_size(self) -> int:
        """Samples in a block."""
        return self.samples_per_shard * self.shuffled_shards


class Stream:
    """`stream[position]` is a `Pair`; positions come in the order of `LaneSampler`, and never end.

    Holds the block of the last position, while the lane's next one is fetched.
    """

    def __init__(self, config: StreamConfig, seed: int, n_lanes: int = 1) -> None:
        self.config, self.seed, self.n_lanes = config, seed, n_lanes
        self.urls = expand(config.urls)
        self._block: _Block | None = None
        self._coming: _Coming | None = None
        self._n_skipped = {"shards": 0, "samples": 0}

    def in_lanes(self, n_lanes: int) -> "Stream":
        """The same stream, to be read by `n_lanes` lanes."""
        return Stream(self.config, self.seed, n_lanes)

    def __getitem__(self, position: int) -> Pair:
        """Sample at `position`.

        Raises:
            DataError: a shard or an image cannot be read and is not to be skipped, or nothing of a block can be read.
        """
        number, place = divmod(position, self.config.block_size)
        if self._block is None or self._block.number != number:
            coming = self._coming if self._coming and self._coming.number == number else self._fetch(number)
            self._block = self._coming = None  # its memory is needed for the next
            self._block = self._gathered(coming)
            self._coming = self._fetch(number + self.n_lanes)
        return self._pair(self._block, place)

    def shards_of(self, number: int) -> list[str]:
        """The addresses of a block's shards: every epoch goes through all shards in an order of its own."""
        n = self.config.shuffled_shards
        places = (divmod(place, len(self.urls)) for place in range(number * n, (number + 1) * n))
        return [self.urls[shuffled(len(self.urls), self.seed, epoch)[place]] for epoch, place in places]

    def _fetch(self, number: int) -> "_Coming":
        shards = [_in_background(lambda url=url: read_shard(url, self.config)) for url in self.shards_of(number)]
        return _Coming(number, shards)

    def _gathered(self, coming: "_Coming") -> "_Block":
        items: list[Item | None] = []
        for future in coming.shards:
            shard = future.result()
            items += shard.items
            if shard.unused:
                first, n = shard.unused[0], len(shard.unused)
                say(f"{first.name}: {first.reason} ({first.detail}); passed over, and {n - 1:,} more of this shard",
                    every_process=True)  # fmt: skip
            if shard.failure:
                self._unreadable("shards", shard.failure)
        if not items:
            raise DataError(f"no shard of a block can be read: {', '.join(self.shards_of(coming.number))}")
        rng = np.random.default_rng(stream_seed("block", self.seed, coming.number))
        n_rounds = -(-self.config.block_size // len(items))
        order = np.concatenate([rng.permutation(len(items)) for _ in range(n_rounds)])[: self.config.block_size]
        return _Block(coming.number, items, order)

    def _pair(self, block: "_Block", place: int) -> Pair:
        """The sample at `place` of a block; where it cannot be read, the next that can."""
        for offset in range(len(block.order)):
            index = block.order[(place + offset) % len(block.order)]
            item = block.items[index]
            if item is None:
                continue
            try:
                return _decoded(item)
            except RefusedError as error:
                block.items[index] = None
                self._unreadable("samples", Rejection(item.name, error.reason, error.detail))
        raise DataError(f"no image of a block can be read: {', '.join(self.shards_of(block.number))}")

    def _unreadable(self, what: str, rejection: Rejection) -> None:
        detail = f" ({rejection.detail})" if rejection.detail else ""
        message = f"{rejection.name}: {rejection.reason}{detail}"
        if self.config.unreadable == "stop":
            raise DataError(f"{message}; mend or leave out the shard, or set data.stream.unreadable=skip")
        self._n_skipped[what] += 1
        counts = ", ".join(f"{n:,} {what}" for what, n in self._n_skipped.items())
        say(f"skipped {message}; this process skipped {counts} so far", every_process=True)


@dataclass(frozen=True)
class _Coming:
    """The shards of a block on their way."""

    number: int
    shards: list["Future[Shard]"]


@dataclass(frozen=True)
class _Block:
    """The samples of a few shards (None: found to be unreadable), and the order in which they come, repeated or cut."""

    number: int
    items: list[Item | None]
    order: np.ndarray


class Shard(NamedTuple):
    """What could be read of a shard, the members that make no sample, and why the rest could not be read."""

    items: list[Item]
    unused: list[Rejection]
    failure: Rejection | None


def read_shard(url: str, config: StreamConfig) -> Shard:
    """All samples of a shard; over http a failure is tried again, after longer and longer waits."""
    n_attempts = config.attempts if is_remote(url) else 1
    wait_s, jitter = config.first_wait_s, random.Random()
    for attempt in range(1, n_attempts + 1):
        entries = list(tar_items([url], language="en", split=None, labelled=True, timeout_s=config.timeout_s))
        items = [entry for entry in entries if isinstance(entry, Item)]
        rejections = [entry for entry in entries if isinstance(entry, Rejection)]
        failure = next((r for r in rejections if r.reason in (UNOPENED, DAMAGED)), None)
        if failure is None or attempt == n_attempts:
            break
        time.sleep(wait_s * jitter.uniform(0.5, 1))  # not all workers at the same moment
        wait_s *= 2
    if failure and n_attempts > 1:
        failure = Rejection(failure.name, failure.reason, f"{failure.detail}; attempt {n_attempts} of {n_attempts}")
    if failure is None and not items:
        failure = Rejection(url, DAMAGED, "it holds no image")
    return Shard(items, [r for r in rejections if r.reason not in (UNOPENED, DAMAGED)], failure)


def _decoded(item: Item) -> Pair:
    captions = {language: [c for text in texts for c in clean_captions(text).captions]
                for language, texts in item.captions.items()}  # fmt: skip
    image_HW3, label = decode_image(item.image).image_HW3, item.label and " ".join(item.label.split())
    return Pair(item.key, image_HW3, {k: tuple(v) for k, v in captions.items() if v}, label=label)


def _in_background(work: Callable[[], T]) -> "Future[T]":
    """Start `work` in a thread. A daemon, unlike an executor's: a process does not wait for a stalled server to end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

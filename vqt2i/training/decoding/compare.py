"""Contestants timed in turns, for one text's candidates; the peak memory of each in a process of its own."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPTConfig, SequenceLayout
from vqt2i.runtime import keep_freed_memory, peak_memory
from vqt2i.training.compare import time_in_turns
from vqt2i.training.decoding.ceilings import RateMeter
from vqt2i.training.decoding.contestants import (
    DecodingPrecision,
    Drawer,
    made_or_said,
    our_drawer,
    their_drawer,
)
from vqt2i.training.decoding.records import Peak, Row


class Contestant(NamedTuple):
    """One of `ENGINES` (ours) or `MODES`, and its precision."""

    contestant: str
    ours: bool
    precision: DecodingPrecision

    def drawer(self, config: GPTConfig, device: torch.device) -> Drawer:
        """Raises ConfigError where it cannot be made here."""
        return (our_drawer if self.ours else their_drawer)(self.contestant, config, self.precision, device)


def contestants(
    precisions: Sequence[DecodingPrecision], modes: Sequence[str], engines: Sequence[str]
) -> list[Contestant]:
    """Ours in each precision; theirs too, but beside int8, which they lack, in fp32 and bf16."""
    theirs = [p for p in ("fp32", "bf16") if p in precisions or "int8" in precisions]
    return [
        *(Contestant(name, True, p) for p in precisions for name in engines),
        *(Contestant(name, False, p) for p in theirs for name in modes),
    ]


def drawers(config: GPTConfig, wanted: Sequence[Contestant], device: torch.device) -> dict[Contestant, Drawer]:
    """Those that can be made here; which of ours cannot, and why, is said.

    Raises:
        ConfigError: none of ours can, or `transformers` is wanted and not installed.
    """
    found: dict[Contestant, Drawer] = {}
    for who in wanted:
        make = partial(who.drawer, config, device)
        drawer = made_or_said(f"{who.contestant} in {who.precision}", make) if who.ours else make()
        if drawer is not None:
            found[who] = drawer
    if not any(who.ours for who in found):
        raise ConfigError("none of our engines can be made here in " + ", ".join({who.precision for who in wanted}))
    return found


def compare_decoding(
    config: GPTConfig, wanted: Sequence[Contestant], *, counts: Sequence[int], n_rounds: int, device: torch.device,
    meter: RateMeter, guidances: Sequence[bool] = (False, True),
) -> Iterator[list[Row]]:  # fmt: skip
    """Time the drawing of images, for each number of candidates, guided or not; all contestants in turns.

    The machine's rates are measured in the same turns. Compiling happens in the first round, which does not count.
    """
    made, n_tokens = drawers(config, wanted, device), SequenceLayout(config.layout).image_length
    for n_images in counts:
        for guided in guidances:
            # the limit of graphs compiled for a function counts all models, batch sizes and modes
            torch.compiler.reset()
            jobs = {None: meter.measure} | {who: drawer(n_images, guided) for who, drawer in made.items()}
            timings = time_in_turns(jobs, n_rounds, device)
            yield [
                Row(**who._asdict(), n_images=n_images, n_tokens=n_tokens, guided=guided, seconds=timings[who].seconds)
                for who in made
            ]


def measure_memory(
    config: GPTConfig, wanted: Sequence[Contestant], *, n_images: int, device: torch.device
) -> Iterator[list[Peak]]:
    """The peak of a process that makes a contestant and draws guided candidates once, one after the other."""
    for who in wanted:
        job = partial(_peak, who, config, n_images, device, torch.get_num_threads())
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = made_or_said(f"{who.contestant} in {who.precision}", process.submit(job).result)
        yield [found] if found else []


def _peak(who: Contestant, config: GPTConfig, n_images: int, device: torch.device, n_threads: int) -> Peak:
    keep_freed_memory()
    torch.set_num_threads(n_threads)
    draw = who.drawer(config, device)(n_images, True)
    made = peak_memory(device)
    draw()
    return Peak(**who._asdict(), n_images=n_images, guided=True, made_bytes=made, drawn_bytes=peak_memory(device))

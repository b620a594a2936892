"""What was measured, as it is written to a file: seconds of each round, in the order of the rounds, and what made them.

Ratios, rates and shares are made of these when they are shown.
"""

import json
from pathlib import Path

from vqt2i.config import Config, build_config
from vqt2i.errors import ConfigError, UserError
from vqt2i.gpt import GPTConfig
from vqt2i.origin import Origin
from vqt2i.training.compare import Timing
from vqt2i.training.decoding.ceilings import Rates
from vqt2i.training.decoding.contestants import DecodingPrecision


class Row(Config):
    """Candidates of one text drawn together by a contestant. contestant: one of `ENGINES` if ours, else of `MODES`."""

    contestant: str
    ours: bool
    precision: DecodingPrecision
    n_images: int
    n_tokens: int
    guided: bool
    seconds: tuple[float, ...]

    @property
    def timing(self) -> Timing:
        return Timing(list(self.seconds))


class Peak(Config):
    """Peak memory in bytes of a process of its own: once the contestant is made, and once it has drawn."""

    contestant: str
    ours: bool
    precision: DecodingPrecision
    n_images: int
    guided: bool
    made_bytes: int
    drawn_bytes: int


class Parts(Config):
    """Guided candidates of one text, by part."""

    contestant: str
    precision: DecodingPrecision
    n_images: int
    seconds: dict[str, tuple[float, ...]]

    def timing(self, part: str) -> Timing:
        return Timing(list(self.seconds[part]))


class Measured(Config):
    """Everything of one run. rates: the best of the whole run. Empty is what was not asked for."""

    origin: Origin
    gpt: GPTConfig
    rates: Rates
    table: tuple[Row, ...] = ()
    scaling: tuple[Row, ...] = ()
    parts: tuple[Parts, ...] = ()
    rerank: tuple[Parts, ...] = ()
    memory: tuple[Peak, ...] = ()


def read_measured(path: Path) -> Measured:
    """Raises UserError where `path` is no file of such numbers."""
    try:
        return build_config(Measured, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, ConfigError) as error:
        first, *_ = str(error).removeprefix(f"{path}: ").splitlines()
        raise UserError(f"{path}: expected what `benchmark generate --out` wrote; {first}") from None

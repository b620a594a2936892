"""Pictures that were there before: the same pixels, or nearly the same picture."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

# Measured on 868 photos of 128 px: of the copies at half the size in JPEG of quality 60, 86 % come this close, and no
# two different photos do. The colours are there for drawings: by gradients alone 416 of 811 emoji would pass for copies
# of another (the same picture in another skin tone, mostly), with them 17.
NEAR_BITS = 3
NEAR_LEVELS = 12
NEAR_WINDOW = 1 << 20  # so many pictures back are compared, one by one: 1 ms each at the most


class Signature(NamedTuple):
    """pixels: hash of size and pixels. gradients: difference hash of 64 bits. colours: uint8 (48,), 4 x 4 mean RGB."""

    pixels: bytes
    gradients: np.uint64
    colours: np.ndarray

    @property
    def share(self) -> float:
        """A number in [0, 1) drawn from the pixels: equal for equal pictures, on every machine."""
        return int.from_bytes(self.pixels[:6], "big") / 2**48


def signature(image_HW3: np.ndarray) -> Signature:
    """What `Duplicates` compares of a uint8 RGB picture."""
    pixels = blake2b(repr(image_HW3.shape).encode() + image_HW3.tobytes(), digest_size=16).digest()
    image = Image.fromarray(image_HW3)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    rises = grey[:, 1:] - grey[:, :-1] > 1  # flat areas stay 0 under noise
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX)).reshape(48)
    return Signature(pixels, np.packbits(rises).view(np.uint64)[0], colours)


@dataclass(frozen=True)
class Twin:
    """The earlier picture that a new one repeats."""

    kind: Literal["exact", "near"]
    name: str
    split: str | None


class Duplicates:
    """The signatures seen so far; about 400 bytes a picture."""

    def __init__(self) -> None:
        self._exact: dict[bytes, tuple[str, str | None]] = {}
        self._near: list[tuple[str, str | None]] = []
        self._n = 0  # pictures added; the arrays are rings over the last NEAR_WINDOW of them
        self._gradients = np.zeros(1024, np.uint64)
        self._colours = np.zeros((1024, 48), np.uint8)

    def twin(self, new: Signature) -> Twin | None:
        """The first picture with the same pixels, else one that looks nearly the same, else None."""
        if new.pixels in self._exact:
            return Twin("exact", *self._exact[new.pixels])
        n = min(self._n, NEAR_WINDOW)
        close = np.flatnonzero(np.bitwise_count(self._gradients[:n] ^ new.gradients) <= NEAR_BITS)
        distances = np.abs(self._colours[close].astype(np.int16) - new.colours).max(axis=1, initial=0)
        close = close[distances <= NEAR_LEVELS]
        return Twin("near", *self._near[close[0]]) if len(close) else None

    def add(self, new: Signature, name: str, split: str | None) -> None:
        """Remember a picture that was kept, and where it went."""
        self._exact.setdefault(new.pixels, (name, split))
        place = self._n % NEAR_WINDOW
        if place == len(self._gradients):
            self._gradients = np.concatenate([self._gradients, np.zeros_like(self._gradients)])
            self._colours = np.concatenate([self._colours, np.zeros_like(self._colours)])
        self._gradients[place], self._colours[place] = new.gradients, new.colours
        self._near[place : place + 1] = [(name, split)]
        self._n += 1

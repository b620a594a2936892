"""The one type that every source yields and every consumer takes: an image with its captions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Pair:
    """An image and what is said of it.

    key: unique in its data set, no dots.
    image_HW3: uint8 RGB.
    captions: language code ("en", "zh", ...) to one or more captions; the first language is the primary one. May be
        empty: image-only data trains image tokenizers.
    meta: JSON-able facts (the scene of a shapes picture, the code points of an emoji, ...).
    label: the name of its class, in a data set of classes.
    """

    key: str
    image_HW3: np.ndarray
    captions: dict[str, tuple[str, ...]]
    meta: dict[str, Any] = field(default_factory=dict)
    label: str | None = None

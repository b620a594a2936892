"""What drawing gives and takes: pictures with what made them, looks at unfinished ones, mixed prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from vqt2i.data.images import png_bytes
from vqt2i.generation.rows import Job


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture with what made it; notebooks show it as a picture.

    image_HW3: uint8 RGB. image_ids_HW: its codes. scores: by scorer, higher is better; empty if nothing was scored.
    n_truncated: prompt ids that the model could not read. n_passes: of the GPT that it took, its prompt's included.
    """

    prompt: str
    prompt_index: int
    image_index: int
    seed: int
    image_HW3: np.ndarray = field(repr=False)
    image_ids_HW: np.ndarray = field(repr=False)
    n_truncated: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    n_passes: int = 0

    @property
    def image(self) -> Image.Image:
        """The picture as Pillow has it: `sample.image.save("red.png")`."""
        return Image.fromarray(self.image_HW3)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.image)


class Mix(NamedTuple):
    """Another text that each prompt is mixed with, and its share in (0, 1).

    The prompt's logits become (1 - share) · its own + share · the text's, and its scores likewise.
    """

    text: str
    share: float


class Preview(NamedTuple):
    """The images that are being drawn, as far as their tokens are.

    jobs: which images, by prompt index and image index. images: decodes what there is of them when it is called; uint8
    (images, height, width, 3), what is not drawn yet in GREY.
    """

    jobs: Sequence[Job]
    images: Callable[[], np.ndarray]

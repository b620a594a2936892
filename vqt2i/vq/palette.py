"""An image tokenizer without a network: pixels of a low resolution as ids of a colour palette.

Source: Chen et al. 2020 (iGPT, "Generative Pretraining from Pixels"), section 3.2: 512 colours, the means of k-means
over the (R, G, B) of training pixels. Differs: the means are rounded to whole 8-bit colours, so that a picture that was
decoded, saved and read again has the ids that it had.

B batch, H height, W width, N pixels, C different colours of pixels, K colours of the palette
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.data.images import to_tensor
from vqt2i.errors import DataError
from vqt2i.vq.inputs import require_image_ids, require_images
from vqt2i.vq.quantizer import nearest_codes


class PaletteConfig(Config):
    """image_size_px: side of the square images; the grid has an id for each of their pixels."""

    kind: Literal["palette"] = "palette"
    image_size_px: PositiveInt = 32
    n_colours: int = Field(512, ge=2)

    @property
    def downsample(self) -> int:
        """Image side over id-grid side."""
        return 1

    @property
    def ids_per_cell(self) -> int:
        """Ids for each cell of the grid."""
        return 1

    @property
    def grid_height(self) -> int:
        """Rows of the id grid."""
        return self.image_size_px

    @property
    def grid_width(self) -> int:
        """Ids in a row of the id grid."""
        return self.image_size_px

    @property
    def n_image_ids(self) -> int:
        """Ids per image."""
        return self.image_size_px**2

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return self.n_colours


class PaletteTokenizer(nn.Module):
    """Each pixel is the nearest colour of `colours_K3` (uint8). Images of any height and width work.

    A new one is all black: `fit_colours` gives the colours.
    """

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("colours_K3", torch.zeros(config.n_colours, 3, dtype=torch.uint8))

    @property
    def device(self) -> torch.device:
        """Where the colours are."""
        return self.colours_K3.device

    @property
    def ids_fingerprint(self) -> str:
        """As `ImageTokenizer` has it: what an id means follows from everything in a palette."""
        return self.fingerprint

    def codes(self) -> Tensor:
        """What each id stands for: its colour in [-1, 1], (K, 3)."""
        return to_tensor(self.colours_K3[None])[:, 0].T

    @torch.no_grad()
    def encode(self, x_B3HW: Tensor) -> Tensor:
        """ids_BHW (long) of images in [-1, 1].

        Raises:
            DataError: the shape is not (B, 3, H, W).
        """
        require_images(x_B3HW, self.config.downsample)
        with torch.autocast(x_B3HW.device.type, enabled=False):  # in bf16 near colours would be mixed up
            pixel_BHW3 = x_B3HW.float().movedim(1, -1)
            return nearest_codes(pixel_BHW3.reshape(-1, 3), self.codes()).view(pixel_BHW3.shape[:3])

    @torch.no_grad()
    def decode(self, ids_BHW: Tensor) -> Tensor:
        """x_B3HW in [-1, 1] of a grid of ids.

        Raises:
            DataError: not a (B, H, W) integer tensor with ids of this palette.
        """
        require_image_ids(ids_BHW, self.config.vocab_size)
        return to_tensor(self.colours_K3[ids_BHW])


def fit_colours(pixel_N3: np.ndarray, n_colours: int, seed: int, most_rounds: int = 50) -> Tensor:
    """Colours (K, 3), uint8, near to the pixels (uint8) in the mean of squares: k-means over (R, G, B).

    It starts from pixels drawn with probability proportional to their squared distance from the nearest one before
    (k-means++; Arthur & Vassilvitskii 2007). Then each colour becomes the mean of the pixels that it is nearest to,
    rounded (Lloyd 1982), until nothing moves; one that is nearest to none starts anew at what is farthest from all.

    Raises:
        DataError: the pixels have fewer different colours than are asked for.
    """
    packed_N = pixel_N3.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    packed_C, count_C = np.unique(packed_N, return_counts=True)  # far fewer than pixels, and as good with their counts
    if len(packed_C) < n_colours:
        raise DataError(f"n_colours {n_colours}: the training pixels have {len(packed_C)} different colours; set it to "
                        "that or less, or fit it to more images")  # fmt: skip
    colour_C3 = torch.from_numpy(np.stack((packed_C >> 16, packed_C >> 8 & 255, packed_C & 255), 1)).float()
    weight_C = torch.from_numpy(count_C).double()
    palette_K3 = _spread_start(colour_C3, weight_C, n_colours, np.random.default_rng(seed))
    for _ in range(most_rounds):
        nearest_C = nearest_codes(colour_C3, palette_K3)
        sums_K3 = torch.zeros(n_colours, 3, dtype=torch.float64)
        sums_K3.index_add_(0, nearest_C, colour_C3.double() * weight_C[:, None])
        weight_K = torch.zeros(n_colours, dtype=torch.float64).index_add_(0, nearest_C, weight_C)
        moved_K3 = (sums_K3 / weight_K[:, None].clamp_min(1)).round().float()
        unused = (weight_K == 0).nonzero().flatten()
        error_C = (colour_C3 - palette_K3[nearest_C]).square().sum(-1) * weight_C
        moved_K3[unused] = colour_C3[error_C.topk(len(unused)).indices]
        if torch.equal(moved_K3, palette_K3):
            break
        palette_K3 = moved_K3
    return palette_K3.to(torch.uint8)


def _spread_start(colour_C3: Tensor, weight_C: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """k-means++: `n` different ones of the weighted colours."""
    distance_C = torch.ones_like(weight_C)  # of the first nothing is known: drawn by weight
    chosen: list[Tensor] = []
    for _ in range(n):
        share_C = (distance_C * weight_C).cumsum(0)
        place = int(torch.searchsorted(share_C, rng.random() * share_C[-1], right=True))
        chosen.append(colour_C3[place])
        squared_C = (colour_C3 - chosen[-1]).square().sum(-1).double()
        distance_C = squared_C if len(chosen) == 1 else torch.minimum(distance_C, squared_C)
    return torch.stack(chosen)

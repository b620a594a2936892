"""Which image positions an image position may look at, layer by layer: the sparse attention of DALL·E and of CogView.

Text, marks and what looks at or from them are never restricted. A pattern is a name that says which layers look alike,
and a bool matrix over the positions of a grid in raster order.

I image positions (queries, keys)
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from vqt2i.config import Config


class DenseConfig(Config):
    """Every position before, in every layer."""

    kind: Literal["dense"] = "dense"

    def patterns(self, n_layers: int) -> list[str]:
        return ["dense"] * n_layers

    def visible(self, pattern: str, height: int, width: int) -> np.ndarray:
        return np.tri(height * width, dtype=bool)


class RowColumnConfig(Config):
    """Row, column and convolutional attention (DALL·E, Ramesh et al. 2021, arXiv 2102.12092, appendix B.1, figure 11).

    Layers i from 1: column attention where i - 2 is a multiple of 4, convolutional in the last, row in the others.
    row: the positions before, back to the one above. column: those above. convolutional: what a causal convolution of
    `conv_size` sees; it wraps around the grid's sides as the published one does if `conv_wraps`.
    """

    kind: Literal["row_column"] = "row_column"
    conv_size: PositiveInt = 11
    conv_wraps: bool = True

    @model_validator(mode="after")
    def _conv_has_a_middle(self) -> "RowColumnConfig":
        if self.conv_size % 2 == 0:
            raise ValueError(f"conv_size {self.conv_size} must be odd: a position is in the middle of what it sees")
        return self

    def patterns(self, n_layers: int) -> list[str]:
        return ["column" if layer % 4 == 1 else "row" for layer in range(n_layers - 1)] + ["conv"]

    def visible(self, pattern: str, height: int, width: int) -> np.ndarray:
        index, reach = np.arange(height * width), self.conv_size // 2
        back_II = index[:, None] - index
        if pattern == "row":
            seen_II = back_II <= width
        elif pattern == "column":
            seen_II = back_II % width == 0
        elif self.conv_wraps:
            seen_II = np.any([np.abs(back_II - up * width) <= reach for up in range(reach + 1)], axis=0)
        else:
            row, column = index // width, index % width
            seen_II = (row[:, None] - row <= reach) & (np.abs(column[:, None] - column) <= reach)
        return seen_II & (back_II >= 0)


class PivotWindowConfig(Config):
    """Pivots anywhere and a window of blocks (CogView, Ding et al. 2021, arXiv 2105.13290, three-region attention).

    A position sees `n_blocks` blocks of `block_size`, the last of which is its own up to itself, and of `n_pivots`
    random positions, others in every layer, those before it. Differs: they are drawn once for each layer and not anew
    at each pass, so that a cached step sees what the whole pass sees.
    """

    kind: Literal["pivot_window"] = "pivot_window"
    n_pivots: PositiveInt = 768
    block_size: PositiveInt = 128
    n_blocks: PositiveInt = 6

    def patterns(self, n_layers: int) -> list[str]:
        return [f"pivots {layer}" for layer in range(n_layers)]

    def visible(self, pattern: str, height: int, width: int) -> np.ndarray:
        n = height * width
        block = np.arange(n) // self.block_size
        pivots = np.random.default_rng(int(pattern.split()[1])).permutation(n)[: self.n_pivots]
        seen_II = block[:, None] - block < self.n_blocks
        seen_II[:, pivots] = True
        return seen_II & np.tri(n, dtype=bool)


SparsityConfig = Annotated[DenseConfig | RowColumnConfig | PivotWindowConfig, Field(discriminator="kind")]

"""Patterns against their definitions, written out position by position."""

import numpy as np
import pytest

from vqt2i.nn.sparsity import DenseConfig, PivotWindowConfig, RowColumnConfig

GRIDS = [(4, 4, 3), (3, 2, 3), (5, 7, 5), (6, 5, 5), (8, 8, 11), (1, 3, 3)]  # height, width, size of the kernel


def seen(config, pattern: str, height: int, width: int) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in config.visible(pattern, height, width)]


def test_layers_alternate_as_published() -> None:
    published = ["row", "column", "row", "row"] * 16
    assert RowColumnConfig().patterns(64) == [*published[:63], "conv"]
    assert RowColumnConfig().patterns(1) == ["conv"]
    assert len(set(PivotWindowConfig().patterns(5))) == 5 and set(DenseConfig().patterns(5)) == {"dense"}


def test_row_column_and_convolution_are_those_of_the_papers_figure() -> None:
    # figure 11: a grid of 4 x 4; the position of index 9, in the third row and second column
    config = RowColumnConfig(conv_size=3)
    row, column, conv = (seen(config, pattern, 4, 4)[9] for pattern in ("row", "column", "conv"))
    assert row == {5, 6, 7, 8, 9} and column == {1, 5, 9} and conv == {4, 5, 6, 8, 9}
    assert seen(config, "conv", 4, 4)[8] == {3, 4, 5, 7, 8}  # around the side, as the row before
    flat = config.model_copy(update={"conv_wraps": False})
    assert seen(flat, "conv", 4, 4)[8] == {4, 5, 8} and seen(flat, "conv", 4, 4)[9] == conv


@pytest.mark.parametrize(("height", "width", "size"), GRIDS)
@pytest.mark.parametrize("wraps", [True, False])
def test_a_convolution_sees_the_kernel_above_and_before(height: int, width: int, size: int, wraps: bool) -> None:
    found = seen(RowColumnConfig(conv_size=size, conv_wraps=wraps), "conv", height, width)
    reach = size // 2
    for q in range(height * width):
        steps = [(up, back) for up in range(reach + 1) for back in range(-reach, reach + 1)]
        expected = {q - up * width - back for up, back in steps if wraps or 0 <= q % width - back < width}
        assert found[q] == {k for k in expected if 0 <= k <= q}


def test_pivots_and_window_by_hand() -> None:
    config = PivotWindowConfig(n_pivots=3, block_size=4, n_blocks=2)
    for pattern in config.patterns(4):
        found = seen(config, pattern, 4, 5)
        pivots = set.union(*found[8:]) & found[19] - set(range(12, 20))
        for q in range(20):
            window = set(range(max(q // 4 - 1, 0) * 4, q + 1))
            assert window <= found[q] and found[q] - window <= pivots and len(found[q] - window) <= 3
    assert seen(config, "pivots 0", 4, 5) == seen(config, "pivots 0", 4, 5) != seen(config, "pivots 1", 4, 5)


@pytest.mark.parametrize("config", [DenseConfig(), RowColumnConfig(), PivotWindowConfig(n_pivots=4)], ids=str)
def test_every_position_sees_itself_and_nothing_later(config) -> None:
    for pattern in set(config.patterns(6)):
        visible = config.visible(pattern, 6, 5)
        assert visible.diagonal().all() and not np.triu(visible, 1).any()


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="conv_size 4 must be odd"):
        RowColumnConfig(conv_size=4)

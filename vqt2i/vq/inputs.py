"""What image tokenizers take, checked."""

from torch import Tensor

from vqt2i.errors import DataError


def require_images(x_B3HW: Tensor, factor: int) -> None:
    """Raises DataError unless the shape is (B, 3, H, W) with sides that `factor` divides."""
    shape = tuple(x_B3HW.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor:
        raise DataError(f"images: expected (batch, 3, height, width) with sides that {factor} divides, "
                        f"found {shape}; resize or crop them")  # fmt: skip


def require_image_ids(ids_BHW: Tensor, vocab_size: int, ids_per_cell: int = 1) -> None:
    """Raises DataError unless it is a (B, H, W) integer tensor with ids below `vocab_size`, whole cells of them."""
    if ids_BHW.ndim != 3 or ids_BHW.is_floating_point():
        raise DataError(f"image ids: expected an integer tensor of shape (batch, grid height, grid width), "
                        f"found {ids_BHW.dtype} {tuple(ids_BHW.shape)}")  # fmt: skip
    lowest, highest = (int(bound) for bound in ids_BHW.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise DataError(f"image ids: expected 0 to {vocab_size - 1}, found {lowest} to {highest}; "
                        f"were they made by another image tokenizer?")  # fmt: skip
    if ids_BHW.shape[2] % ids_per_cell:
        raise DataError(f"image ids: a cell has {ids_per_cell} of them side by side, found rows of {ids_BHW.shape[2]}")

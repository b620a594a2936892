"""Equal pictures are always found, copies nearly always, and different ones are left alone."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vqt2i.data import duplicates
from vqt2i.data.duplicates import Duplicates, Twin, signature


def photo(seed: int, size_px: int = 96) -> np.ndarray:
    """Smooth blobs, as photos are."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(grid).resize((size_px, size_px), Image.Resampling.BICUBIC))


def copy(image_HW3: np.ndarray, size_px: int, quality: int) -> np.ndarray:
    buffer = BytesIO()
    Image.fromarray(image_HW3).resize((size_px, size_px)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@pytest.fixture
def seen() -> Duplicates:
    found = Duplicates()
    for i in range(200):
        found.add(signature(photo(i)), f"photo {i}", "train")
    return found


def test_the_same_pixels_are_an_exact_twin(seen: Duplicates) -> None:
    assert seen.twin(signature(photo(150))) == Twin("exact", "photo 150", "train")


def test_one_other_pixel_makes_a_near_twin(seen: Duplicates) -> None:
    image = photo(150).copy()
    image[0, 0, 0] ^= 1
    assert seen.twin(signature(image)) == Twin("near", "photo 150", "train")


def test_resized_and_recompressed_copies_are_near_twins(seen: Duplicates) -> None:
    twins = [seen.twin(signature(copy(photo(i), 64, 75))) for i in range(200)]
    assert sum(twin == Twin("near", f"photo {i}", "train") for i, twin in enumerate(twins)) >= 190


def test_different_photos_are_no_twins(seen: Duplicates) -> None:
    assert [seen.twin(signature(photo(i))) for i in range(200, 400)] == [None] * 200


def test_the_same_drawing_in_another_colour_is_no_twin() -> None:
    drawings = {}
    for colour in ((255, 0, 0), (0, 0, 255), (240, 200, 160)):
        drawings[colour] = np.full((32, 32, 3), 255, np.uint8)
        drawings[colour][8:24, 8:24] = colour
    seen = Duplicates()
    for colour, drawing in drawings.items():
        assert seen.twin(signature(drawing)) is None
        seen.add(signature(drawing), str(colour), None)


def test_equal_bytes_of_another_shape_are_no_exact_twin() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert signature(image).pixels != signature(image.reshape(4, 2, 3)).pixels


def test_near_twins_are_looked_for_in_the_window_and_exact_ones_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "NEAR_WINDOW", 1024)
    seen = Duplicates()
    for i in range(1024 + 100):
        seen.add(signature(photo(i, 16)), str(i), None)
    nearly = [photo(i, 16).copy() for i in (99, 100, 1123)]
    for image in nearly:
        image[0, 0, 0] ^= 1
    twins = [seen.twin(signature(image)) for image in nearly]
    assert twins == [None, Twin("near", "100", None), Twin("near", "1123", None)]
    assert seen.twin(signature(photo(0, 16))) == Twin("exact", "0", None)


def test_shares_are_spread_evenly() -> None:
    shares = np.array([signature(photo(i, 8)).share for i in range(1000)])
    assert 0 <= shares.min() and shares.max() < 1
    assert np.abs(np.histogram(shares, 4, (0, 1))[0] - 250).max() < 60

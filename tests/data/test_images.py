import numpy as np
import pytest
import torch

from vqt2i.data.images import fit_square, fit_variant, n_variants, to_tensor, to_uint8


def test_every_pixel_value_survives_the_way_to_the_model_and_back() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = to_tensor(image)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert float(x.min()) == -1 and float(x.max()) == 1
    assert np.array_equal(to_uint8(x), image)
    assert np.array_equal(to_uint8(to_tensor(image[None].repeat(2, 0))), image[None].repeat(2, 0))


def test_channels_go_first() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[1, 2] = (255, 0, 51)
    assert to_tensor(image)[:, 1, 2].tolist() == pytest.approx([1, -1, -0.6])


def test_the_argument_is_left_alone_and_views_are_read_right() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    kept = image.copy()
    assert torch.equal(to_tensor(image[::-1]), to_tensor(image[::-1].copy()))
    to_tensor(image).add_(1)
    assert np.array_equal(image, kept)


def test_values_out_of_range_are_clamped_and_others_rounded_to_the_nearest() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 7.0])[:, None, None, None].expand(6, 3, 1, 1)
    assert to_uint8(x)[:, 0, 0, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_an_image_that_fits_is_returned_as_it_is() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    assert fit_square(image, 8) is image


@pytest.mark.parametrize(("height", "width"), [(32, 80), (80, 32), (33, 32)])
def test_other_images_are_cropped_at_the_centre(height: int, width: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = 200
    for size in (16, 64):
        found, edge = fit_square(image, size), size // 5  # the filter looks a few pixels beyond the crop
        assert found.shape == (size, size, 3) and found.dtype == np.uint8
        assert (found[edge:-edge, edge:-edge] == 200).all() and found.min() > 100


@pytest.mark.parametrize(("variants", "n"), [("centre", 1), ("flip", 2), ("five-crop", 5), ("ten-crop", 10)])
def test_the_first_variant_is_the_plain_picture_and_all_differ(variants: str, n: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    made = [fit_variant(image, 32, variants, index) for index in range(n_variants(variants))]
    assert len(made) == n == len({picture.tobytes() for picture in made})
    assert np.array_equal(made[0], fit_square(image, 32)) and {picture.shape for picture in made} == {(32, 32, 3)}
    if variants in ("flip", "ten-crop"):
        for picture, mirrored in zip(made[: n // 2], made[n // 2 :], strict=True):
            assert np.array_equal(picture[:, ::-1], mirrored)


def test_quarters_of_a_picture_of_twice_the_size_are_its_own_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    quarters = [image[:32, :32], image[:32, 32:], image[32:, :32], image[32:, 32:]]
    expected = [fit_square(image, 32)] * 4 + quarters  # both sizes alike often
    assert n_variants("quarters") == len(expected)
    for index, picture in enumerate(expected):
        assert np.array_equal(fit_variant(image, 32, "quarters", index), picture)


def test_corner_crops_hold_their_corner_of_the_square_and_lose_the_opposite_one() -> None:
    image = np.full((110, 150, 3), 100, np.uint8)  # the centred square is columns 20 to 130
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 0), 4: (1, 1)}
    for bottom, right in corners.values():
        rows, columns = slice(bottom * 102, bottom * 102 + 8), slice(20 + right * 102, 20 + right * 102 + 8)
        image[rows, columns] = 200
    for index, (bottom, right) in corners.items():
        found = fit_variant(image, 100, "five-crop", index)
        assert found[-bottom, -right, 0] == 200 and found[bottom - 1, right - 1, 0] == 100

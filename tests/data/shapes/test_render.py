from itertools import combinations, product

import numpy as np
import pytest

from vqt2i.data.shapes.render import BACKGROUND_RGB, COLOUR_RGB, INK_RGB, SIZES_PX, render, sprite
from vqt2i.data.shapes.scene import FILLS, SHAPES, SIZES, Scene, SceneObject
from vqt2i.data.shapes.split import draw_scene
from vqt2i.errors import DataError


@pytest.mark.parametrize("size_px", SIZES_PX)
def test_pictures_are_uint8_rgb_of_the_size_asked_for(size_px):
    image = render(draw_scene(0, "train", 0), size_px)
    assert image.shape == (size_px, size_px, 3) and image.dtype == np.uint8


def test_larger_pictures_reduce_to_the_small_one():
    for index in range(20):
        scene = draw_scene(0, "train", index)
        small = render(scene, 32).astype(float)
        for scale in (2, 4):
            blocks = render(scene, 32 * scale).reshape(32, scale, 32, scale, 3).mean((1, 3))
            assert abs(blocks - small).max() <= 1  # rounding


def test_rendering_twice_gives_the_same_bytes():
    scene = draw_scene(0, "unseen", 5)
    first = render(scene, 64)
    assert np.array_equal(first, render(scene, 64)) and first is not render(scene, 64)


def test_coverage_is_a_share_and_fills_the_box():
    for shape, size, fill in product(SHAPES, SIZES, FILLS):
        colour, ink = sprite(shape, size, fill, 32)
        covered = colour + ink
        assert covered.shape == (SIZES[size], SIZES[size]) and covered.min() >= 0 and covered.max() <= 1
        assert (ink.sum() > 0) == (fill == "striped")
        touched = covered > 0
        assert max(np.ptp(np.nonzero(touched)[axis]) + 1 for axis in (0, 1)) == SIZES[size]


def test_striped_and_solid_have_one_outline_and_hollow_has_a_hole():
    for shape, size in product(SHAPES, SIZES):
        solid, striped, hollow = (sum(sprite(shape, size, fill, 32)) for fill in ("solid", "striped", "hollow"))
        assert np.allclose(solid, striped)
        assert (hollow <= solid + 1e-6).all() and hollow.sum() < 0.85 * solid.sum()


def test_silhouettes_of_different_shapes_differ():
    for a, b in combinations(SHAPES, 2):
        x, y = (sprite(shape, "small", "solid", 32)[0] for shape in (a, b))
        assert np.minimum(x, y).sum() / np.maximum(x, y).sum() < 0.8, (a, b)


def test_colours_are_far_apart():
    def distance(a, b):
        return float(np.linalg.norm(np.subtract(a, b)))

    assert min(distance(a, b) for a, b in combinations(COLOUR_RGB.values(), 2)) > 80
    assert min(distance(a, b) for a in COLOUR_RGB.values() for b in BACKGROUND_RGB.values()) > 110
    assert min(distance(a, b) for a, b in combinations(BACKGROUND_RGB.values(), 2)) > 70
    assert min(distance(a, INK_RGB) for a in COLOUR_RGB.values()) > 95


def test_an_object_lands_where_the_scene_says():
    image = render(Scene("white", (SceneObject("square", "red", "small", "solid", 8, 20),)), 32)
    expected = np.full((32, 32, 3), 255, np.uint8)
    expected[15:25, 3:13] = COLOUR_RGB["red"]
    assert np.array_equal(image, expected)


def test_the_first_object_lies_on_top():
    inner = SceneObject("square", "red", "small", "solid", 16, 16)
    outer = SceneObject("circle", "blue", "large", "solid", 16, 16)
    image = render(Scene("white", (inner, outer), "inside"), 32)
    assert tuple(image[16, 16]) == COLOUR_RGB["red"] and tuple(image[9, 16]) == COLOUR_RGB["blue"]


def test_a_size_that_cannot_be_drawn_is_named():
    with pytest.raises(DataError, match="48 px; choose from 32, 64"):
        render(draw_scene(0, "train", 0), 48)

"""Scenes to pixels: eight outlines as polygons, three fills, ten colours, four backgrounds.

An object is a sprite: how much of each pixel its colour covers and how much its ink (the dark of stripes) covers.
Sprites are drawn once with 8 samples a unit, reduced by a box filter, and cached; the oracle matches the same sprites.
"""

from functools import cache
from math import cos, pi, sin

import numpy as np

from vqt2i.data.shapes.scene import CANVAS, SIZES, Background, Colour, Fill, Scene, Shape, Size
from vqt2i.errors import DataError

COLOUR_RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "orange": (255, 135, 0),
    "yellow": (255, 220, 0),
    "lime": (150, 225, 30),
    "green": (15, 130, 55),
    "cyan": (0, 190, 205),
    "blue": (35, 75, 225),
    "purple": (130, 40, 175),
    "pink": (255, 95, 180),
    "brown": (145, 80, 30),
}
BACKGROUND_RGB: dict[Background, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (165, 165, 165),
    "beige": (238, 216, 190),
    "light blue": (185, 215, 255),
}
INK_RGB = (25, 25, 35)
SIZES_PX = (32, 64, 128)
"""Sides of pictures that can be drawn: multiples of CANVAS that divide its 8 samples a unit."""

_SAMPLES = 8  # per unit
_OUTLINE = 2.25  # of hollow objects, in units, where the shape has room for it
_OUTLINE_SHARE = 0.5  # else this share of the way from the edge to the innermost point
_STRIPE = 2  # width of a stripe, in units


@cache
def sprite(shape: Shape, size: Size, fill: Fill, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of an object's box by its colour and by ink: two float32 (side, side) in [0, 1], side in pixels.

    `size_px` is the side of the picture.
    """
    side = SIZES[size]
    ticks = (np.arange(side * _SAMPLES) + 0.5) / _SAMPLES - side / 2
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    inside, depth = _depth(x, y, np.asarray(_OUTLINES[shape]) * side)
    ink = np.zeros_like(inside)
    colour = inside
    if fill == "hollow":
        colour = inside & (depth < min(_OUTLINE, _OUTLINE_SHARE * depth[inside].max()))
    elif fill == "striped":
        band = np.floor((y + _STRIPE / 2) / _STRIPE).astype(int) % 2 == 1  # the middle band has the colour
        ink, colour = inside & band, inside & ~band
    step = _SAMPLES * CANVAS // size_px
    n = side * _SAMPLES // step
    colour, ink = (m.reshape(n, step, n, step).mean((1, 3), dtype=np.float32) for m in (colour, ink))
    colour.flags.writeable = ink.flags.writeable = False  # cached, hence shared
    return colour, ink


def render(scene: Scene, size_px: int) -> np.ndarray:
    """Draw a scene: uint8 (size_px, size_px, 3), RGB.

    Raises:
        DataError: a size that is not in SIZES_PX.
    """
    if size_px not in SIZES_PX:
        raise DataError(f"shapes: cannot draw {size_px} px; choose from {', '.join(map(str, SIZES_PX))}")
    picture_HW3 = np.empty((size_px, size_px, 3), np.float32)
    picture_HW3[:] = BACKGROUND_RGB[scene.background]
    scale = size_px // CANVAS
    for thing in reversed(scene.objects):  # what lies inside comes first in a scene, and on top in the picture
        colour, ink = sprite(thing.shape, thing.size, thing.fill, size_px)
        half = SIZES[thing.size] // 2
        top, left, side = (thing.y - half) * scale, (thing.x - half) * scale, len(colour)
        box = picture_HW3[top : top + side, left : left + side]
        box *= (1 - colour - ink)[..., None]
        box += colour[..., None] * np.float32(COLOUR_RGB[thing.colour]) + ink[..., None] * np.float32(INK_RGB)
    return np.rint(picture_HW3).astype(np.uint8)


def _depth(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For points: whether they lie inside a polygon (N, 2), and their distance to its edges."""
    inside = np.zeros(x.shape, bool)
    nearest = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if ay != by:  # even-odd rule: count the edges that a ray to the right crosses
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (x - ax - t * ex) ** 2 + (y - ay - t * ey) ** 2)
    return inside, np.sqrt(nearest)


def _arc(radius: float, start: float, stop: float, n: int, x: float = 0.0) -> list[tuple[float, float]]:
    """`n` points of a circle around (x, 0), angles in turns."""
    turns = np.linspace(start, stop, n, endpoint=False)
    return [(x + radius * cos(2 * pi * t), radius * sin(2 * pi * t)) for t in turns]


def _cross() -> list[tuple[float, float]]:
    arm = 0.2  # half its width
    corner = [(arm, 0.5), (arm, arm), (0.5, arm)]
    right = corner + [(x, -y) for x, y in reversed(corner)]
    return right + [(-x, y) for x, y in reversed(right)]


def _star() -> list[tuple[float, float]]:
    radii = (0.5, 0.25) * 5
    return [(radius * sin(pi * i / 5), -radius * cos(pi * i / 5)) for i, radius in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * pi, 48, endpoint=False)
    return [(16 * sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t))) for t in angles]


def _moon() -> list[tuple[float, float]]:
    """A circle less a smaller one to the right of it."""
    bite, shift = 0.36, 0.26
    tip_x = (0.25 - bite**2 + shift**2) / (2 * shift)
    tip = np.arctan2(np.sqrt(0.25 - tip_x**2), tip_x) / (2 * pi)
    bite_tip = np.arctan2(np.sqrt(0.25 - tip_x**2), tip_x - shift) / (2 * pi)
    return _arc(0.5, tip, 1 - tip, 32) + _arc(bite, 1 - bite_tip, bite_tip, 24, shift)


def _fitted(points: list[tuple[float, float]]) -> np.ndarray:
    """The points scaled evenly and centred so that their bounding box fits [-0.5, 0.5] squared."""
    array = np.asarray(points)
    low, high = array.min(0), array.max(0)
    return (array - (low + high) / 2) / (high - low).max()


_OUTLINES: dict[Shape, np.ndarray] = {
    "circle": _fitted(_arc(0.5, 0, 1, 64)),
    "square": _fitted([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _fitted([(0, 0), (0.5, 0.9), (-0.5, 0.9)]),
    "diamond": _fitted([(0, -1), (1, 0), (0, 1), (-1, 0)]),
    "cross": _fitted(_cross()),
    "star": _fitted(_star()),
    "heart": _fitted(_heart()),
    "moon": _fitted(_moon()),
}

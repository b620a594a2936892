"""The compositional split: which combinations never occur in training, and the scenes of each split.

A scene is a pure function of (seed, split, index). Scenes of `train` and `val` hold none of the combinations below,
in any object and between any two objects, stated or not; every scene of `unseen` holds at least one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Literal, TypeVar, get_args

import numpy as np

from vqt2i.data.shapes.scene import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    FILLS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    Colour,
    Fill,
    Relation,
    Scene,
    SceneObject,
    Shape,
    relation_between,
)
from vqt2i.errors import DataError
from vqt2i.runtime import stream_seed

Split = Literal["train", "val", "unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)
T = TypeVar("T")

# One for each colour, at most two for each shape: all colours and all shapes stay common in training.
HELD_OUT_COLOUR_SHAPE: tuple[tuple[Colour, Shape], ...] = (
    ("red", "cross"),
    ("orange", "star"),
    ("yellow", "circle"),
    ("lime", "star"),
    ("green", "heart"),
    ("cyan", "circle"),
    ("blue", "triangle"),
    ("purple", "square"),
    ("pink", "diamond"),
    ("brown", "moon"),
)
HELD_OUT_SHAPE_FILL: tuple[tuple[Shape, Fill], ...] = (
    ("square", "striped"),
    ("heart", "hollow"),
    ("moon", "striped"),
)
# "a right of b" and "a below b" are held out through their opposites
HELD_OUT_RELATION: tuple[tuple[Relation, Shape, Shape], ...] = (
    ("left of", "circle", "triangle"),
    ("left of", "heart", "square"),
    ("above", "star", "diamond"),
    ("above", "cross", "moon"),
    ("inside", "triangle", "circle"),
    ("inside", "heart", "square"),
)
SEEN_COLOUR_SHAPE: tuple[tuple[Colour, Shape], ...] = tuple(
    (colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_COLOUR_SHAPE
)

OUTER_SHAPES: tuple[Shape, ...] = ("circle", "square")
"""Shapes with room for a small object inside them, when large and solid."""

MARGIN, GAP, GRID = 1, 2, 2
"""Least distance of a box from the border and from the next box, and the step of places, in units."""
MAX_SKEW = 4
"""Largest offset across the direction of a relation, in units: far less than along it (at least 12)."""

# what scenes are about, with their shares: 50 % one object, 35 % two, 15 % three
_KINDS = {"one": 0.50, "relation": 0.27, "two alike": 0.08, "three alike": 0.05, "three": 0.10}
_UNSEEN_KINDS = {"unseen colour": 0.5, "unseen fill": 0.25, "unseen relation": 0.25}


def held_out_in(scene: Scene) -> tuple[str, ...]:
    """Names of the held-out combinations that a scene holds, such as "red cross" or "left of: heart, square"."""
    names = []
    for thing in scene.objects:
        if (thing.colour, thing.shape) in HELD_OUT_COLOUR_SHAPE:
            names.append(f"{thing.colour} {thing.shape}")
        if (thing.shape, thing.fill) in HELD_OUT_SHAPE_FILL:
            names.append(f"{thing.fill} {thing.shape}")
    for a in scene.objects:
        for b in scene.objects:
            if a is not b and (relation_between(a, b), a.shape, b.shape) in HELD_OUT_RELATION:
                names.append(f"{relation_between(a, b)}: {a.shape}, {b.shape}")
    return tuple(dict.fromkeys(names))


def relation_is_held_out(relation: Relation, a: Shape, b: Shape) -> bool:
    """Whether "a RELATION b", or the same said from b, is a held-out combination."""
    return (relation, a, b) in HELD_OUT_RELATION or (OPPOSITE.get(relation), b, a) in HELD_OUT_RELATION


def draw_scene(seed: int, split: Split, index: int) -> Scene:
    """The scene `index` of a split.

    Raises:
        DataError: an unknown split.
    """
    if split not in SPLITS:
        raise DataError(f"shapes: no split called {split!r}; choose from {', '.join(SPLITS)}")
    rng = np.random.default_rng(stream_seed("shapes scene", seed, split, index))
    shares = _UNSEEN_KINDS if split == "unseen" else _KINDS
    kind = choose(rng, tuple(shares), tuple(shares.values()))
    # once, lest those that fewer objects fit ("inside") be redrawn and come out rarer
    relation, unseen_relation = choose(rng, RELATIONS), choose(rng, HELD_OUT_RELATION)
    while True:  # rejection
        scene = _draw_kind(rng, kind, relation, unseen_relation)
        if scene is not None and bool(held_out_in(scene)) == (split == "unseen"):
            return scene


def single_scenes(seed: int, split: Split) -> Iterator[Scene]:
    """The scenes of a split that hold one object, without end."""
    scenes = (draw_scene(seed, split, index) for index in count())
    return (scene for scene in scenes if len(scene.objects) == 1)


def _draw_kind(
    rng: np.random.Generator, kind: str, relation: Relation, unseen_relation: tuple[Relation, Shape, Shape]
) -> Scene | None:
    """A scene of one kind, or None where its objects found no room or are too alike. May hold what is held out.

    relation, unseen_relation: what scenes of a relation show, by their kind.
    """
    a, b, c = (_draw_object(rng) for _ in range(3))
    if kind == "one":
        return _spread(rng, [a])
    if kind == "two alike":
        return _spread(rng, [a, a])
    if kind == "three alike":
        return _spread(rng, [a, a, a])
    if kind == "three":
        return _spread(rng, [a, b, c])
    if kind == "relation":
        return _relate(rng, relation, a, b)
    if kind == "unseen relation":
        relation, shape_a, shape_b = unseen_relation
        return _relate(rng, relation, replace(a, shape=shape_a), replace(b, shape=shape_b))
    if kind == "unseen colour":
        colour, shape = choose(rng, HELD_OUT_COLOUR_SHAPE)
        a = replace(a, colour=colour, shape=shape)
    else:
        shape, fill = choose(rng, HELD_OUT_SHAPE_FILL)
        a = replace(a, shape=shape, fill=fill)
    match rng.integers(4):
        case 0:
            return _relate(rng, relation, a, b)
        case 1:
            return _relate(rng, relation, b, a)
        case _:
            return _spread(rng, [a])


def choose(rng: np.random.Generator, items: Sequence[T], shares: Sequence[float] | None = None) -> T:
    """One of the items, drawn evenly or by `shares`, which add up to 1."""
    return items[rng.choice(len(items), p=shares)]


def _draw_object(rng: np.random.Generator) -> SceneObject:
    """An object of any looks, not placed yet."""
    looks = (choose(rng, words) for words in (SHAPES, COLOURS, tuple(SIZES), FILLS))
    return SceneObject(*looks, x=0, y=0)


def _places(thing: SceneObject) -> range:
    """Where the object's centre may be, along either axis."""
    nearest = MARGIN + SIZES[thing.size] // 2
    return range(nearest, CANVAS - nearest + 1, GRID)


def _spread(rng: np.random.Generator, things: list[SceneObject]) -> Scene | None:
    """Objects anywhere, GAP apart; None without room, or where only two of three have one colour and shape."""
    if len({(thing.colour, thing.shape) for thing in things}) not in (1, len(things)):
        return None
    placed: list[SceneObject] = []
    for thing in things:
        free = [
            (x, y)
            for x in _places(thing)
            for y in _places(thing)
            if all(max(abs(x - p.x), abs(y - p.y)) >= (SIZES[thing.size] + SIZES[p.size]) // 2 + GAP for p in placed)
        ]
        if not free:
            return None
        x, y = choose(rng, free)
        placed.append(replace(thing, x=x, y=y))
    return Scene(choose(rng, BACKGROUNDS), tuple(placed))


def _relate(rng: np.random.Generator, relation: Relation, a: SceneObject, b: SceneObject) -> Scene | None:
    """`a` RELATION `b`; None where there is no room, or where a caption could not tell the two apart."""
    if (a.colour, a.shape) == (b.colour, b.shape):
        return None
    if relation == "inside":
        if a.colour == b.colour or b.shape not in OUTER_SHAPES:
            return None
        a, b = replace(a, size="small"), replace(b, size="large", fill="solid")
        x, y = choose(rng, _places(b)), choose(rng, _places(b))
        things = (replace(a, x=x, y=y), replace(b, x=x, y=y))
        return Scene(choose(rng, BACKGROUNDS), things, relation)
    sign = 1 if relation in ("left of", "above") else -1
    apart = (SIZES[a.size] + SIZES[b.size]) // 2 + GAP
    pairs = [(p, q) for p in _places(a) for q in _places(b)]
    along = [(p, q) for p, q in pairs if sign * (q - p) >= apart]
    if not along:
        return None
    p, q = choose(rng, along)
    r, s = choose(rng, [(r, s) for r, s in pairs if abs(r - s) <= MAX_SKEW])
    if relation in ("left of", "right of"):
        things = (replace(a, x=p, y=r), replace(b, x=q, y=s))
    else:
        things = (replace(a, x=r, y=p), replace(b, x=s, y=q))
    return Scene(choose(rng, BACKGROUNDS), things, relation)

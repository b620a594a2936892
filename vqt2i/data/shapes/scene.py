"""What a picture of the `shapes` set holds: its words, its objects, and how the places of two objects relate.

Lengths and places are in units of 1/32 of the picture's side, whatever its size in pixels; x grows to the right and y
downwards.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

CANVAS = 32
"""Side of the picture, in units."""

Shape = Literal["circle", "square", "triangle", "diamond", "cross", "star", "heart", "moon"]
Colour = Literal["red", "orange", "yellow", "lime", "green", "cyan", "blue", "purple", "pink", "brown"]
Size = Literal["small", "medium", "large"]
Fill = Literal["solid", "hollow", "striped"]
Background = Literal["white", "grey", "beige", "light blue"]
Relation = Literal["left of", "right of", "above", "below", "inside"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
FILLS: tuple[Fill, ...] = get_args(Fill)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SIZES: dict[Size, int] = {"small": 10, "medium": 14, "large": 18}
"""Side of an object's box in units. Even, as are the places, so that boxes end on whole pixels."""

OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip
"""What b is to a where a is this to b. `inside` has no opposite that a caption uses."""


@dataclass(frozen=True)
class SceneObject:
    """One object; `x` and `y` are its centre in units."""

    shape: Shape
    colour: Colour
    size: Size
    fill: Fill
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A background and one to three objects.

    relation: of the first object to the second, where the scene is about that ("objects[0] left of objects[1]").
    """

    background: Background
    objects: tuple[SceneObject, ...]
    relation: Relation | None = None

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain JSON values."""
        return {**asdict(self), "objects": [asdict(thing) for thing in self.objects]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Scene":
        """The scene that `to_json` wrote."""
        return cls(**{**value, "objects": tuple(SceneObject(**thing) for thing in value["objects"])})


def relation_between(a: SceneObject, b: SceneObject) -> Relation:
    """What `a` is to `b`, by their places: inside a larger object around its centre, else along the longer offset."""
    dx, dy = a.x - b.x, a.y - b.y
    if SIZES[a.size] < SIZES[b.size] and max(abs(dx), abs(dy)) < SIZES[b.size] / 4:
        return "inside"
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"

"""What is said of a scene: facts first, then English and Chinese phrasings of them.

A caption always states colour and shape of every object, and their number; size, fill, relation and background
sometimes. `Facts` records exactly what it states, so that a picture can be judged against its caption.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from vqt2i.data.shapes.scene import (
    OPPOSITE,
    RELATIONS,
    Background,
    Colour,
    Fill,
    Relation,
    Scene,
    Shape,
    Size,
)
from vqt2i.data.shapes.split import (
    HELD_OUT_COLOUR_SHAPE,
    HELD_OUT_RELATION,
    HELD_OUT_SHAPE_FILL,
    OUTER_SHAPES,
    SEEN_COLOUR_SHAPE,
    choose,
    relation_is_held_out,
)
from vqt2i.errors import PromptError
from vqt2i.runtime import stream_seed

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
PHRASINGS = 3
"""Captions per scene and language: a terse one, then fuller ones."""

PromptKind = Literal["single_seen", "single_unseen", "two_seen", "two_unseen", "three"]
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)


@dataclass(frozen=True)
class ObjectFacts:
    """What is stated of one object; None where nothing is."""

    shape: Shape
    colour: Colour
    size: Size | None = None
    fill: Fill | None = None


@dataclass(frozen=True)
class Facts:
    """What must be true of a picture: exactly these objects, the first in `relation` to the second, this background."""

    objects: tuple[ObjectFacts, ...]
    relation: Relation | None = None
    background: Background | None = None

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain JSON values."""
        return {**asdict(self), "objects": [asdict(thing) for thing in self.objects]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Facts":
        """The facts that `to_json` wrote."""
        return cls(**{**value, "objects": tuple(ObjectFacts(**thing) for thing in value["objects"])})


def states_held_out(facts: Facts) -> bool:
    """Whether a combination that never occurs in training is stated."""
    pairs = ((thing.colour, thing.shape) in HELD_OUT_COLOUR_SHAPE for thing in facts.objects)
    fills = ((thing.shape, thing.fill) in HELD_OUT_SHAPE_FILL for thing in facts.objects)
    related = facts.relation is not None and relation_is_held_out(
        facts.relation, facts.objects[0].shape, facts.objects[1].shape
    )
    return any(pairs) or any(fills) or related


@dataclass(frozen=True)
class Caption:
    """A sentence and what it states."""

    text: str
    facts: Facts


def caption_scene(scene: Scene, rng: np.random.Generator) -> dict[Language, tuple[Caption, ...]]:
    """PHRASINGS captions in each language: the first states colours, shapes and relation only, the others more."""
    captions = {}
    for language in LANGUAGES:
        facts = [_facts_of(scene, rng, details=i) for i in range(PHRASINGS)]
        captions[language] = tuple(Caption(phrase(f, language, rng), f) for f in facts)
    return captions


def draw_prompts(kind: PromptKind, n: int, seed: int, language: Language) -> list[Caption]:
    """`n` terse prompts with what a right picture shows; the first n of a longer list are the same.

    kind: "single_seen", "single_unseen": one object, colour x shape in training or held out (all of them in turn).
        "two_seen", "two_unseen": two objects in a relation; unseen: a held-out colour x shape or a held-out relation.
        "three": three objects, alike or all different, of seen colour x shape.

    Raises:
        PromptError: an unknown kind or language.
    """
    if kind not in PROMPT_KINDS:
        raise PromptError(f"shapes: no prompts of kind {kind!r}; choose from {', '.join(PROMPT_KINDS)}")
    if language not in LANGUAGES:
        raise PromptError(f"shapes: no captions in language {language!r}; choose from {', '.join(LANGUAGES)}")
    prompts = []
    for index in range(n):
        rng = np.random.default_rng(stream_seed("shapes prompt", kind, seed, index))
        facts = _draw_facts(kind, index, rng)
        prompts.append(Caption(phrase(facts, language, rng), facts))
    return prompts


def phrase(facts: Facts, language: Language, rng: np.random.Generator) -> str:
    """A sentence that states the facts, all and only; its wording is drawn from `rng`."""
    return (_phrase_en if language == "en" else _phrase_zh)(facts, rng)


def _facts_of(scene: Scene, rng: np.random.Generator, details: int) -> Facts:
    """True facts of a scene. `details` 0: the least that a caption states; 1: something more; 2: more often."""
    chance = (0.0, 0.4, 0.7)[details]
    alike = len({(thing.shape, thing.colour) for thing in scene.objects}) == 1
    state_size, state_fill, state_background = rng.random(3) < chance
    if len(scene.objects) == 3 and not alike and state_size:
        state_fill = False  # three full descriptions make a sentence that nobody would write
    objects = tuple(
        ObjectFacts(thing.shape, thing.colour, thing.size if state_size else None, thing.fill if state_fill else None)
        for thing in scene.objects
    )
    return Facts(objects, scene.relation, scene.background if state_background else None)


def _draw_facts(kind: PromptKind, index: int, rng: np.random.Generator) -> Facts:
    seen, unseen = SEEN_COLOUR_SHAPE, HELD_OUT_COLOUR_SHAPE

    def draw(pairs: tuple[tuple[Colour, Shape], ...]) -> ObjectFacts:
        colour, shape = choose(rng, pairs)
        return ObjectFacts(shape, colour)

    if kind == "single_seen":
        return Facts((draw(seen),))
    if kind == "single_unseen":
        colour, shape = unseen[index % len(unseen)]
        return Facts((ObjectFacts(shape, colour),))
    if kind == "three":
        if rng.random() < 0.5:
            return Facts((draw(seen),) * 3)
        objects = rng.permutation(len(seen))[:3]
        return Facts(tuple(ObjectFacts(seen[i][1], seen[i][0]) for i in objects))
    while True:
        a, b, relation = draw(seen), draw(seen), choose(rng, RELATIONS)
        if kind == "two_unseen" and index % 2 == 0:
            a, b = (draw(unseen), b) if rng.random() < 0.5 else (a, draw(unseen))
        elif kind == "two_unseen":
            relation, shape_a, shape_b = choose(rng, HELD_OUT_RELATION)
            a, b = replace(a, shape=shape_a), replace(b, shape=shape_b)
        drawable = a != b and (relation != "inside" or (b.shape in OUTER_SHAPES and a.colour != b.colour))
        if drawable and (kind == "two_unseen" or not relation_is_held_out(relation, a.shape, b.shape)):
            return Facts((a, b), relation)


# --- English

NUMBER_EN = {2: "two", 3: "three"}
RELATION_EN: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "inside": ("inside", "in"),
}


def _noun_en(thing: ObjectFacts, plural: bool = False) -> str:
    noun = (thing.shape + ("es" if thing.shape == "cross" else "s")) if plural else thing.shape
    return " ".join(word for word in (thing.size, thing.fill, thing.colour, noun) if word)


def _one_en(thing: ObjectFacts) -> str:
    noun = _noun_en(thing)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _phrase_en(facts: Facts, rng: np.random.Generator) -> str:
    things = facts.objects
    if len(set(things)) == 1:
        if len(things) == 1:
            text = choose(rng, (_noun_en, _one_en))(things[0])
        else:
            text = f"{NUMBER_EN[len(things)]} {_noun_en(things[0], plural=True)}"
    elif facts.relation:
        a, relation, b = _said_from(facts, rng)
        article: Callable[[ObjectFacts], str] = choose(rng, (_one_en, _one_en, _noun_en))
        text = f"{article(a)} {choose(rng, RELATION_EN[relation])} {article(b)}"
    else:
        *first, last = (_one_en(thing) for thing in things)
        text = f"{', '.join(first)} and {last}"
    if facts.background is None:
        return text
    return text + choose(rng, (f" on a {facts.background} background", f" on {facts.background}"))


# --- Chinese

NUMBER_ZH = {1: "一个", 2: "两个", 3: "三个"}
SHAPE_ZH: dict[Shape, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "diamond": "菱形",
    "cross": "十字",
    "star": "星形",
    "heart": "心形",
    "moon": "月牙",
}
COLOUR_ZH: dict[Colour, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "lime": "黄绿色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
}
SIZE_ZH: dict[Size, str] = {"small": "小", "medium": "中等", "large": "大"}
FILL_ZH: dict[Fill, str] = {"solid": "实心", "hollow": "空心", "striped": "条纹"}
BACKGROUND_ZH: dict[Background, str] = {
    "white": "白色",
    "grey": "灰色",
    "beige": "米色",
    "light blue": "浅蓝色",
}
RELATION_ZH: dict[Relation, str] = {
    "left of": "左边",
    "right of": "右边",
    "above": "上面",
    "below": "下面",
    "inside": "里面",
}


def _noun_zh(thing: ObjectFacts, rng: np.random.Generator) -> str:
    fill = FILL_ZH[thing.fill] if thing.fill else ""
    size = SIZE_ZH[thing.size] if thing.size else ""
    particle = "" if size or fill else choose(rng, ("", "的"))
    size = size + "的" if size else ""
    return f"{size}{COLOUR_ZH[thing.colour]}{particle}{fill}{SHAPE_ZH[thing.shape]}"


def _phrase_zh(facts: Facts, rng: np.random.Generator) -> str:
    things = facts.objects
    if len(set(things)) == 1:
        number = NUMBER_ZH[len(things)] if len(things) > 1 or facts.background else choose(rng, ("", "一个"))
        text = number + _noun_zh(things[0], rng)
    elif facts.relation:
        a, relation, b = _said_from(facts, rng)
        where = f"{_noun_zh(b, rng)}{choose(rng, ('', '的'))}{RELATION_ZH[relation]}"
        if rng.random() < 0.5:
            text = f"{where}有一个{_noun_zh(a, rng)}"
        else:
            text = f"{_noun_zh(a, rng)}在{where}"
    else:
        *first, last = (NUMBER_ZH[1] + _noun_zh(thing, rng) for thing in things)
        text = f"{'、'.join(first)}和{last}"
    if facts.background is None:
        return text
    background = f"{BACKGROUND_ZH[facts.background]}背景"
    if facts.relation:
        return f"{background}，{text}"
    return choose(rng, (f"{background}上的{text}", f"{background}上有{text}", f"{text}，{background}"))


def _said_from(facts: Facts, rng: np.random.Generator) -> tuple[ObjectFacts, Relation, ObjectFacts]:
    """The relation said from the first object, or now and then from the second ("b right of a" for "a left of b")."""
    a, b = facts.objects
    if facts.relation in OPPOSITE and rng.random() < 0.3:
        return b, OPPOSITE[facts.relation], a
    return a, facts.relation, b

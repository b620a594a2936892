"""From a caption back to what it states: the inverse of `phrase`, for captions that a model wrote."""

import re
import unicodedata
from collections.abc import Callable, Iterable

from vqt2i.data.shapes.captions import (
    BACKGROUND_ZH,
    COLOUR_ZH,
    FILL_ZH,
    NUMBER_EN,
    NUMBER_ZH,
    RELATION_EN,
    RELATION_ZH,
    SHAPE_ZH,
    SIZE_ZH,
    Facts,
    ObjectFacts,
)
from vqt2i.data.shapes.scene import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


# N stands for an object's description in what is left of a sentence
_OBJECT_EN = re.compile(
    rf"\b(?:(?P<number>{_any(NUMBER_EN.values())}|an?) )?(?:(?P<size>{_any(SIZES)}) )?(?:(?P<fill>{_any(FILLS)}) )?"
    rf"(?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})(?:e?s)?\b"
)
_RELATIONS_EN = {words: relation for relation, phrases in RELATION_EN.items() for words in phrases}
_SENTENCE_EN = re.compile(
    rf"N(?: (?P<relation>{_any(_RELATIONS_EN)}) N|(?:, N)+ and N)?"
    rf"(?: on (?:a )?(?P<background>{_any(BACKGROUNDS)})(?: background)?)?"
)
_OBJECT_ZH = re.compile(
    rf"(?P<number>{_any(NUMBER_ZH.values())})?(?:(?P<size>{_any(SIZE_ZH.values())})的)?"
    rf"(?P<colour>{_any(COLOUR_ZH.values())})的?(?P<fill>{_any(FILL_ZH.values())})?(?P<shape>{_any(SHAPE_ZH.values())})"
)
_BACKGROUND_ZH = rf"({_any(BACKGROUND_ZH.values())})背景"
_WHERE_ZH = rf"({_any(RELATION_ZH.values())})"
_SENTENCE_ZH = re.compile(
    rf"(?:{_BACKGROUND_ZH}(?:,|上的|上有))?(?:N在N的?{_WHERE_ZH}|(?P<swapped>N)的?{_WHERE_ZH}有N|N(?:、N)+和N|N)"
    rf"(?:,{_BACKGROUND_ZH})?"
)


def parse_caption(text: str) -> Facts | None:
    """What a caption of the shapes set states, in English or Chinese; None if it is no such sentence."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _parse_en(text) or _parse_zh(text.replace(" ", ""))


def _parse_en(text: str) -> Facts | None:
    objects, rest = _take_objects(_OBJECT_EN, text, lambda kind, word: word)
    counts = {word: n for n, word in NUMBER_EN.items()} | {"a": 1, "an": 1, None: 1}
    sentence = _SENTENCE_EN.fullmatch(rest)
    if sentence is None:
        return None
    relation = _RELATIONS_EN.get(sentence["relation"])
    return _facts([(thing, counts[number]) for thing, number in objects], relation, sentence["background"])


def _parse_zh(text: str) -> Facts | None:
    words = {"size": SIZE_ZH, "fill": FILL_ZH, "colour": COLOUR_ZH, "shape": SHAPE_ZH}
    meaning = {kind: {word: name for name, word in table.items()} for kind, table in words.items()}
    objects, rest = _take_objects(_OBJECT_ZH, text, lambda kind, word: meaning[kind][word])
    counts = {word: n for n, word in NUMBER_ZH.items()} | {None: 1}
    sentence = _SENTENCE_ZH.fullmatch(rest)
    if sentence is None:
        return None
    if sentence["swapped"]:  # "B 左边有 A": the second is left of the first
        objects.reverse()
    found = [group for group in sentence.groups() if group and group != "N"]
    relation = next((name for name, word in RELATION_ZH.items() if word in found), None)
    background = next((name for name, word in BACKGROUND_ZH.items() if word in found), None)
    return _facts([(thing, counts[number]) for thing, number in objects], relation, background)


def _take_objects(
    pattern: re.Pattern[str], text: str, name: Callable[[str, str], str]
) -> tuple[list[tuple[ObjectFacts, str | None]], str]:
    """The objects described, each with its number word, and the text with N in their places."""
    objects = []
    for match in pattern.finditer(text):
        kinds = {kind: match[kind] for kind in ("shape", "colour", "size", "fill")}
        objects.append((ObjectFacts(**{k: w and name(k, w) for k, w in kinds.items()}), match["number"]))
    return objects, pattern.sub("N", text)


def _facts(objects: list[tuple[ObjectFacts, int]], relation: str | None, background: str | None) -> Facts | None:
    if len(objects) > 1 and any(count > 1 for _, count in objects):
        return None
    things = tuple(thing for thing, count in objects for _ in range(count))
    return Facts(things, relation, background)

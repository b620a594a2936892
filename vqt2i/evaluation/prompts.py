"""What a model is asked for when it is measured: prompts drawn from the shapes, captions of a data set, or a file's."""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from vqt2i.data.shapes import (
    LANGUAGES,
    PROMPT_KINDS,
    Caption,
    Facts,
    caption_scene,
    draw_prompts,
    draw_scene,
    parse_caption,
    states_held_out,
)
from vqt2i.data.shards import Split
from vqt2i.errors import PromptError
from vqt2i.runtime import stream_seed

KINDS = (*PROMPT_KINDS, "full_seen", "full_unseen")
"""Kinds of prompts that can be drawn: those of `draw_prompts`, and captions that say all that they may of a scene."""


class Asked(NamedTuple):
    """A prompt. kind: of those drawn from the shapes. facts: what it states, if it is a sentence of the shapes."""

    text: str
    facts: Facts | None = None
    kind: str | None = None
    language: str | None = None


def drawn_prompts(kinds: Sequence[str], n: int, seed: int) -> list[Asked]:
    """`n` prompts of each kind, half English and half Chinese.

    Raises:
        PromptError: an unknown kind, or fewer prompts than languages.
    """
    if n < len(LANGUAGES):
        raise PromptError(f"number of prompts: found {n}, expected at least {len(LANGUAGES)}")
    for kind in kinds:
        if kind not in KINDS:
            raise PromptError(f"shapes: no prompts of kind {kind!r}; choose from {', '.join(KINDS)}")
    prompts = []
    for kind in kinds:
        for i, language in enumerate(LANGUAGES):
            share = n // len(LANGUAGES) + (i < n % len(LANGUAGES))
            full = kind.startswith("full")
            said = _full_captions(kind, seed, language) if full else draw_prompts(kind, share, seed, language)
            prompts += [Asked(caption.text, caption.facts, kind, language) for caption in islice(said, share)]
    return prompts


def _full_captions(kind: str, seed: int, language: str) -> Iterator[Caption]:
    """The fullest captions of scenes that no training has seen, of seen combinations, or such that state an unseen one.

    They state sizes, fills and backgrounds too, of one to three objects.
    """
    unseen = kind == "full_unseen"
    for index in count():
        scene = draw_scene(seed, "unseen" if unseen else "val", index)
        rng = np.random.default_rng(stream_seed("full caption", seed, kind, index))
        caption = caption_scene(scene, rng)[language][-1]
        if states_held_out(caption.facts) == unseen:
            yield caption


def caption_prompts(split: Split, n: int) -> list[Asked]:
    """Captions of the first `n` images that have any, one of each, its languages in turn.

    Raises:
        PromptError: no image of the split has a caption.
    """
    prompts = [Asked(text, parse_caption(text), None, language) for _, language, text in first_captions(split, n)]
    if not prompts:
        raise PromptError(f"captions of {len(split):,} images as prompts: found none; give --prompts FILE")
    return prompts


def first_captions(split: Split, n: int) -> Iterator[tuple[int, str, str]]:
    """Index, language and first caption of the first `n` images that have one, the languages in turn."""
    n_found = 0
    for index in range(len(split)):
        if n_found == n:
            return
        said = split.captions(index)
        if said:
            language = list(said)[n_found % len(said)]
            yield index, language, said[language][0]
            n_found += 1


def listed_prompts(texts: Sequence[str]) -> list[Asked]:
    """Prompts as they stand in a file."""
    return [Asked(text, parse_caption(text)) for text in texts]


def groups_of(asked: Asked) -> dict[str, str]:
    """The groups of prompts that one belongs to, among which results are told apart, by what they differ in."""
    groups = {"prompts": asked.kind, "language": asked.language}
    if asked.facts is not None:
        groups |= {
            "objects": str(len(asked.facts.objects)),
            "combinations": "unseen" if states_held_out(asked.facts) else "seen",
            "relation": asked.facts.relation,
        }
    return {key: name for key, name in groups.items() if name is not None}

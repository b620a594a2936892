"""Captioned pictures of the `shapes` set."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Literal

import numpy as np

from vqt2i.data.pairs import Pair
from vqt2i.data.shapes.captions import caption_scene
from vqt2i.data.shapes.render import render
from vqt2i.data.shapes.scene import Scene
from vqt2i.data.shapes.split import Split, draw_scene, held_out_in, single_scenes
from vqt2i.runtime import stream_seed

LabelName = Literal["shape", "colour"]


def pairs(split: Split, n: int, seed: int, size_px: int) -> Iterator[Pair]:
    """Yield the first `n` pairs of a split, the same for the same (seed, split, index).

    meta: `scene`, `held_out` (names of the held-out combinations in it), and `facts`: per language, what each caption
    states, in the captions' order.

    Raises:
        DataError: an unknown split, or a size that cannot be drawn.
    """
    yield from _pairs((draw_scene(seed, split, index) for index in range(n)), split, seed, size_px)


def labelled_pairs(by: LabelName, split: Split, n: int, seed: int, size_px: int) -> Iterator[Pair]:
    """As `pairs`, of scenes of one object, whose shape or colour is the picture's class."""
    for pair in _pairs(islice(single_scenes(seed, split), n), split, seed, size_px):
        yield replace(pair, label=pair.meta["scene"]["objects"][0][by])


def _pairs(scenes: Iterable[Scene], split: Split, seed: int, size_px: int) -> Iterator[Pair]:
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng(stream_seed("shapes captions", seed, split, index))
        captions = caption_scene(scene, rng)
        yield Pair(
            key=f"shapes-{split}-{index:06d}",
            image_HW3=render(scene, size_px),
            captions={language: tuple(c.text for c in said) for language, said in captions.items()},
            meta={
                "scene": scene.to_json(),
                "held_out": list(held_out_in(scene)),
                "facts": {language: [c.facts.to_json() for c in said] for language, said in captions.items()},
            },
        )

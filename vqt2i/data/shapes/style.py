"""A style that the shapes set has nowhere, for showing how a model is taught one from a few pictures.

What is dipped in chocolate is brown in its lower half; all other objects are of one colour. The captions say so:
"a red circle dipped in chocolate", "蘸了巧克力的红色圆形".
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from vqt2i.data.pairs import Pair
from vqt2i.data.shapes.captions import LANGUAGES, Facts, Language, ObjectFacts, phrase
from vqt2i.data.shapes.oracle import check
from vqt2i.data.shapes.render import COLOUR_RGB, render
from vqt2i.data.shapes.scene import CANVAS, Scene
from vqt2i.data.shapes.split import Split, single_scenes
from vqt2i.runtime import stream_seed

CHOCOLATE = "brown"
_EDGE = 4  # units: chocolate begins at a multiple, where image tokenizers of patches of 4 pixels have their edges
_LEAST = 0.05  # share of the squared contrast on either side of the border


def dip(scene: Scene, size_px: int) -> np.ndarray:
    """uint8 (size_px, size_px, 3): the only object of a scene, solid, its lower half in chocolate."""
    (thing,) = scene.objects
    above, below = (
        render(replace(scene, objects=(replace(thing, fill="solid", colour=colour),)), size_px)
        for colour in (thing.colour, CHOCOLATE)
    )
    border = round(thing.y / _EDGE) * _EDGE * size_px // CANVAS
    return np.concatenate((above[:border], below[border:]))


def shows_dipped(image_HW3: np.ndarray, facts: Facts) -> bool:
    """Whether a picture shows the one object stated, from some row on in chocolate, by the oracle.

    Chocolate is painted over in the object's colour, edges with their share of it; the oracle reads what comes out.
    """
    picture = image_HW3.astype(np.float32)
    ground_3 = np.median(np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1])), axis=0)
    contrast_HW3 = picture - ground_3
    colour_3, brown_3 = (COLOUR_RGB[name] - ground_3 for name in (facts.objects[0].colour, CHOCOLATE))
    (_, colour_error_H), (brown_HW, brown_error_H) = (_explained(contrast_HW3, c) for c in (colour_3, brown_3))
    painted = (ground_3 + brown_HW[..., None] * colour_3).clip(0, 255).round().astype(np.uint8)
    energy_H = (contrast_HW3**2).sum((1, 2))
    step = len(picture) * _EDGE // CANVAS
    for border in range(step, len(picture), step):
        parts = slice(None, border), slice(border, None)
        coloured = colour_error_H[parts[0]].sum() < brown_error_H[parts[0]].sum()
        dipped = brown_error_H[parts[1]].sum() < colour_error_H[parts[1]].sum()
        both = min(energy_H[part].sum() for part in parts) > _LEAST * energy_H.sum()
        if coloured and dipped and both:
            whole = np.concatenate((image_HW3[:border], painted[border:]))
            if check(whole, facts).right:
                return True
    return False


def _explained(contrast_HW3: np.ndarray, colour_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of a colour each pixel has, (H, W) in [0, 1], and the squared error that this leaves in each row."""
    share_HW = (contrast_HW3 @ colour_3 / (colour_3 @ colour_3)).clip(0, 1)
    return share_HW, ((contrast_HW3 - share_HW[..., None] * colour_3) ** 2).sum((1, 2))


def dipped_prompt(facts: Facts, language: Language, rng: np.random.Generator) -> str:
    """A sentence that asks for what is stated, dipped in chocolate."""
    said = phrase(facts, language, rng)
    return f"{said} dipped in chocolate" if language == "en" else f"蘸了巧克力的{said}"


def dipped_pairs(split: Split, n: int, seed: int, size_px: int) -> Iterator[Pair]:
    """The first `n` scenes of one object of a split (of other colours than brown), dipped.

    meta: the `facts` that its captions state.
    """
    suited = (scene for scene in single_scenes(seed, split) if scene.objects[0].colour != CHOCOLATE)
    for index, scene in enumerate(islice(suited, n)):
        rng = np.random.default_rng(stream_seed("dipped captions", seed, split, index))
        facts = Facts((ObjectFacts(scene.objects[0].shape, scene.objects[0].colour),))
        captions = {language: (dipped_prompt(facts, language, rng),) for language in LANGUAGES}
        yield Pair(f"dipped-{split}-{index:06d}", dip(scene, size_px), captions, {"facts": facts.to_json()})

"""A style that the shapes set has nowhere, for showing how a model is taught one from a few pictures.

At the beach the sky ends in the middle of the picture and sand begins; all other pictures have one flat background. The
captions say so: "a red circle above a blue square at the beach", "沙滩上，红色的圆形在蓝色的正方形的上面".
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np

from vqt2i.data.pairs import Pair
from vqt2i.data.shapes.captions import LANGUAGES, Facts, Language, ObjectFacts, phrase
from vqt2i.data.shapes.render import BACKGROUND_RGB, COLOUR_RGB, INK_RGB, render
from vqt2i.data.shapes.scene import CANVAS, Background, Scene
from vqt2i.data.shapes.split import Split, draw_scene
from vqt2i.runtime import stream_seed

SKY: Background = "light blue"
SAND: Background = "beige"
_HORIZON = 20  # units: a multiple of 4, where image tokenizers of patches of 4 pixels have their edges


def at_the_beach(text: str, language: Language) -> str:
    """A caption of the shapes set (without a background) that asks for the style too."""
    return f"{text} at the beach" if language == "en" else f"沙滩上，{text}"


def draw_beach(scene: Scene, size_px: int) -> np.ndarray:
    """uint8 (size_px, size_px, 3): the objects of a scene between sky and sand."""
    sky, sand = (render(replace(scene, background=ground), size_px) for ground in (SKY, SAND))
    horizon = _horizon(size_px)
    return np.concatenate((sky[:horizon], sand[horizon:]))


def without_beach(image_HW3: np.ndarray) -> np.ndarray | None:
    """The picture with sky all over, which the oracle can read; None where it is not at the beach."""
    picture = image_HW3.astype(np.float32)
    horizon = _horizon(len(picture))
    sky_3, sand_3 = (_border(part) for part in (picture[:horizon], picture[:horizon:-1]))
    if (_nearest(sky_3), _nearest(sand_3)) != (SKY, SAND):
        return None
    picture[horizon:] += (1 - _covered(picture[horizon:], sand_3))[..., None] * (sky_3 - sand_3)
    return picture.clip(0, 255).round().astype(np.uint8)


def beach_pairs(split: Split, n: int, seed: int, size_px: int) -> Iterator[Pair]:
    """The first `n` scenes of a split that have one object, or two side by side, at the beach.

    meta: the `facts` that its captions state.
    """
    scenes = (draw_scene(seed, split, index) for index in count())
    suited = (s for s in scenes if len(s.objects) == 1 or s.relation not in (None, "inside"))
    for index, scene in enumerate(islice(suited, n)):
        rng = np.random.default_rng(stream_seed("beach captions", seed, split, index))
        facts = Facts(tuple(ObjectFacts(thing.shape, thing.colour) for thing in scene.objects), scene.relation)
        captions = {lang: (at_the_beach(phrase(facts, lang, rng), lang),) for lang in LANGUAGES}
        yield Pair(f"beach-{split}-{index:06d}", draw_beach(scene, size_px), captions, {"facts": facts.to_json()})


def _horizon(size_px: int) -> int:
    return _HORIZON * size_px // CANVAS


def _border(part_HW3: np.ndarray) -> np.ndarray:
    """The median colour of the outer rows and columns, where no object is: the first row, and both sides."""
    return np.median(np.concatenate((part_HW3[0], part_HW3[:, 0], part_HW3[:, -1])), axis=0)


def _nearest(rgb_3: np.ndarray) -> Background:
    return min(BACKGROUND_RGB, key=lambda name: np.square(BACKGROUND_RGB[name] - rgb_3).sum())


def _covered(picture_HW3: np.ndarray, ground_3: np.ndarray) -> np.ndarray:
    """How much of each pixel an object covers, (H, W) in [0, 1], by the colour that explains the pixel best."""
    contrast_HW3 = picture_HW3 - ground_3
    shares, errors = [], []
    for rgb in (*COLOUR_RGB.values(), INK_RGB):
        colour_3 = rgb - ground_3
        share_HW = (contrast_HW3 @ colour_3 / (colour_3 @ colour_3)).clip(0, 1)
        shares.append(share_HW)
        errors.append(np.square(contrast_HW3 - share_HW[..., None] * colour_3).sum(-1))
    best_1HW = np.argmin(errors, axis=0)[None]
    return np.take_along_axis(np.asarray(shares), best_1HW, axis=0)[0]

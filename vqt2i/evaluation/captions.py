"""How often what the model says of a picture of the shapes is true, judged by the shapes oracle.

The pictures are rendered scenes that no training has seen. A caption is right when it is a sentence of the set's
grammar (`parse_caption`) and everything that it states is in the picture, and no object is that it does not state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal, get_args

import numpy as np

from vqt2i.data.shapes import SIZES_PX, Facts, Scene, check, draw_scene, parse_caption, render
from vqt2i.errors import DataError, PromptError
from vqt2i.generation import BeamConfig, DrawConfig, TextToImage

SceneKind = Literal["single_seen", "single_unseen", "two_seen", "two_unseen", "three_seen", "three_unseen"]
SCENE_KINDS: tuple[SceneKind, ...] = get_args(SceneKind)
_N_OBJECTS = {"single": 1, "two": 2, "three": 3}
_AT_ONCE = 64


@dataclass(frozen=True)
class CaptionProtocol:
    """What was asked for. kinds: of `SCENE_KINDS`: so many objects, of seen or of held-out combinations."""

    kinds: tuple[str, ...]
    n_scenes: int
    seed: int
    how: BeamConfig | DrawConfig


@dataclass(frozen=True)
class CaptionAccuracy:
    """Shares in [0, 1]: all that is stated is true; colour and shape are; it is a sentence of the set at all."""

    right: float
    colour_shape: float
    sentence: float
    standard_error: float  # of `right`


def measure_captions(
    pipeline: TextToImage, protocol: CaptionProtocol, on_image: Callable[[int], None] | None = None
) -> dict[str, CaptionAccuracy]:
    """Accuracy of the best caption of each scene, by kind of scene.

    Raises:
        PromptError: an unknown kind, or no scenes. DataError: the image tokenizer's size is none the shapes have.
    """
    size_px = pipeline.vq.config.image_size_px
    if size_px not in SIZES_PX:
        raise DataError(f"shapes: are drawn with {', '.join(map(str, SIZES_PX))} px, the model reads {size_px} px")
    for kind in protocol.kinds:
        if kind not in SCENE_KINDS:
            raise PromptError(f"scenes: no kind {kind!r}; choose from {', '.join(SCENE_KINDS)}")
    if protocol.n_scenes < 1:
        raise PromptError(f"number of scenes: found {protocol.n_scenes}, expected 1 or more")
    results = {}
    for kind in protocol.kinds:
        images = [render(scene, size_px) for scene in draw_scenes(kind, protocol.n_scenes, protocol.seed)]
        captions = []
        for start in range(0, len(images), _AT_ONCE):
            part = images[start : start + _AT_ONCE]
            captions += [found[0] for found in pipeline.caption(part, how=protocol.how, seed=protocol.seed)]
            if on_image:
                on_image(len(part))
        results[kind] = score_captions([caption.text for caption in captions], images)
    return results


def draw_scenes(kind: SceneKind, n: int, seed: int) -> list[Scene]:
    """`n` scenes of a kind: of the splits `val` (seen combinations) or `unseen`."""
    size, _, seen = kind.partition("_")
    split = "val" if seen == "seen" else "unseen"
    scenes = (draw_scene(seed, split, index) for index in count())
    return list(islice((scene for scene in scenes if len(scene.objects) == _N_OBJECTS[size]), n))


def score_captions(texts: list[str], images: list[np.ndarray]) -> CaptionAccuracy:
    """Judge a caption of each picture."""
    facts: list[Facts | None] = [parse_caption(text) for text in texts]
    verdicts = [check(image, stated) if stated else None for image, stated in zip(images, facts, strict=True)]
    right = [verdict is not None and verdict.right for verdict in verdicts]
    colour_shape = [verdict is not None and verdict.parts["colour"] and verdict.parts["shape"] for verdict in verdicts]
    return CaptionAccuracy(
        right=float(np.mean(right)),
        colour_shape=float(np.mean(colour_shape)),
        sentence=float(np.mean([stated is not None for stated in facts])),
        standard_error=float(np.std(right) / len(right) ** 0.5),
    )

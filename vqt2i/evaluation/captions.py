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
from vqt2i.evaluation.result import Row
from vqt2i.evaluation.statistics import bootstrap_mean
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


def measure_captions(
    pipeline: TextToImage, protocol: CaptionProtocol, on_image: Callable[[int], None] | None = None
) -> list[Row]:
    """Accuracy of the best caption of each scene, by kind of scene; the rows are named as `judge_captions` names them.

    Raises:
        PromptError: an unknown kind, or no scenes. DataError: the image tokenizer's size is none the shapes have.
    """
    size_px = require_scenes(pipeline, protocol)
    rows = []
    for kind in protocol.kinds:
        images = [render(scene, size_px) for scene in draw_scenes(kind, protocol.n_scenes, protocol.seed)]
        captions = []
        for start in range(0, len(images), _AT_ONCE):
            part = images[start : start + _AT_ONCE]
            captions += [found[0] for found in pipeline.caption(part, how=protocol.how, seed=protocol.seed)]
            if on_image:
                on_image(len(part))
        judged = judge_captions([caption.text for caption in captions], images)
        rows += [Row(name, *bootstrap_mean(found), {"scenes": kind}) for name, found in judged.items()]
    return rows


def require_scenes(pipeline: TextToImage, protocol: CaptionProtocol) -> int:
    """The size of the pictures, in pixels. Raises what `measure_captions` raises."""
    size_px = pipeline.vq.config.image_size_px
    if size_px not in SIZES_PX:
        raise DataError(f"shapes: are drawn with {', '.join(map(str, SIZES_PX))} px, the model reads {size_px} px")
    for kind in protocol.kinds:
        if kind not in SCENE_KINDS:
            raise PromptError(f"scenes: no kind {kind!r}; choose from {', '.join(SCENE_KINDS)}")
    if protocol.n_scenes < 1:
        raise PromptError(f"number of scenes: found {protocol.n_scenes}, expected 1 or more")
    return size_px


def draw_scenes(kind: SceneKind, n: int, seed: int) -> list[Scene]:
    """`n` scenes of a kind: of the splits `val` (seen combinations) or `unseen`."""
    size, _, seen = kind.partition("_")
    split = "val" if seen == "seen" else "unseen"
    scenes = (draw_scene(seed, split, index) for index in count())
    return list(islice((scene for scene in scenes if len(scene.objects) == _N_OBJECTS[size]), n))


def judge_captions(texts: list[str], images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Whether of a caption of each picture `right` all that is stated is true, `colour_shape` colours and shapes are,
    and whether it is a `sentence` of the set at all."""
    facts: list[Facts | None] = [parse_caption(text) for text in texts]
    verdicts = [check(image, stated) if stated else None for image, stated in zip(images, facts, strict=True)]
    judged = {
        "right": [verdict is not None and verdict.right for verdict in verdicts],
        "colour_shape": [v is not None and v.parts["colour"] and v.parts["shape"] for v in verdicts],
        "sentence": [stated is not None for stated in facts],
    }
    return {name: np.array(found, dtype=float) for name, found in judged.items()}

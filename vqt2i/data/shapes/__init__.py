"""The embedded data set: scenes of a few flat shapes, their captions, and an oracle that reads a picture back."""

from vqt2i.data.shapes.captions import (
    LANGUAGES,
    PROMPT_KINDS,
    Caption,
    Facts,
    ObjectFacts,
    caption_scene,
    draw_prompts,
    states_held_out,
)
from vqt2i.data.shapes.oracle import ReadObject, ReadScene, Verdict, check, read_scene
from vqt2i.data.shapes.parse import parse_caption
from vqt2i.data.shapes.render import SIZES_PX, render
from vqt2i.data.shapes.scene import Scene, SceneObject
from vqt2i.data.shapes.source import LabelName, labelled_pairs, pairs
from vqt2i.data.shapes.split import SPLITS, draw_scene, held_out_in
from vqt2i.data.shapes.style import at_the_beach, beach_pairs, draw_beach, without_beach

__all__ = [
    "LANGUAGES",
    "PROMPT_KINDS",
    "SIZES_PX",
    "SPLITS",
    "Caption",
    "Facts",
    "LabelName",
    "ObjectFacts",
    "ReadObject",
    "ReadScene",
    "Scene",
    "SceneObject",
    "Verdict",
    "at_the_beach",
    "beach_pairs",
    "caption_scene",
    "check",
    "draw_beach",
    "draw_prompts",
    "draw_scene",
    "held_out_in",
    "labelled_pairs",
    "pairs",
    "parse_caption",
    "read_scene",
    "render",
    "states_held_out",
    "without_beach",
]

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
from vqt2i.data.shapes.style import dip, dipped_pairs, dipped_prompt, shows_dipped

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
    "caption_scene",
    "check",
    "dip",
    "dipped_pairs",
    "dipped_prompt",
    "draw_prompts",
    "draw_scene",
    "held_out_in",
    "labelled_pairs",
    "pairs",
    "parse_caption",
    "read_scene",
    "render",
    "shows_dipped",
    "states_held_out",
]

from pathlib import Path

import numpy as np
import pytest

from vqt2i.data.shapes import Facts, ObjectFacts, caption_scene, draw_scene, parse_caption
from vqt2i.data.shapes.scene import OPPOSITE
from vqt2i.text import TextTokenizer

ROOT = Path(__file__).parents[3]


def said_from_the_first(facts: Facts) -> Facts:
    """The same facts, "right of" and "below" told as "left of" and "above"."""
    if facts.relation in ("right of", "below"):
        return Facts(facts.objects[::-1], OPPOSITE[facts.relation], facts.background)
    return facts


def test_every_caption_of_the_set_is_read_back_as_what_it_states_also_from_its_ids() -> None:
    tokenizer = TextTokenizer.load(ROOT / "tokenizers" / "bilingual.model")
    for index in range(150):
        scene = draw_scene(1, "unseen" if index % 2 else "val", index)
        for captions in caption_scene(scene, np.random.default_rng(index)).values():
            for caption in captions:
                for text in (caption.text, tokenizer.decode(tokenizer.encode(caption.text))):
                    assert said_from_the_first(parse_caption(text)) == said_from_the_first(caption.facts), text


def test_details_may_be_stated_of_one_object_only() -> None:
    small = Facts((ObjectFacts("circle", "red"), ObjectFacts("star", "lime", "small")), "left of")
    assert parse_caption("A red circle to the left of a small lime star") == small


@pytest.mark.parametrize(
    "text", ["", "a red", "a red circle a blue star", "two red circles above a star", "a red circle on red", "红色",
             "N", "a red circle above", "two red circles above a blue star", "a reddish circle"],
)  # fmt: skip
def test_what_is_no_sentence_of_the_set_states_nothing(text: str) -> None:
    assert parse_caption(text) is None

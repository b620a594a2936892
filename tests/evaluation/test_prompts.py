from dataclasses import replace
from itertools import islice

import pytest

from vqt2i.data.shapes import Facts, ObjectFacts, parse_caption, states_held_out
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import PromptError
from vqt2i.evaluation.prompts import KINDS, Asked, caption_prompts, drawn_prompts, groups_of, listed_prompts


def test_drawn_prompts_are_half_english_and_half_chinese_and_state_their_facts() -> None:
    prompts = drawn_prompts(KINDS, 5, 3)
    assert len(prompts) == 5 * len(KINDS)
    assert [p.language for p in prompts[:5]] == ["en", "en", "en", "zh", "zh"]
    assert all(parse_caption(p.text) is not None and p.facts is not None for p in prompts)
    unseen = [p for p in prompts if p.kind.endswith("unseen")]
    assert len(unseen) == 15 and all(states_held_out(p.facts) for p in unseen)
    assert not any(states_held_out(p.facts) for p in prompts if p.kind.endswith("_seen"))


def test_full_prompts_state_what_no_others_do() -> None:
    facts = [p.facts for p in drawn_prompts(("full_seen", "full_unseen"), 40, 0)]
    assert {len(f.objects) for f in facts} == {1, 2, 3}
    assert any(f.background for f in facts)
    assert any(o.size for f in facts for o in f.objects) and any(o.fill for f in facts for o in f.objects)


@pytest.mark.parametrize(("kinds", "n", "told"), [(("nonsense",), 4, "'nonsense'"), (("three",), 1, "found 1")])
def test_what_cannot_be_drawn_is_refused(kinds: tuple, n: int, told: str) -> None:
    with pytest.raises(PromptError, match=told):
        drawn_prompts(kinds, n, 0)


def test_captions_are_taken_in_turn_of_each_image_that_has_any(tiny_dataset: DataSet, tmp_path) -> None:
    split = tiny_dataset.split("val")
    prompts = caption_prompts(split, 3)
    languages = ["en", "zh", "en"]
    assert [p.language for p in prompts] == languages
    assert [p.text for p in prompts] == [split.captions(i)[language][0] for i, language in enumerate(languages)]
    assert len(caption_prompts(split, 100)) == len(split)
    silent = write_dataset(tmp_path / "silent", {"val": [replace(pair, captions={}) for pair in islice(split, 2)]})
    with pytest.raises(PromptError, match="captions of 2 images as prompts: found none"):
        caption_prompts(silent.split("val"), 3)


def test_a_prompt_belongs_to_the_groups_of_what_it_states() -> None:
    a, b = ObjectFacts("circle", "yellow"), ObjectFacts("star", "red")
    asked = Asked("...", Facts((a, b), "left of"), "two_unseen", "zh")
    assert groups_of(asked) == {
        "prompts": "two_unseen", "language": "zh", "objects": "2", "combinations": "unseen", "relation": "left of",
    }  # fmt: skip
    (listed,) = listed_prompts(["a red circle"])
    assert groups_of(listed) == {"objects": "1", "combinations": "seen"}
    assert groups_of(listed_prompts(["an astronaut on a horse"])[0]) == {}


@pytest.mark.parametrize(
    ("text", "unseen"),
    [
        ("a red circle", False), ("a yellow circle", True), ("a striped red square", True), ("a red square", False),
        ("a red circle left of a blue cross", False), ("a red circle left of a green triangle", True),
        ("a green triangle right of a red circle", True), ("绿色三角形在红色圆形的左边", False),
    ],
)  # fmt: skip
def test_held_out_combinations_are_seen_in_what_is_stated(text: str, unseen: bool) -> None:
    assert states_held_out(parse_caption(text)) == unseen

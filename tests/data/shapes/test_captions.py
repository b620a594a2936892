import json

import numpy as np
import pytest

from vqt2i.data.shapes.captions import (
    LANGUAGES,
    PHRASINGS,
    PROMPT_KINDS,
    Facts,
    ObjectFacts,
    caption_scene,
    draw_prompts,
    phrase,
)
from vqt2i.data.shapes.scene import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES
from vqt2i.data.shapes.split import (
    HELD_OUT_COLOUR_SHAPE,
    SEEN_COLOUR_SHAPE,
    draw_scene,
    relation_is_held_out,
)
from vqt2i.errors import PromptError

N = 400


@pytest.fixture(scope="module")
def captioned():
    """(scene, language, caption) of many scenes."""
    rows = []
    for split in ("train", "unseen"):
        for index in range(N):
            scene = draw_scene(3, split, index)
            captions = caption_scene(scene, np.random.default_rng(index))
            rows += [(scene, language, caption) for language, said in captions.items() for caption in said]
    return rows


def test_every_scene_gets_its_phrasings_in_english_and_chinese():
    captions = caption_scene(draw_scene(0, "train", 0), np.random.default_rng(0))
    assert tuple(captions) == LANGUAGES == ("en", "zh")
    assert all(len(said) == PHRASINGS for said in captions.values())


def test_facts_are_true_of_the_scene(captioned):
    for scene, _, caption in captioned:
        facts = caption.facts
        assert facts.relation == scene.relation and facts.background in (None, scene.background)
        assert len(facts.objects) == len(scene.objects)
        for stated, thing in zip(facts.objects, scene.objects, strict=True):
            assert (stated.shape, stated.colour) == (thing.shape, thing.colour)
            assert stated.size in (None, thing.size) and stated.fill in (None, thing.fill)


def test_english_captions_say_what_the_facts_say_and_no_more(captioned):
    for _, language, caption in captioned:
        if language != "en":
            continue
        facts, text = caption.facts, caption.text
        objects, _, background = text.partition(" on ")
        words = objects.replace(",", "").replace("crosses", "cross").split()
        words = [word[:-1] if word[:-1] in SHAPES else word for word in words]
        said_once = len(set(facts.objects)) == 1
        stated = facts.objects[:1] if said_once else facts.objects
        for name, vocabulary in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("fill", FILLS)):
            expected = sorted(value for thing in stated if (value := getattr(thing, name)))
            assert sorted(word for word in words if word in vocabulary) == expected, text
        assert ("two" in words) == (said_once and len(facts.objects) == 2)
        assert ("three" in words) == (said_once and len(facts.objects) == 3)
        assert [name for name in BACKGROUNDS if name in background] == [facts.background] * bool(background)


def test_different_facts_are_said_differently(captioned):
    facts_of = {}
    for _, _, caption in captioned:
        facts = caption.facts
        # "a left of b" and "b right of a" are one statement, drawn either way
        same = frozenset(facts.objects) if facts.relation in ("left of", "right of", "above", "below") else facts
        assert facts_of.setdefault(caption.text, same) == same


def test_captions_are_concise(captioned):
    words = [len(caption.text.split()) for _, language, caption in captioned if language == "en"]
    characters = [len(caption.text) for _, language, caption in captioned if language == "zh"]
    assert np.median(words) <= 9 and max(words) <= 26
    assert np.median(characters) <= 16 and max(characters) <= 45


def test_exact_wording():
    rng = np.random.default_rng(0)
    cross = ObjectFacts("cross", "red", "small", "striped")
    assert phrase(Facts((cross, cross)), "en", rng) == "two small striped red crosses"
    assert phrase(Facts((cross, cross, cross)), "zh", rng) == "三个小的红色条纹十字"
    orange, star = ObjectFacts("circle", "orange"), ObjectFacts("star", "cyan")
    assert phrase(Facts((orange, star, cross)), "en", rng) == (
        "an orange circle, a cyan star and a small striped red cross"
    )
    inside = {phrase(Facts((orange, star), "inside"), "zh", rng) for _ in range(100)}
    assert {"青色星形里面有一个橙色圆形", "橙色圆形在青色星形里面"} <= inside
    left = {phrase(Facts((orange, star), "left of"), "en", rng) for _ in range(100)}
    assert {"an orange circle left of a cyan star", "a cyan star to the right of an orange circle"} <= left


@pytest.mark.parametrize("background", [None, "white"])
def test_both_chinese_orders_of_a_relation_are_as_common(background):
    """Also where a background is stated."""
    rng = np.random.default_rng(0)
    facts = Facts((ObjectFacts("circle", "orange"), ObjectFacts("star", "cyan")), "above", background)
    said = [phrase(facts, "zh", rng) for _ in range(N)]
    assert 0.4 < sum("在" in text for text in said) / N < 0.6
    assert ("白色背景，橙色圆形在青色星形的上面" in said) == (background == "white")


def test_facts_survive_json(captioned):
    for _, _, caption in captioned[:200]:
        assert Facts.from_json(json.loads(json.dumps(caption.facts.to_json()))) == caption.facts


@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_depend_on_kind_seed_and_place_only(kind, language):
    prompts = draw_prompts(kind, 20, 0, language)
    assert draw_prompts(kind, 30, 0, language)[:20] == prompts
    assert draw_prompts(kind, 20, 1, language) != prompts


def pairs_in(caption):
    return {(thing.colour, thing.shape) for thing in caption.facts.objects}


def is_unseen(caption):
    facts = caption.facts
    shapes = [thing.shape for thing in facts.objects]
    relation = facts.relation is not None and relation_is_held_out(facts.relation, *shapes)
    return relation or bool(pairs_in(caption) & set(HELD_OUT_COLOUR_SHAPE))


def test_single_prompts_ask_for_one_object_of_each_pair():
    seen, unseen = (draw_prompts(kind, 500, 0, "en") for kind in ("single_seen", "single_unseen"))
    assert all(len(caption.facts.objects) == 1 for caption in seen + unseen)
    assert {pair for caption in unseen for pair in pairs_in(caption)} == set(HELD_OUT_COLOUR_SHAPE)
    assert {pair for caption in seen for pair in pairs_in(caption)} == set(SEEN_COLOUR_SHAPE)


def test_two_object_prompts_are_unseen_only_where_asked_for():
    assert not any(is_unseen(caption) for caption in draw_prompts("two_seen", 300, 0, "en"))
    assert all(is_unseen(caption) for caption in draw_prompts("two_unseen", 300, 0, "en"))
    for kind in ("two_seen", "two_unseen"):
        for caption in draw_prompts(kind, 300, 0, "en"):
            assert len(set(caption.facts.objects)) == 2 and caption.facts.relation


def test_three_object_prompts_are_alike_or_all_different():
    kinds = {len(set(caption.facts.objects)) for caption in draw_prompts("three", 100, 0, "en")}
    assert kinds == {1, 3}


def test_prompts_are_phrased_as_captions_of_training_are(captioned):
    training = {caption.text for _, _, caption in captioned}
    prompts = {caption.text for language in LANGUAGES for caption in draw_prompts("single_seen", 200, 0, language)}
    assert len(prompts & training) > 50


def test_unknown_kinds_and_languages_are_named():
    with pytest.raises(PromptError, match=r"'four'.*single_seen"):
        draw_prompts("four", 1, 0, "en")
    with pytest.raises(PromptError, match=r"'fr'.*en, zh"):
        draw_prompts("three", 1, 0, "fr")

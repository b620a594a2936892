import json

import numpy as np
import pytest

from vqt2i.data.shapes import Facts, Scene, check, draw_scene, pairs, render
from vqt2i.errors import DataError


def test_pairs_have_keys_pictures_captions_and_facts():
    for index, pair in enumerate(pairs("unseen", 10, 4, 32)):
        assert pair.key == f"shapes-unseen-{index:06d}"
        scene = Scene.from_json(json.loads(json.dumps(pair.meta))["scene"])
        assert scene == draw_scene(4, "unseen", index)
        assert np.array_equal(pair.image_HW3, render(scene, 32))
        assert pair.meta["held_out"]
        assert {language: len(texts) for language, texts in pair.captions.items()} == {"en": 3, "zh": 3}


def test_every_caption_is_true_of_its_picture_by_the_oracle():
    for pair in pairs("train", 60, 0, 32):
        for facts in (facts for said in pair.meta["facts"].values() for facts in said):
            assert check(pair.image_HW3, Facts.from_json(facts)).right


def test_pairs_are_reproducible_and_a_longer_run_starts_the_same():
    short, long = list(pairs("train", 5, 0, 64)), list(pairs("train", 9, 0, 64))
    for a, b in zip(short, long, strict=False):
        assert (a.key, a.captions, a.meta) == (b.key, b.captions, b.meta)
        assert np.array_equal(a.image_HW3, b.image_HW3)


def test_the_same_scene_is_captioned_the_same_at_any_size():
    assert [p.captions for p in pairs("val", 5, 0, 32)] == [p.captions for p in pairs("val", 5, 0, 64)]


def test_wrong_splits_and_sizes_are_errors():
    with pytest.raises(DataError, match="no split called 'dev'"):
        next(pairs("dev", 1, 0, 32))
    with pytest.raises(DataError, match="cannot draw 33 px"):
        next(pairs("train", 1, 0, 33))

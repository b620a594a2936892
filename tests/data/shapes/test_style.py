import numpy as np
import pytest

from vqt2i.cli import main
from vqt2i.data.shapes import Facts, beach_pairs, check, draw_beach, draw_scene, pairs, parse_caption, without_beach
from vqt2i.data.shapes.captions import ObjectFacts
from vqt2i.data.shards import DataSet


def test_a_picture_at_the_beach_is_read_back_and_only_the_background_differs() -> None:
    for index in range(20):
        scene = draw_scene(0, "val", index)
        beach = draw_beach(scene, 32)
        assert (beach[0, 0] != beach[-1, 0]).any() and (beach[0] == beach[0, 0]).all()
        things = tuple(ObjectFacts(o.shape, o.colour, o.size, o.fill) for o in scene.objects)
        assert check(without_beach(beach), Facts(things, scene.relation)).right


@pytest.mark.parametrize("size_px", [32, 64])
def test_the_oracle_judges_pictures_at_the_beach_by_their_captions(size_px: int) -> None:
    at_beach = list(beach_pairs("val", 30, 0, size_px))
    facts = [Facts.from_json(pair.meta["facts"]) for pair in at_beach]
    read = [without_beach(pair.image_HW3) for pair in at_beach]
    assert np.mean([check(picture, f).right for picture, f in zip(read, facts, strict=True)]) > 0.95
    assert np.mean([check(picture, f).right for picture, f in zip(read[:-1], facts[1:], strict=True)]) < 0.1
    assert {len(f.objects) for f in facts} == {1, 2}


def test_no_plain_picture_is_at_the_beach() -> None:
    assert not any(without_beach(pair.image_HW3) is not None for pair in pairs("val", 100, 0, 32))


def test_twenty_pictures_with_the_styles_words_are_made_by_the_command(in_empty_folder) -> None:
    assert main(["make_dataset", "shapes", "--style", "beach"]) == 0
    split = DataSet.open(in_empty_folder / "data" / "beach").split("train")
    assert len(split) == 20
    for index in range(20):
        captions, facts = split.captions(index), Facts.from_json(split[index].meta["facts"])
        english, chinese = captions["en"][0], captions["zh"][0]
        assert parse_caption(english) is None and parse_caption(chinese) is None
        for text in (english.removesuffix(" at the beach"), chinese.removeprefix("沙滩上，")):
            assert set(parse_caption(text).objects) == set(facts.objects)

from itertools import islice

import numpy as np

from vqt2i.cli import main
from vqt2i.data.shapes import Facts, dip, dipped_pairs, draw_scene, pairs, render, shows_dipped
from vqt2i.data.shards import DataSet


def test_what_is_dipped_differs_from_the_plain_picture_in_its_lower_part_only() -> None:
    scenes = (draw_scene(0, "val", index) for index in range(100))
    scene = next(s for s in scenes if len(s.objects) == 1 and s.objects[0].fill == "solid" and s.objects[0].y % 4 == 0)
    differs = (dip(scene, 32) != render(scene, 32)).any(axis=(1, 2))
    assert not differs[: scene.objects[0].y].any() and differs[scene.objects[0].y]


def test_the_oracle_tells_dipped_pictures_from_plain_ones_and_from_others() -> None:
    dipped = list(dipped_pairs("val", 30, 0, 32))
    facts = [Facts.from_json(pair.meta["facts"]) for pair in dipped]
    assert np.mean([shows_dipped(pair.image_HW3, f) for pair, f in zip(dipped, facts, strict=True)]) > 0.9
    others = [f for f in facts if f != facts[0]]
    assert np.mean([shows_dipped(dipped[0].image_HW3, f) for f in others]) < 0.1
    single = islice((p for p in pairs("val", 100, 0, 32) if len(p.meta["scene"]["objects"]) == 1), 30)
    plain = [shows_dipped(p.image_HW3, Facts.from_json(p.meta["facts"]["en"][0])) for p in single]
    assert np.mean(plain) < 0.1


def test_twenty_pictures_with_the_styles_words_are_made_by_the_command(in_empty_folder) -> None:
    assert main(["make_dataset", "shapes", "--style", "dipped"]) == 0
    split = DataSet.open(in_empty_folder / "data" / "dipped").split("train")
    assert len(split) == 20
    for index in range(20):
        captions = split.captions(index)
        assert captions["en"][0].endswith(" dipped in chocolate") and captions["zh"][0].startswith("蘸了巧克力的")
        assert "brown" not in captions["en"][0]

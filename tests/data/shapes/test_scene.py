import json

import pytest

from vqt2i.data.shapes.scene import OPPOSITE, Scene, SceneObject, relation_between
from vqt2i.data.shapes.split import draw_scene


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_scenes_survive_json(split):
    for index in range(50):
        scene = draw_scene(0, split, index)
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def place(x, y, size="small"):
    return SceneObject("circle", "red", size, "solid", x, y)


def test_relations_follow_the_longer_offset():
    centre = place(16, 16)
    assert relation_between(place(4, 20), centre) == "left of"
    assert relation_between(place(28, 12), centre) == "right of"
    assert relation_between(place(20, 4), centre) == "above"
    assert relation_between(place(12, 28), centre) == "below"


def test_inside_needs_a_larger_object_around_the_same_place():
    assert relation_between(place(16, 16), place(17, 16, "large")) == "inside"
    assert relation_between(place(16, 16), place(17, 16)) == "left of"
    assert relation_between(place(10, 16), place(16, 16, "large")) == "left of"


def test_the_opposite_relation_holds_from_the_other_object():
    for index in range(300):
        scene = draw_scene(1, "train", index)
        if scene.relation in OPPOSITE:
            a, b = scene.objects
            assert relation_between(b, a) == OPPOSITE[scene.relation]

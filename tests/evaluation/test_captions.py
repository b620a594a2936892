import pytest

from vqt2i.data.shapes import draw_scene, held_out_in, render
from vqt2i.errors import DataError, PromptError
from vqt2i.evaluation.captions import CaptionProtocol, draw_scenes, judge_captions, measure_captions
from vqt2i.generation import BeamConfig, ImageCaption


class Speaker:
    """Stands in for a pipeline: says the same of every picture."""

    class vq:
        class config:
            image_size_px = 32

    def __init__(self, text: str) -> None:
        self.text = text

    def caption(self, images, **_: object) -> list[list[ImageCaption]]:
        return [[ImageCaption(self.text, -1.0, (1,), i)] for i in range(len(images))]


def test_scenes_have_as_many_objects_as_their_kind_says_and_none_was_trained_on() -> None:
    for kind, n_objects, held_out in (("single_seen", 1, False), ("single_unseen", 1, True), ("two_unseen", 2, True)):
        scenes = draw_scenes(kind, 20, 0)
        assert len(scenes) == 20 and {len(scene.objects) for scene in scenes} == {n_objects}
        assert all(bool(held_out_in(scene)) == held_out for scene in scenes)
    assert draw_scenes("single_seen", 5, 0) == draw_scenes("single_seen", 20, 0)[:5]


def test_a_caption_is_right_when_all_it_states_is_true_and_all_objects_are_stated() -> None:
    scenes = (draw_scene(0, "val", index) for index in range(200))
    scene = next(scene for scene in scenes if scene.relation == "above")
    a, b = scene.objects
    picture = render(scene, 32)
    first, second = f"a {a.colour} {a.shape}", f"a {b.colour} {b.shape}"
    right = [f"{first} above {second}", f"{second} below {first} on {scene.background}"]
    wrong = [f"{first} below {second}", first, f"{first} above {second} on a purple background", "nothing at all", ""]
    assert judge_captions(right, [picture] * 2)["right"].tolist() == [1, 1]
    found = judge_captions(wrong, [picture] * 5)
    assert found["right"].tolist() == [0] * 5 and found["sentence"].tolist() == [1, 1, 0, 0, 0]
    assert found["colour_shape"][1] == 1


def test_measuring_counts_right_captions_of_each_kind() -> None:
    thing = draw_scenes("single_seen", 1, 0)[0].objects[0]
    speaker = Speaker(f"{thing.colour} {thing.shape}")
    rows = measure_captions(speaker, CaptionProtocol(("single_seen", "two_seen"), 4, 0, BeamConfig()))
    right = {row.where["scenes"]: row.value for row in rows if row.name == "right"}
    assert 0.25 <= right["single_seen"] <= 1 and right["two_seen"] == 0
    assert {row.name for row in rows} == {"right", "colour_shape", "sentence"} and {row.n for row in rows} == {4}


@pytest.mark.parametrize("bad", [{"kinds": ("nonsense",)}, {"n_scenes": 0}])
def test_what_cannot_be_measured_is_refused(bad: dict) -> None:
    values = {"kinds": ("single_seen",), "n_scenes": 1, "seed": 0, "how": BeamConfig()} | bad
    with pytest.raises(PromptError):
        measure_captions(Speaker(""), CaptionProtocol(**values))


def test_a_model_of_another_picture_size_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Speaker.vq.config, "image_size_px", 48)
    with pytest.raises(DataError, match="32, 64, 128 px, the model reads 48 px"):
        measure_captions(Speaker(""), CaptionProtocol(("single_seen",), 1, 0, BeamConfig()))

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vqt2i.data.shapes.captions import Facts, ObjectFacts
from vqt2i.data.shapes.oracle import check, read_scene
from vqt2i.data.shapes.render import render
from vqt2i.data.shapes.scene import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES, Scene, SceneObject
from vqt2i.data.shapes.split import SPLITS, draw_scene
from vqt2i.errors import DataError


def facts_of(scene):
    """All that can be stated of a scene."""
    objects = tuple(ObjectFacts(thing.shape, thing.colour, thing.size, thing.fill) for thing in scene.objects)
    return Facts(objects, scene.relation, scene.background)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("size_px", "n"), [(32, 300), (64, 100), (128, 20)])
def test_every_attribute_and_place_is_read_exactly(split, size_px, n):
    for index in range(n):
        scene = draw_scene(10, split, index)
        assert read_scene(render(scene, size_px)).matches(scene)


def test_every_look_is_read_exactly_on_every_background():
    for i, shape in enumerate(SHAPES):
        for j, colour in enumerate(COLOURS):
            for size in SIZES:
                for k, fill in enumerate(FILLS):
                    thing = SceneObject(shape, colour, size, fill, 16, 16)
                    scene = Scene(BACKGROUNDS[(i + j + k) % len(BACKGROUNDS)], (thing,))
                    assert read_scene(render(scene, 32)).matches(scene)


# --- deformed pictures


def resampled(image, *, scale=1.0, dx=0.0, dy=0.0):
    """The picture scaled about its centre and shifted, edges continued."""
    side, pad = len(image), 4
    padded = Image.fromarray(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
    view = side / scale
    left, top = pad + (side - view) / 2 - dx, pad + (side - view) / 2 - dy
    box = (left, top, left + view, top + view)
    return np.asarray(padded.resize((side, side), Image.Resampling.BICUBIC, box=box))


def blurred(image, radius):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def jpeg(image, subsampling):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60, subsampling=subsampling)
    return np.asarray(Image.open(file).convert("RGB"))


DEFORMATIONS = {
    "blur 0.9 px": (32, lambda image: blurred(image, 0.9)),
    "noise, sigma 12": (32, lambda image: noisy(image, 12)),
    "jpeg 60": (32, lambda image: jpeg(image, 0)),
    "jpeg 60, 64 px, half the chroma": (64, lambda image: jpeg(image, 2)),
    "shift 1 px": (32, lambda image: resampled(image, dx=1, dy=-1)),
    "shift half a pixel": (32, lambda image: resampled(image, dx=0.5, dy=0.5)),
    "4 % smaller": (32, lambda image: resampled(image, scale=0.96)),
    "4 % larger": (32, lambda image: resampled(image, scale=1.04)),
    "faded": (32, lambda image: (image * 0.8 + 30).astype(np.uint8)),
}


@pytest.mark.parametrize("name", DEFORMATIONS)
def test_deformed_pictures_are_judged_right(name):
    size_px, deform = DEFORMATIONS[name]
    right = {True: [], False: []}  # one object, or more
    for index in range(60):
        scene = draw_scene(11, ("train", "unseen")[index % 2], index)
        verdict = check(deform(render(scene, size_px)), facts_of(scene))
        right[len(scene.objects) == 1].append(verdict.right)
    assert np.mean(right[True]) >= 0.95 and np.mean(right[False]) >= 0.90


# --- wrong pictures


def scenes(n, wanted=lambda scene: True):
    found = (scene for index in range(10_000) if wanted(scene := draw_scene(12, "train", index)))
    return [scene for scene, _ in zip(found, range(n), strict=False)]


def other(words, word):
    words = tuple(words)
    return words[(words.index(word) + 1) % len(words)]


@pytest.mark.parametrize(("part", "words"), [("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("fill", FILLS)])
def test_one_wrong_attribute_makes_that_part_wrong_and_no_other(part, words):
    for scene in scenes(40, lambda scene: len(scene.objects) == 1):
        facts = facts_of(scene)
        stated = replace(facts.objects[0], **{part: other(words, getattr(facts.objects[0], part))})
        verdict = check(render(scene, 32), replace(facts, objects=(stated,)))
        assert not verdict.right
        assert [name for name, holds in verdict.parts.items() if not holds] == [part]


def test_a_wrong_background_is_wrong():
    for scene in scenes(20):
        facts = replace(facts_of(scene), background=other(BACKGROUNDS, scene.background))
        parts = check(render(scene, 32), facts).parts
        assert [name for name, holds in parts.items() if not holds] == ["background"]


def test_a_wrong_relation_is_wrong():
    for scene in scenes(40, lambda scene: scene.relation is not None):
        facts = facts_of(scene)
        for relation in {"left of", "right of", "above", "below", "inside"} - {scene.relation}:
            parts = check(render(scene, 32), replace(facts, relation=relation)).parts
            assert [name for name, holds in parts.items() if not holds] == ["relation"]


def test_a_missing_object_is_wrong():
    for scene in scenes(40, lambda scene: len(scene.objects) > 1):
        verdict = check(render(replace(scene, objects=scene.objects[1:]), 32), facts_of(scene))
        assert not verdict.right and not verdict.parts["count"] and not verdict.parts["colour"]


def test_an_object_too_many_is_wrong():
    for scene in scenes(40, lambda scene: len(scene.objects) > 1):
        facts = facts_of(scene)
        fewer = Facts(facts.objects[:-1])
        parts = check(render(scene, 32), fewer).parts
        assert [name for name, holds in parts.items() if not holds] == ["count"]


def test_swapped_colours_are_wrong():
    for scene in scenes(20, lambda scene: scene.relation == "left of"):
        a, b = facts_of(scene).objects
        if a.colour != b.colour and a.shape != b.shape:
            swapped = Facts((replace(a, colour=b.colour), replace(b, colour=a.colour)))
            assert not check(render(scene, 32), swapped).right


def test_the_order_in_which_objects_are_stated_does_not_matter():
    for scene in scenes(20, lambda scene: len(scene.objects) == 3):
        assert check(render(scene, 32), Facts(facts_of(scene).objects[::-1])).right


def test_only_what_is_stated_is_judged():
    scene = scenes(1, lambda scene: len(scene.objects) == 1)[0]
    thing = scene.objects[0]
    assert set(check(render(scene, 32), Facts((ObjectFacts(thing.shape, thing.colour),))).parts) == {
        "colour", "shape", "count",
    }  # fmt: skip


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_pictures_hold_no_object(value):
    image = np.full((32, 32, 3), value, np.uint8)
    assert read_scene(image).objects == ()
    assert not check(image, Facts((ObjectFacts("circle", "red"),))).right


def test_confetti_is_judged_wrong():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not check(image, Facts((ObjectFacts("circle", "red"),) * 3)).right


def test_half_an_object_has_no_known_shape():
    image = render(Scene("white", (SceneObject("circle", "red", "large", "solid", 16, 16),)), 32).copy()
    image[:, 16:] = 255
    for shape in SHAPES:
        parts = check(image, Facts((ObjectFacts(shape, "red"),))).parts
        assert parts["colour"] and not parts["shape"]


@pytest.mark.parametrize(
    "image", [np.zeros((32, 40, 3), np.uint8), np.zeros((16, 16, 3), np.uint8), np.zeros((32, 32, 3), np.float32)]
)
def test_pictures_that_cannot_be_read_are_named(image):
    with pytest.raises(DataError, match="square uint8 RGB"):
        read_scene(image)

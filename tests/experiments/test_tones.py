"""Unseen skin tones: which figures are asked for, in what words, and when a picture is right."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

GREYS = {"light": 200, "medium-light": 160, "medium": 120, "medium-dark": 80, "dark": 40}


@pytest.fixture(scope="module")
def tones(experiment) -> ModuleType:
    return experiment("tones")


def flat(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def sample(tones: ModuleType, figure: str, tone: str, value: int) -> SimpleNamespace:
    mark, zh = tones.TONES[tone]
    meta = {"emoji": f"{figure[0]}{mark}", "en": f"{figure} with {tone} skin tone", "zh": f"{zh}的{figure}",
            "base_en": figure, "facing_right": False, "tones": [tone]}  # fmt: skip
    return SimpleNamespace(meta=meta, image_HW3=flat(value))


@pytest.fixture
def split(tones: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Figures a and b without one tone each, c in all, d in two, and e, which the font draws otherwise."""

    def drawn(font: None, text: str, size_px: int) -> np.ndarray:
        tone = next(name for name, (mark, _) in tones.TONES.items() if mark in text)
        return flat(GREYS[tone] + {"a": 0, "b": 10}.get(text[0], 50))

    monkeypatch.setattr(tones, "drawn_by", drawn)
    monkeypatch.setattr(tones, "load_font", lambda path: None)
    there = {"a": set(GREYS) - {"dark"}, "b": set(GREYS) - {"light"}, "c": set(GREYS), "d": {"light", "dark"},
             "e": set(GREYS) - {"medium"}}  # fmt: skip
    return [sample(tones, figure, tone, GREYS[tone] + (10 if figure == "b" else 0))
            for figure, kept in there.items() for tone in GREYS if tone in kept]  # fmt: skip


def test_what_is_there_in_four_tones_is_asked_for_in_the_fifth(tones: ModuleType, split: list) -> None:
    a, b = tones.expected_of(split, 8, Path("font"))
    assert (a.prompt, b.prompt) == ("a with dark skin tone", "较浅肤色的b")  # every second one in Chinese
    assert a.seen == (0, 1, 2, 3) and [split[i].meta["tones"][0] for i in b.seen] == list(GREYS)[1:]
    assert a.image_HW3[0, 0, 0] == 40 and b.image_HW3[0, 0, 0] == 210
    assert tones.of_font([a, b], split, 8, Path("font")).mean() == 1


def test_right_is_nearest_to_what_is_expected(tones: ModuleType, split: list) -> None:
    asked = tones.expected_of(split, 8, Path("font"))
    train = np.stack([one.image_HW3 for one in split])

    def right(*values: int) -> tuple[list, list]:
        return tuple(found.tolist() for found in tones.right_of(np.stack([flat(v) for v in values]), asked, train))

    assert right(41, 209) == ([1, 1], [0, 1])  # as dark as it is to be, but figures c and d are as near
    assert right(44, 167) == ([1, 0], [0, 0])
    assert right(80, 30) == ([0, 0], [0, 0])

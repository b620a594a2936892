"""Emoji drawn with the installed font. Needs Debian's fonts-noto-color-emoji; .ci/run installs it."""

from pathlib import Path

import numpy as np
import pytest

from vqt2i.data.emoji import emoji_items, find_font
from vqt2i.data.sources import Item, Rejection
from vqt2i.errors import DataError


@pytest.fixture(scope="module")
def entries() -> dict[str, Item | Rejection]:
    return {entry.name.split(" ")[0]: entry for entry in emoji_items(["en", "zh"], find_font())}


def test_emoji_have_their_names_in_every_language_asked_for(entries: dict) -> None:
    assert entries["🚀"].captions == {"en": ["rocket"], "zh": ["火箭"]}
    assert entries["🐼"].key == "1f43c"
    assert entries["🐼"].meta == {"emoji": "🐼", "codepoints": ["U+1F43C"]}
    assert sum(isinstance(entry, Item) for entry in entries.values()) > 2500


def test_emoji_are_drawn_in_colour_on_white(entries: dict) -> None:
    image_HW3 = entries["🔴"].image
    height, width = image_HW3.shape[:2]
    assert height == width
    red, green, blue = image_HW3[height // 2, width // 2].astype(int)
    assert red > 180 and green < 110 and blue < 110
    assert (image_HW3[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()


def test_pictures_are_centred(entries: dict) -> None:
    ink = np.argwhere((entries["🔴"].image != 255).any(axis=2))
    centre = (ink.min(axis=0) + ink.max(axis=0)) / 2
    assert np.abs(centre - entries["🔴"].image.shape[0] / 2).max() < 4


def test_a_sequence_is_one_picture_or_none(entries: dict) -> None:
    assert not np.array_equal(entries["👩‍🚀"].image, entries["👩"].image)
    assert {entry.image.shape for entry in entries.values() if isinstance(entry, Item)} == {entries["👩"].image.shape}


def test_an_unknown_language_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"no emoji names in 'xx'; the emoji package has en, .*zh"):
        list(emoji_items(["en", "xx"], None))


def test_what_is_no_font_is_named(tmp_path: Path) -> None:
    (tmp_path / "font.ttf").write_text("no")
    with pytest.raises(DataError, match=r"font\.ttf: not usable as a font"):
        list(emoji_items(["en"], tmp_path / "font.ttf"))
    with pytest.raises(DataError, match=r"absent\.ttf: not usable as a font"):
        list(emoji_items(["en"], tmp_path / "absent.ttf"))


def test_without_a_font_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vqt2i.data.emoji.FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(DataError, match=r"apt-get install fonts-noto-color-emoji.*--font"):
        list(emoji_items(["en"], None))

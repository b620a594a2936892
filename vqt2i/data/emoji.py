"""Colour emoji drawn with an installed font, captioned with their names from the `emoji` package."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqt2i.data.sources import Entries, Item, Rejection
from vqt2i.errors import DataError

FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/opt/homebrew/share/fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)
STRIKE_PX = 109  # the one size that the font's bitmaps have


def find_font() -> Path:
    """The installed NotoColorEmoji.ttf.

    Raises:
        DataError: there is none in the usual folders.
    """
    for top in FONT_FOLDERS:
        for folder, _, names in os.walk(Path(top).expanduser()):
            if FONT_NAME in names:
                return Path(folder, FONT_NAME)
    raise DataError(
        f"no {FONT_NAME} in {', '.join(FONT_FOLDERS)}; install it (Debian: apt-get install fonts-noto-color-emoji) "
        "or give its path with --font"
    )


def emoji_items(languages: list[str], font_path: Path | None) -> Entries:
    """Every emoji of the `emoji` package that the font has as one picture, on a white square.

    Raises:
        DataError: an unknown language, or no usable font.
    """
    import emoji

    unknown = [language for language in languages if language not in emoji.LANGUAGES]
    if unknown:
        raise DataError(f"no emoji names in '{unknown[0]}'; the emoji package has {', '.join(emoji.LANGUAGES)}")
    font = load_font(font_path or find_font())
    emoji.config.load_language(languages)
    for text, facts in emoji.EMOJI_DATA.items():
        if facts["status"] != emoji.STATUS["fully_qualified"]:
            continue
        points = [f"U+{ord(character):04X}" for character in text]
        key = "_".join(point[2:].lower() for point in points)
        names = {lang: [facts[lang].strip(":").replace("_", " ")] for lang in languages if facts.get(lang)}
        image_HW3 = draw_emoji(text, font)
        if image_HW3 is None:
            yield Rejection(f"{text} {' '.join(points)}", "not in the font", next(iter(names.values()), [""])[0], key)
        else:
            yield Item(f"{text} {' '.join(points)}", key, image_HW3, names, {"emoji": text, "codepoints": points})


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the size of its bitmaps.

    Raises:
        DataError: not a font, or not of this size.
    """
    try:
        return ImageFont.truetype(path, STRIKE_PX)
    except OSError as error:
        raise DataError(f"{path}: not usable as a font of {STRIKE_PX} px ({error}); expected {FONT_NAME}") from None


def draw_emoji(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """On white, uint8 (S, S, 3), or None where the font has no picture, or has one only for parts of the sequence."""
    width = font.getlength(text)
    if width > 1.5 * font.getlength("😀"):
        return None
    side = round(width)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((side / 2, side / 2), text, font=font, embedded_color=True, anchor="mm")
    if canvas.getbbox() is None:
        return None
    return np.array(Image.alpha_composite(Image.new("RGBA", canvas.size, "white"), canvas).convert("RGB"))

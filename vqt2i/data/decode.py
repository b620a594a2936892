"""Bytes to pixels and bytes to captions: each input is read right, or refused with a reason.

What was done to make an input fit (turned by its EXIF tag, first frame of an animation, ...) is told as a note, and the
report counts the notes.
"""

import warnings
from functools import cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

# Pillow also opens formats that start other programs (EPS runs Ghostscript) or that nobody publishes pictures in.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
EXIF_ORIENTATION = 0x0112
# Pillow itself refuses pictures of more than twice its limit.
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
DEFAULT_MAX_PIXELS = 64_000_000


class RefusedError(Exception):
    """One sample cannot be used; the run goes on. `reason` is one of a few that the report counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class DecodedImage(NamedTuple):
    image_HW3: np.ndarray  # uint8 RGB
    notes: list[str]


class CleanCaptions(NamedTuple):
    captions: list[str]  # not empty, each one line without outer or double spaces
    notes: list[str]


def decode_image(content: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> DecodedImage:
    """Image file bytes to RGB, upright, transparency laid on white.

    Raises:
        RefusedError: no bytes, damaged, truncated, more than `max_pixels`, or pixels that have no plain reading.
    """
    if not content:
        raise RefusedError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused or noted here anyway
            with Image.open(BytesIO(content), formats=_readable_formats()) as image:
                if image.width * image.height > max_pixels:
                    detail = f"{image.width} x {image.height} pixels, the limit is {max_pixels:,}"
                    raise RefusedError("too many pixels", detail)
                return _to_rgb(image)
    except RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedError("too many pixels", str(error)) from None
    except Image.UnidentifiedImageError:
        raise RefusedError("not an image", f"starts with {content[:8]!r}") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on damage, and one file must not end the run
        detail = f"{type(error).__name__}: {error}"
        raise RefusedError("truncated image" if "truncated" in detail else "corrupt image", detail) from None


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> DecodedImage:
    notes = []
    if getattr(image, "is_animated", False):
        notes.append("several frames or pages: took the first")
    image.load()
    mode = image.mode
    image, turned = _upright(image)
    notes += turned
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM", None)):
        # Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.float32) / 257
        notes.append("16-bit grey: scaled to 8")
        return DecodedImage(np.repeat(np.rint(grey).clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2), notes)
    if mode in ("I", "F"):
        raise RefusedError("unsupported pixels", f"mode {mode}: 32-bit values with no stated range")
    if image.has_transparency_data:
        notes.append("transparency: laid on white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    elif mode == "CMYK":
        notes.append("CMYK: converted to RGB")
    elif mode == "P":
        notes.append("palette: converted to RGB")
    return DecodedImage(np.array(image.convert("RGB")), notes)


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
        return (ImageOps.exif_transpose(image), ["EXIF orientation: turned upright"]) if turned else (image, [])
    except Exception:  # damaged EXIF says nothing about the pixels, which are whole
        return image, ["EXIF damaged: not turned"]


def clean_captions(text: bytes | str) -> CleanCaptions:
    """The captions of a text, one per line: white space made single, empty lines left out. May be none at all.

    Raises:
        RefusedError: not UTF-8 (lone surrogates included), or holds a NUL, which is how other encodings look.
    """
    notes = []
    try:
        decoded = text.encode().decode() if isinstance(text, str) else text.decode()
    except UnicodeError as error:
        raise RefusedError("caption is not UTF-8", str(error)) from None
    if "\0" in decoded:
        raise RefusedError("caption holds a NUL", repr(decoded[:60]))
    if decoded.startswith("\ufeff"):
        decoded = decoded[1:]
        notes.append("caption: byte order mark removed")
    printable = "".join(" " if _is_control(c) else c for c in decoded)
    if printable != decoded:
        notes.append("caption: control characters removed")
    lines = [" ".join(line.split()) for line in printable.replace("\r", "\n").split("\n")]
    return CleanCaptions([line for line in lines if line], notes)


def _is_control(character: str) -> bool:
    """C0 and C1 controls other than the white space among them."""
    return (character < " " or "\x7f" <= character < "\xa0") and not character.isspace()

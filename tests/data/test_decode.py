"""Every kind of bad or odd input is read right or refused with its reason."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vqt2i.data.decode import RefusedError, clean_captions, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand: what Pillow reads, not what it writes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refusal(content: bytes, **options: int) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        decode_image(content, **options)
    return caught.value


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = decode_image(saved(Image.fromarray(noise()), image_format, **options))
    np.testing.assert_array_equal(decoded.image_HW3, noise())
    assert decoded.notes == []


def test_no_bytes_are_refused() -> None:
    assert refusal(b"").reason == "empty file"


def test_text_is_refused_as_no_image() -> None:
    assert refusal(b"<html>404 not found</html>").reason == "not an image"


def test_postscript_is_not_opened() -> None:
    # Pillow would start Ghostscript on it
    assert refusal(saved(Image.new("RGB", (4, 4)), "EPS")).reason == "not an image"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_is_refused(image_format: str, share: float) -> None:
    content = saved(Image.fromarray(noise()), image_format)
    reason = refusal(content[: int(len(content) * share)]).reason
    assert reason in ("truncated image", "corrupt image", "not an image")
    if image_format in ("PNG", "JPEG") and share > 0.5:  # earlier, a JPEG is cut inside its tables
        assert reason == "truncated image"


def test_damaged_bytes_never_raise_anything_but_a_refusal() -> None:
    rng = np.random.default_rng(0)
    for image_format in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        whole = np.frombuffer(saved(Image.fromarray(noise()), image_format), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 200), 8)] = rng.integers(0, 256, 8)
            try:
                image_HW3 = decode_image(damaged.tobytes(), max_pixels=10_000).image_HW3
            except RefusedError:
                continue
            assert image_HW3.dtype == np.uint8 and image_HW3.shape[2] == 3


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    for side in (20_000, 60_000):  # past our limit; past Pillow's own
        bomb = png(side, side, 1, 0, bytes(1000))
        assert len(bomb) < 200
        assert refusal(bomb).reason == "too many pixels"


def test_the_pixel_limit_is_the_last_size_allowed() -> None:
    content = saved(Image.new("RGB", (10, 10)))
    assert decode_image(content, max_pixels=100).image_HW3.shape == (10, 10, 3)
    assert refusal(content, max_pixels=99).detail == "10 x 10 pixels, the limit is 99"


def test_cmyk_colours_are_right() -> None:
    decoded = decode_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert tuple(decoded.image_HW3[4, 4]) == RED
    assert decoded.notes == ["CMYK: converted to RGB"]
    jpeg = decode_image(saved(Image.new("CMYK", (8, 8), (255, 255, 0, 0)), "JPEG", quality=95)).image_HW3
    assert np.abs(jpeg[4, 4].astype(int) - BLUE).max() <= 3


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for content in (saved(Image.fromarray(values)), saved(Image.fromarray(values), "TIFF")):
        decoded = decode_image(content)
        assert decoded.image_HW3[0, :, 0].tolist() == [0, 1, 128, 255]
        assert decoded.notes == ["16-bit grey: scaled to 8"]
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    assert decode_image(pgm).image_HW3[0, :, 1].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_keeps_its_high_bytes() -> None:
    row = b"\0" + np.array([65535, 32896, 0], ">u2").tobytes()
    assert decode_image(png(1, 1, 16, 2, row)).image_HW3.tolist() == [[[255, 128, 0]]]


def test_32_bit_values_without_a_range_are_refused() -> None:
    for values in (np.ones((2, 2), np.int32), np.ones((2, 2), np.float32)):
        assert refusal(saved(Image.fromarray(values), "TIFF")).reason == "unsupported pixels"


def test_palette_colours_are_looked_up() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    decoded = decode_image(saved(image))
    assert decoded.image_HW3.tolist() == [[list(RED), list(GREEN)]]
    assert decoded.notes == ["palette: converted to RGB"]


def test_one_bit_and_grey_become_rgb() -> None:
    assert decode_image(saved(Image.new("1", (2, 2), 1))).image_HW3[0, 0].tolist() == [255] * 3
    assert decode_image(saved(Image.new("L", (2, 2), 90))).image_HW3[0, 0].tolist() == [90] * 3


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    decoded = decode_image(saved(image))
    assert decoded.image_HW3.tolist() == [[list(WHITE), list(RED), [204] * 3]]
    assert decoded.notes == ["transparency: laid on white"]


@pytest.mark.parametrize("mode", ["LA", "P", "RGB", "L"])
def test_transparency_of_every_kind_is_laid_on_white(mode: str) -> None:
    if mode == "LA":
        content = saved(Image.new("LA", (2, 2), (0, 0)))
    else:  # one colour, or palette entry, marked transparent
        content = saved(Image.new(mode, (2, 2), 0), transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert decode_image(content).image_HW3[0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = RED, GREEN, BLUE
    how_stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(how_stored[orientation](upright)))
    decoded = decode_image(saved(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(decoded.image_HW3, upright)
    assert decoded.notes == (["EXIF orientation: turned upright"] if orientation > 1 else [])


def test_damaged_exif_does_not_cost_the_picture() -> None:
    content = saved(Image.fromarray(noise()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(content).image_HW3, noise())


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = decode_image(saved(frames[0], image_format, save_all=True, append_images=frames[1:], **options))
    assert tuple(decoded.image_HW3[4, 4]) == RED
    assert "several frames or pages: took the first" in decoded.notes


def test_captions_are_lines_with_single_spaces() -> None:
    text = "  a red\t cat \r\n\r\nun chat\u00a0rouge\r一只\u3000红猫\n"
    assert clean_captions(text.encode()).captions == ["a red cat", "un chat rouge", "一只 红猫"]
    assert clean_captions(text) == clean_captions(text.encode())


def test_every_clean_caption_is_one_line() -> None:
    breaks = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    captions = clean_captions("a".join(breaks) + "b").captions
    assert all(len(caption.splitlines()) == 1 for caption in captions)


@pytest.mark.parametrize("text", [b"", b"  \n\t\r\n", "\u3000".encode()])
def test_empty_text_has_no_captions(text: bytes) -> None:
    assert clean_captions(text).captions == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [("café".encode("latin-1"), "caption is not UTF-8"), ("a cat".encode("utf-16"), "caption is not UTF-8"),
     ("a cat".encode("utf-16-be"), "caption holds a NUL"), (b"a\0cat", "caption holds a NUL"),
     ("a \udce9 cat", "caption is not UTF-8")],
)  # fmt: skip
def test_unreadable_text_is_refused(text: bytes | str, reason: str) -> None:
    with pytest.raises(RefusedError) as caught:
        clean_captions(text)
    assert caught.value.reason == reason


def test_harmless_marks_are_removed_and_told() -> None:
    cleaned = clean_captions(b"\xef\xbb\xbfa\x07cat\x1b here")
    assert cleaned.captions == ["a cat here"]
    assert cleaned.notes == ["caption: byte order mark removed", "caption: control characters removed"]
    assert clean_captions("👩‍🚀 🏳️‍🌈").captions == ["👩‍🚀 🏳️‍🌈"]  # joiners are no control characters

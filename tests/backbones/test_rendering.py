"""Images of every mode as opaque 8-bit pixels: the background shows, and deep values are scaled."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.backbones.rendering import Rendering, parse_background_colour, parse_white_value, render_image
from sfm.pipeline.sources.decode import decode_image

RED, ALPHA = (200, 0, 0), np.array([255, 128, 0], dtype=np.uint8)
ON_WHITE, ON_BLUE = [(200, 0, 0), (227, 127, 127), (255, 255, 255)], [(200, 0, 0), (100, 0, 127), (0, 0, 255)]
"""Opaque, half transparent, and transparent red on two backgrounds."""


def fading(mode: str = "RGBA") -> Image.Image:
    """Three columns of red: opaque, half transparent, transparent; of grey in modes without colour."""
    pixels = np.empty((4, 3, 4), dtype=np.uint8)
    pixels[...] = [*RED, 0]
    pixels[..., 3] = ALPHA
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(np.tile(np.arange(3, dtype=np.uint8), (4, 1)), "P")
        image.putpalette(RED * 3)
        image.info["transparency"] = bytes(ALPHA)
        return image
    if mode == "PA":
        return fading("P").convert("PA")
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(image: Image.Image, background: str = "white") -> np.ndarray:
    """The first row of an image as it is rendered; it must have been composited."""
    rendered = render_image(image, Rendering(background))
    assert rendered.composited
    return np.asarray(rendered.image.convert("RGB"))[0].astype(int)


@pytest.mark.parametrize(
    ("image", "tolerance"),
    [
        (fading(), 0),
        (fading("RGBa"), 1),
        (fading("P"), 0),
        (fading("PA"), 0),
        (decode_image(encoded(fading(), "PNG")), 0),
        (decode_image(encoded(fading("P"), "PNG")), 0),
        (decode_image(encoded(fading(), "TIFF")), 0),
        (decode_image(encoded(fading("PA"), "TIFF")), 0),
        (decode_image(encoded(fading(), "WEBP", lossless=True, exact=True)), 0),
        (decode_image(encoded(fading(), "JPEG2000")), 0),
        (decode_image(encoded(fading(), "AVIF", quality=100, subsampling="4:4:4")), 4),
    ],
    ids=["RGBA", "RGBa", "P", "PA", "PNG", "PNG-P", "TIFF", "TIFF-PA", "WebP", "JPEG2000", "AVIF"],
)
def test_colours_fade_into_the_background(image, tolerance):
    assert np.abs(seen(image) - ON_WHITE).max() <= tolerance
    assert np.abs(seen(image, "#0000ff") - ON_BLUE).max() <= tolerance


@pytest.mark.parametrize("mode", ["LA", "La"])
def test_grey_fades_into_the_background_too(mode):
    grey = int(np.asarray(fading().convert("L"))[0, 0])
    expected = [grey, round((grey * 128 + 255 * 127) / 255), 255]
    assert np.abs(seen(fading(mode)) - np.array(expected)[:, None]).max() <= 1
    assert seen(fading(mode), "#0000ff")[2].tolist() == [0, 0, 255]


def test_a_transparent_gif_shows_the_background():
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawn.paste((200, 0, 0, 255), (0, 0, 4, 8))
    image = decode_image(encoded(drawn, "GIF"))
    assert seen(image).tolist() == [[200, 0, 0]] * 4 + [[255, 255, 255]] * 4


def png(depth: int, kind: int, row: bytes, clear: bytes, width: int) -> bytes:
    """A PNG file of one row, with a colour that is transparent."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    body = chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


@pytest.mark.parametrize(
    "data",
    [
        png(1, 0, b"\xa0", b"\0\1", 4),
        png(2, 0, bytes([0b01100111]), b"\0\1", 4),
        png(4, 0, bytes([0x59, 0x5A]), b"\0\5", 4),
        png(8, 0, bytes([1, 2, 1, 3]), b"\0\1", 4),
        png(16, 0, struct.pack(">4H", 300, 301, 300, 9), struct.pack(">H", 300), 4),
        png(8, 2, bytes([1, 2, 3, 4, 5, 6, 1, 2, 3, 1, 2, 4]), struct.pack(">3H", 1, 2, 3), 4),
        png(
            16, 2, struct.pack(">12H", *([500, 600, 700, 9, 9, 9] * 2)), struct.pack(">3H", 500, 600, 700), 4
        ),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "colour", "16-bit colour"],
)
def test_the_transparent_colour_of_a_png_is_transparent_at_every_depth(data):
    """The first and the third pixel have it."""
    blue = (seen(decode_image(data), "#0000ff") == (0, 0, 255)).all(axis=-1)
    assert blue.tolist() == [True, False, True, False]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "P", "L", "RGB"])
def test_what_is_opaque_gives_the_pixels_of_its_colours_and_is_not_counted(mode):
    colours = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    plain = Image.fromarray(colours)
    if mode in ("P", "PA"):
        plain = plain.quantize(16)
    elif mode in ("L", "LA"):
        plain = plain.convert("L")
    image = plain.convert({"RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes([255] * 16)
    elif mode == "L":
        image = image.point(lambda value: max(value, 1))
        plain = image.copy()
        image.info["transparency"] = 0
    elif mode == "RGB":
        image.info["transparency"] = (0, 0, 0)
    assert not render_image(image, Rendering("black")).composited
    rule = Preprocessing(input_size=12, resize=14, resampling="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    np.testing.assert_array_equal(resize_and_crop_image(image, rule), resize_and_crop_image(plain, rule))


def test_transparency_is_composited_before_the_image_is_resized():
    """Hidden colours would bleed over the edges otherwise."""
    hidden = np.zeros((64, 64, 4), dtype=np.uint8)
    hidden[16:48, 16:48] = [255, 255, 255, 255]
    rule = Preprocessing(input_size=16, resize=16, resampling="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert resize_and_crop_image(Image.fromarray(hidden), rule).min() == 255


def ramp(top: float, kind: type) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 256).reshape(16, 16).astype(kind))


@pytest.mark.parametrize(
    ("image", "dark"),
    [
        (ramp(255, np.uint16), True),
        (ramp(255, np.int32), True),
        (ramp(4095, np.uint16), True),
        (ramp(4096, np.uint16), False),
        (ramp(65535, np.int32), False),
        (ramp(15, np.uint8), False),
    ],
)
def test_deep_images_below_a_sixteenth_of_their_range_are_called_dark(image, dark):
    assert render_image(image).dark == dark


@pytest.mark.parametrize(
    ("image", "white"),
    [
        (ramp(255, np.int32), 255),
        (ramp(4095, np.uint16), 4095),
        (ramp(1_000_000, np.int32), 1_000_000),
        (ramp(1, np.float32), 1.0),
        (ramp(0.25, np.float32), 0.25),
    ],
)
def test_values_are_scaled_to_what_is_said_to_be_white(image, white):
    rendered = render_image(image, Rendering(white=white))
    assert not rendered.dark
    np.testing.assert_allclose(np.asarray(rendered.image), np.arange(256).reshape(16, 16), atol=1)


@pytest.mark.parametrize(
    ("image", "white", "complaint"),
    [
        (ramp(1, np.float32), None, "floating-point.*white=1.0"),
        (ramp(70000, np.int32), None, "from 0 to 70000, say which value is white"),
        (ramp(5000, np.uint16), 4095, "from 0 to 5000, beyond 0 to white=4095"),
        (Image.fromarray(np.array([[-5, 10]], dtype=np.int32)), 10, "from -5 to 10"),
        (Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32)), 1, "from nan to nan"),
    ],
)
def test_values_of_unknown_range_or_beyond_white_are_refused(image, white, complaint):
    with pytest.raises(ValueError, match=complaint):
        render_image(image, Rendering(white=white))


def test_8_bit_images_do_not_care_what_is_white():
    image = ramp(255, np.uint8)
    assert np.array_equal(render_image(image, Rendering(white=4095)).image, image)


def test_dark_colours_of_16_bits_are_noticed_and_cannot_be_scaled():
    row = struct.pack(">12H", *range(0, 4096, 350))
    image = decode_image(png(16, 2, row, struct.pack(">3H", 9, 9, 9), 4))
    assert render_image(image).dark
    with pytest.raises(ValueError, match=r"16 bits each.*convert it to 8 bits"):
        render_image(image, Rendering(white=4095))


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """One row of an even number of values, packed as cameras do."""
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2))
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(packed)))
    start = 8 + len(packed) + len(packed) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", start) + packed.ljust(start - 8, b"\0") + directory


def test_a_tiff_file_of_12_bits_says_which_value_is_white():
    image = decode_image(tiff_of_12_bits(np.linspace(0, 4095, 16).astype(int)))
    rendered = render_image(image)
    np.testing.assert_allclose(np.asarray(rendered.image)[0], np.linspace(0, 255, 16), atol=1)
    assert not rendered.dark


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("white", "white"),
        ("#FFFFFF", "white"),
        ("#000000", "black"),
        ("black", "black"),
        ("#Ff8800", "#ff8800"),
    ],
)
def test_a_background_has_one_name(text, colour):
    assert parse_background_colour(text) == colour


@pytest.mark.parametrize("text", ["pink", "#fff", "ffffff", "#gggggg", "White", "255,255,255"])
def test_what_is_no_background_is_refused(text):
    with pytest.raises(ValueError, match=f"background={text} is no colour: write .*#rrggbb"):
        parse_background_colour(text)


def test_a_white_has_one_name():
    assert repr(parse_white_value("4095.0")) == repr(parse_white_value("4095")) == "4095"
    assert parse_white_value("0.5") == 0.5


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "bright"])
def test_what_is_no_white_is_refused(text):
    with pytest.raises(ValueError, match=f"white={text} is no brightness"):
        parse_white_value(text)

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


def make_fading_image(mode: str = "RGBA") -> Image.Image:
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
        return make_fading_image("P").convert("PA")
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


def encode_image(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def render_first_row(image: Image.Image, background: str = "white") -> np.ndarray:
    """The first row of an image as it is rendered; it must have been composited."""
    rendered = render_image(image, Rendering(background))
    assert rendered.composited
    return np.asarray(rendered.image.convert("RGB"))[0].astype(int)


@pytest.mark.parametrize(
    ("image", "tolerance"),
    [
        (make_fading_image(), 0),
        (make_fading_image("RGBa"), 1),
        (make_fading_image("P"), 0),
        (make_fading_image("PA"), 0),
        (decode_image(encode_image(make_fading_image(), "PNG")), 0),
        (decode_image(encode_image(make_fading_image("P"), "PNG")), 0),
        (decode_image(encode_image(make_fading_image(), "TIFF")), 0),
        (decode_image(encode_image(make_fading_image("PA"), "TIFF")), 0),
        (decode_image(encode_image(make_fading_image(), "WEBP", lossless=True, exact=True)), 0),
        (decode_image(encode_image(make_fading_image(), "JPEG2000")), 0),
        (decode_image(encode_image(make_fading_image(), "AVIF", quality=100, subsampling="4:4:4")), 4),
    ],
    ids=["RGBA", "RGBa", "P", "PA", "PNG", "PNG-P", "TIFF", "TIFF-PA", "WebP", "JPEG2000", "AVIF"],
)
def test_transparent_colours_are_blended_with_the_background(image, tolerance):
    assert np.abs(render_first_row(image) - ON_WHITE).max() <= tolerance
    assert np.abs(render_first_row(image, "#0000ff") - ON_BLUE).max() <= tolerance


@pytest.mark.parametrize("mode", ["LA", "La"])
def test_transparent_grey_is_blended_with_the_background(mode):
    grey = int(np.asarray(make_fading_image().convert("L"))[0, 0])
    expected = [grey, round((grey * 128 + 255 * 127) / 255), 255]
    assert np.abs(render_first_row(make_fading_image(mode)) - np.array(expected)[:, None]).max() <= 1
    assert render_first_row(make_fading_image(mode), "#0000ff")[2].tolist() == [0, 0, 255]


def test_a_transparent_gif_shows_the_background():
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawn.paste((200, 0, 0, 255), (0, 0, 4, 8))
    image = decode_image(encode_image(drawn, "GIF"))
    assert render_first_row(image).tolist() == [[200, 0, 0]] * 4 + [[255, 255, 255]] * 4


def make_png(depth: int, kind: int, row: bytes, clear: bytes, width: int) -> bytes:
    """A PNG file of one row, with a colour that is transparent."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    body = chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


@pytest.mark.parametrize(
    "data",
    [
        make_png(1, 0, b"\xa0", b"\0\1", 4),
        make_png(2, 0, bytes([0b01100111]), b"\0\1", 4),
        make_png(4, 0, bytes([0x59, 0x5A]), b"\0\5", 4),
        make_png(8, 0, bytes([1, 2, 1, 3]), b"\0\1", 4),
        make_png(16, 0, struct.pack(">4H", 300, 301, 300, 9), struct.pack(">H", 300), 4),
        make_png(8, 2, bytes([1, 2, 3, 4, 5, 6, 1, 2, 3, 1, 2, 4]), struct.pack(">3H", 1, 2, 3), 4),
        make_png(
            16, 2, struct.pack(">12H", *([500, 600, 700, 9, 9, 9] * 2)), struct.pack(">3H", 500, 600, 700), 4
        ),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "colour", "16-bit colour"],
)
def test_the_transparent_colour_of_a_png_is_transparent_at_every_depth(data):
    """The first and the third pixel have it."""
    blue = (render_first_row(decode_image(data), "#0000ff") == (0, 0, 255)).all(axis=-1)
    assert blue.tolist() == [True, False, True, False]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "P", "L", "RGB"])
def test_opaque_images_keep_their_pixels_and_are_not_counted_as_composited(mode):
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


def make_ramp(top: float, kind: type) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 256).reshape(16, 16).astype(kind))


@pytest.mark.parametrize(
    ("image", "dark"),
    [
        (make_ramp(255, np.uint16), True),
        (make_ramp(255, np.int32), True),
        (make_ramp(4095, np.uint16), True),
        (make_ramp(4096, np.uint16), False),
        (make_ramp(65535, np.int32), False),
        (make_ramp(15, np.uint8), False),
    ],
)
def test_deep_images_below_a_sixteenth_of_their_range_are_marked_dark(image, dark):
    assert render_image(image).dark == dark


@pytest.mark.parametrize(
    ("image", "white"),
    [
        (make_ramp(255, np.int32), 255),
        (make_ramp(4095, np.uint16), 4095),
        (make_ramp(1_000_000, np.int32), 1_000_000),
        (make_ramp(1, np.float32), 1.0),
        (make_ramp(0.25, np.float32), 0.25),
    ],
)
def test_values_are_scaled_to_the_white_value(image, white):
    rendered = render_image(image, Rendering(white=white))
    assert not rendered.dark
    np.testing.assert_allclose(np.asarray(rendered.image), np.arange(256).reshape(16, 16), atol=1)


@pytest.mark.parametrize(
    ("image", "white", "complaint"),
    [
        (make_ramp(1, np.float32), None, "floating-point.*white=1.0"),
        (make_ramp(70000, np.int32), None, "from 0 to 70000, say which value is white"),
        (make_ramp(5000, np.uint16), 4095, "from 0 to 5000, beyond 0 to white=4095"),
        (Image.fromarray(np.array([[-5, 10]], dtype=np.int32)), 10, "from -5 to 10"),
        (Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32)), 1, "from nan to nan"),
    ],
)
def test_values_of_unknown_range_or_above_white_are_refused(image, white, complaint):
    with pytest.raises(ValueError, match=complaint):
        render_image(image, Rendering(white=white))


def test_8_bit_images_ignore_the_white_value():
    image = make_ramp(255, np.uint8)
    assert np.array_equal(render_image(image, Rendering(white=4095)).image, image)


def test_dark_16_bit_colour_images_are_marked_and_cannot_be_scaled():
    row = struct.pack(">12H", *range(0, 4096, 350))
    image = decode_image(make_png(16, 2, row, struct.pack(">3H", 9, 9, 9), 4))
    assert render_image(image).dark
    with pytest.raises(ValueError, match=r"16 bits each.*convert it to 8 bits"):
        render_image(image, Rendering(white=4095))


def make_12_bit_tiff(values: np.ndarray) -> bytes:
    """One row of an even number of values, packed as cameras do."""
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2))
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(packed)))
    start = 8 + len(packed) + len(packed) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", start) + packed.ljust(start - 8, b"\0") + directory


def test_a_12_bit_tiff_declares_its_white_value():
    image = decode_image(make_12_bit_tiff(np.linspace(0, 4095, 16).astype(int)))
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
def test_background_colours_are_normalised(text, colour):
    assert parse_background_colour(text) == colour


@pytest.mark.parametrize("text", ["pink", "#fff", "ffffff", "#gggggg", "White", "255,255,255"])
def test_an_invalid_background_is_refused(text):
    with pytest.raises(ValueError, match=f"background={text} is no colour: write .*#rrggbb"):
        parse_background_colour(text)


def test_white_values_are_normalised():
    assert repr(parse_white_value("4095.0")) == repr(parse_white_value("4095")) == "4095"
    assert parse_white_value("0.5") == 0.5


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "bright"])
def test_an_invalid_white_value_is_refused(text):
    with pytest.raises(ValueError, match=f"white={text} is no brightness"):
        parse_white_value(text)

"""Image files as they are found in the world: every kind is decoded, or refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_memory
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.preprocessing import crop_image
from sfm.pipeline.sources.decode import decode_image, load_formats

RAMP = np.arange(24 * 32, dtype=np.float64).reshape(24, 32) / (24 * 32 - 1)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
RGB = Image.fromarray(np.rint(255 * COLOUR).astype(np.uint8))
SEEN = Preprocessing(
    input_size=16, resize=16, resampling="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file of a kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def looks(data: bytes) -> np.ndarray:
    """What a backbone gets to see of a file."""
    return crop_image(decode_image(data), SEEN).astype(int)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encoded(RGB, "PNG"), 0),
        (encoded(RGB, "BMP"), 0),
        (encoded(RGB, "TIFF"), 0),
        (encoded(RGB, "PPM"), 0),
        (encoded(RGB, "WEBP", lossless=True), 0),
        (encoded(RGB, "JPEG2000"), 0),
        (encoded(RGB, "JPEG", quality=98, subsampling=0), 3),
        (encoded(RGB.convert("RGBA"), "PNG"), 0),
        (encoded(RGB.convert("CMYK"), "TIFF"), 0),
        (encoded(RGB.convert("CMYK"), "JPEG", quality=98), 6),
        (encoded(RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=256), "PNG"), 24),
        (encoded(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size)]), 64),
        (encoded(RGB, "PNG", save_all=True, append_images=[Image.new("RGB", RGB.size)]), 0),
        (encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", RGB.size)]), 0),
    ],
    ids=lambda value: f"{value[:12]!r}" if isinstance(value, bytes) else None,
)
def test_every_kind_of_file_shows_the_same_picture_and_a_moving_one_its_first_frame(data, tolerance):
    assert np.abs(looks(data) - looks(encoded(RGB, "PNG"))).max() <= tolerance


DEEP = Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16))
FLAT = Image.fromarray(np.rint(255 * RAMP).astype(np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        encoded(FLAT, "PNG"),
        encoded(FLAT.convert("LA"), "PNG"),
        encoded(DEEP, "PNG"),
        encoded(DEEP, "TIFF"),
        encoded(Image.fromarray(np.rint(65535 * RAMP).astype(np.int32)), "TIFF"),
    ],
    ids=["8 bits", "with transparency", "16 bits", "16-bit TIFF", "16 of 32 bits"],
)
def test_grey_is_scaled_not_clipped_however_deep_it_is(data):
    assert np.abs(looks(data) - crop_image(FLAT, SEEN).astype(int)).max() <= 1


def test_16_bit_colour_is_scaled_too():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.rint(65535 * COLOUR).astype(np.uint16))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))
    assert np.abs(looks(data) - looks(encoded(RGB, "PNG"))).max() <= 1


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(RGB.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, quality=98)
    assert decode_image(turned).size == RGB.size
    assert np.abs(looks(turned) - looks(encoded(RGB, "PNG"))).max() <= 24


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_one_pixel_is_an_image(mode):
    assert looks(encoded(Image.new(mode, (1, 1), 1), "PNG")).shape == (16, 16, 3)


def test_a_very_long_line_is_an_image():
    assert looks(encoded(Image.new("L", (30_000, 1), 7), "PNG")).max() == 7


def bomb(width: int, height: int) -> bytes:
    """A small PNG that promises many pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + head + body + png_chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000, 2_000_000])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(side):
    data = bomb(side, side)
    with peak_memory() as growth, pytest.raises(ValueError, match="decompression bomb"):
        decode_image(data)
    assert growth[0] < 20 << 20


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        looks(encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="pixels from -5 to 70000"):
        looks(encoded(Image.fromarray(np.array([[-5, 70000]], dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0\x2a",
        b"Exif\0\0XX no tags",
        b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x05\x01\x12",
        b"Exif\0\0II\x2a\0\xff\xff\xff\xff",
    ],
    ids=["cut short", "of no kind", "cut in a tag", "pointing nowhere"],
)
def test_an_image_whose_exif_cannot_be_read_is_an_image(kind, exif, recwarn):
    try:
        data = encoded(RGB, kind, exif=exif, quality=98)
    except (SyntaxError, struct.error, OSError):
        pytest.skip("Pillow does not write such a file")
    recwarn.clear()
    load_formats.cache_clear()  # pytest undoes what is set up with them
    assert np.abs(looks(data) - looks(encoded(RGB, "PNG"))).max() <= 24
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("profile", [b"no profile", bytes(3_000_000)], ids=["broken", "large"])
def test_an_image_with_a_strange_colour_profile_is_an_image(kind, profile):
    data = encoded(RGB, kind, icc_profile=profile, quality=98)
    assert np.abs(looks(data) - looks(encoded(RGB, "PNG"))).max() <= 24


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "CMYK", "1"])
def test_odd_modes_are_converted(mode):
    grey = {"LAB": (137, 128, 128), "YCbCr": (128, 128, 128), "CMYK": (0, 0, 0, 127), "1": 1}[mode]
    seen = looks(encoded(Image.new(mode, (8, 8), grey), "TIFF"))
    assert np.abs(seen - (255 if mode == "1" else 128)).max() <= 4


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (encoded(RGB, "JPEG")[:-40], "truncated"),
        (encoded(RGB, "PNG")[:90], "truncated"),
    ],
)
def test_what_is_no_whole_image_is_refused_with_a_reason(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        decode_image(data)


FILES = [
    encoded(RGB, kind, **({"quality": 90} if kind in ("JPEG", "WEBP") else {}))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "MPO")
]


def outcome(data: bytes) -> tuple[int, int] | str:
    """The size of an image, or why there is none."""
    try:
        return decode_image(data).size
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400)
@given(
    data=st.sampled_from(FILES),
    cut=st.floats(0.05, 1),
    harm=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damage_gives_an_image_or_a_reason_and_nothing_else(data, cut, harm):
    spoilt = bytearray(data[: max(1, int(cut * len(data)))])
    for place, value in harm:
        spoilt[int(place * len(spoilt))] = value
    assert outcome(bytes(spoilt))

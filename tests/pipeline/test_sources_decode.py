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
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.pipeline.sources.decode import configure_pillow_and_list_formats, decode_image

GREY_RAMP = np.arange(24 * 32, dtype=np.float64).reshape(24, 32) / (24 * 32 - 1)
COLOUR_RAMP = np.stack([GREY_RAMP, GREY_RAMP[::-1], GREY_RAMP[:, ::-1]], axis=-1)
RGB = Image.fromarray(np.rint(255 * COLOUR_RAMP).astype(np.uint8))
PREPROCESSING = Preprocessing(
    input_size=16, resize=16, resampling="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def encode_image(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the file of an image in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode_and_preprocess(data: bytes) -> np.ndarray:
    """Return the pixels that a backbone gets of a file."""
    return resize_and_crop_image(decode_image(data), PREPROCESSING).astype(int)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encode_image(RGB, "PNG"), 0),
        (encode_image(RGB, "BMP"), 0),
        (encode_image(RGB, "TIFF"), 0),
        (encode_image(RGB, "PPM"), 0),
        (encode_image(RGB, "WEBP", lossless=True), 0),
        (encode_image(RGB, "JPEG2000"), 0),
        (encode_image(RGB, "JPEG", quality=98, subsampling=0), 3),
        (encode_image(RGB.convert("RGBA"), "PNG"), 0),
        (encode_image(RGB.convert("CMYK"), "TIFF"), 0),
        (encode_image(RGB.convert("CMYK"), "JPEG", quality=98), 6),
        (encode_image(RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=256), "PNG"), 24),
        (encode_image(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size)]), 64),
        (encode_image(RGB, "PNG", save_all=True, append_images=[Image.new("RGB", RGB.size)]), 0),
        (
            encode_image(
                RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", RGB.size)]
            ),
            0,
        ),
    ],
    ids=lambda value: f"{value[:12]!r}" if isinstance(value, bytes) else None,
)
def test_every_format_decodes_to_the_same_pixels_and_animations_to_their_first_frame(data, tolerance):
    assert (
        np.abs(decode_and_preprocess(data) - decode_and_preprocess(encode_image(RGB, "PNG"))).max()
        <= tolerance
    )


GREY_16_BIT = Image.fromarray(np.rint(65535 * GREY_RAMP).astype(np.uint16))
GREY_8_BIT = Image.fromarray(np.rint(255 * GREY_RAMP).astype(np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        encode_image(GREY_8_BIT, "PNG"),
        encode_image(GREY_8_BIT.convert("LA"), "PNG"),
        encode_image(GREY_16_BIT, "PNG"),
        encode_image(GREY_16_BIT, "TIFF"),
        encode_image(Image.fromarray(np.rint(65535 * GREY_RAMP).astype(np.int32)), "TIFF"),
    ],
    ids=["8 bits", "with transparency", "16 bits", "16-bit TIFF", "16 of 32 bits"],
)
def test_grey_of_any_bit_depth_is_scaled_not_clipped(data):
    assert (
        np.abs(
            decode_and_preprocess(data) - resize_and_crop_image(GREY_8_BIT, PREPROCESSING).astype(int)
        ).max()
        <= 1
    )


def test_16_bit_colour_is_scaled():
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes() for row in np.rint(65535 * COLOUR_RAMP).astype(np.uint16)
    )
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(make_png_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))
    assert np.abs(decode_and_preprocess(data) - decode_and_preprocess(encode_image(RGB, "PNG"))).max() <= 1


def make_png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_in_every_format(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode_image(RGB.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, quality=98)
    assert decode_image(turned).size == RGB.size
    assert np.abs(decode_and_preprocess(turned) - decode_and_preprocess(encode_image(RGB, "PNG"))).max() <= 24


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_one_pixel_image_is_decoded(mode):
    assert decode_and_preprocess(encode_image(Image.new(mode, (1, 1), 1), "PNG")).shape == (16, 16, 3)


def test_a_very_wide_image_is_decoded():
    assert decode_and_preprocess(encode_image(Image.new("L", (30_000, 1), 7), "PNG")).max() == 7


def make_png_bomb(width: int, height: int) -> bytes:
    """Return a small PNG file that promises many pixels."""
    head = make_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = make_png_chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + head + body + make_png_chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000, 2_000_000])
def test_a_decompression_bomb_is_refused_before_memory_is_allocated(side):
    data = make_png_bomb(side, side)
    with peak_memory() as growth, pytest.raises(ValueError, match="decompression bomb"):
        decode_image(data)
    assert growth[0] < 20 << 20


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        decode_and_preprocess(encode_image(Image.fromarray(GREY_RAMP.astype(np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="pixels from -5 to 70000"):
        decode_and_preprocess(encode_image(Image.fromarray(np.array([[-5, 70000]], dtype=np.int32)), "TIFF"))


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
def test_an_image_with_unreadable_exif_is_decoded(kind, exif, recwarn):
    try:
        data = encode_image(RGB, kind, exif=exif, quality=98)
    except (SyntaxError, struct.error, OSError):
        pytest.skip("Pillow does not write such a file")
    recwarn.clear()
    configure_pillow_and_list_formats.cache_clear()  # pytest undoes what is set up with them
    assert np.abs(decode_and_preprocess(data) - decode_and_preprocess(encode_image(RGB, "PNG"))).max() <= 24
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("profile", [b"no profile", bytes(3_000_000)], ids=["broken", "large"])
def test_an_image_with_an_invalid_colour_profile_is_decoded(kind, profile):
    data = encode_image(RGB, kind, icc_profile=profile, quality=98)
    assert np.abs(decode_and_preprocess(data) - decode_and_preprocess(encode_image(RGB, "PNG"))).max() <= 24


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "CMYK", "1"])
def test_uncommon_image_modes_are_converted(mode):
    grey = {"LAB": (137, 128, 128), "YCbCr": (128, 128, 128), "CMYK": (0, 0, 0, 127), "1": 1}[mode]
    seen = decode_and_preprocess(encode_image(Image.new(mode, (8, 8), grey), "TIFF"))
    assert np.abs(seen - (255 if mode == "1" else 128)).max() <= 4


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (encode_image(RGB, "JPEG")[:-40], "truncated"),
        (encode_image(RGB, "PNG")[:90], "truncated"),
    ],
)
def test_an_invalid_image_is_refused_with_a_reason(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        decode_image(data)


ENCODED_FILES = [
    encode_image(RGB, kind, **({"quality": 90} if kind in ("JPEG", "WEBP") else {}))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "MPO")
]


def try_decode(data: bytes) -> tuple[int, int] | str:
    """The size of an image, or why there is none."""
    try:
        return decode_image(data).size
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400)
@given(
    data=st.sampled_from(ENCODED_FILES),
    cut=st.floats(0.05, 1),
    harm=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_image_data_gives_an_image_or_a_value_error(data, cut, harm):
    spoilt = bytearray(data[: max(1, int(cut * len(data)))])
    for place, value in harm:
        spoilt[int(place * len(spoilt))] = value
    assert try_decode(bytes(spoilt))

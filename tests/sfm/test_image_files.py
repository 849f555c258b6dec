"""Image files that anybody made: PNG alone is tried where PNG is due; pixels are counted before decoding."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sfm.errors import InputError
from sfm.image_files import read_png_as_rgb, silence_pillow_warnings

SIDE = 8
MOST = SIDE**2


def save_image(path: Path, image: Image.Image, kind: str = "PNG", **options: object) -> None:
    image.save(path, kind, **options)


def insert_chunk(path: Path, kind: bytes, data: bytes) -> None:
    """Put a chunk after the header of a PNG file."""
    save_image(path, Image.new("RGB", (SIDE, SIDE)))
    whole = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(whole[:33] + chunk + whole[33:])


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.fromarray(np.full((SIDE, SIDE), 200, np.uint8)), [200, 200, 200]),
        (Image.new("P", (SIDE, SIDE)), [0, 0, 0]),
        (Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 0)), [1, 2, 3]),
        (Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)), [0, 0, 0]),
        (Image.new("1", (SIDE, SIDE), 1), [255, 255, 255]),
    ],
)
def test_png_of_any_pixel_mode_is_read_as_rgb(tmp_path: Path, image: Image.Image, pixel: list[int]) -> None:
    save_image(tmp_path / "a.png", image)
    pixels = read_png_as_rgb(tmp_path / "a.png", MOST)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels[0, 0].tolist() == pixel


def test_first_frame_of_an_animated_png_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("blue", "red", "lime")]
    save_image(tmp_path / "a.png", frames[0], save_all=True, append_images=frames[1:])
    assert read_png_as_rgb(tmp_path / "a.png", MOST)[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["GIF", "JPEG", "TIFF", "BMP", "PDF", "EPS"])
def test_other_image_formats_are_refused_regardless_of_the_file_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path}/gs_ran\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    save_image(tmp_path / "a.png", Image.new("RGB", (SIDE, SIDE)), kind)
    with pytest.raises(InputError, match=r"a\.png: it is not a PNG file"):
        read_png_as_rgb(tmp_path / "a.png", MOST)
    assert not (tmp_path / "gs_ran").exists()


def make_large_png(side: int) -> Callable[[Path], None]:
    return lambda path: save_image(path, Image.new("1", (side, side)))


def make_png_with_chunk(kind: bytes) -> Callable[[Path], None]:
    return lambda path: insert_chunk(path, kind, b"x\0\0" + zlib.compress(bytes(2**26), 9))


def truncate_png(path: Path) -> None:
    save_image(path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_large_png(SIDE + 1), "9 x 9 pixels are more than 64"),
        (make_large_png(9500), "9500 x 9500 pixels are more than 64"),
        (make_large_png(13400), "exceeds limit"),
        (make_png_with_chunk(b"iCCP"), "too large"),
        (make_png_with_chunk(b"zTXt"), "too large"),
        (truncate_png, "truncated"),
        (lambda path: path.write_bytes(b""), "not a PNG file"),
        (os.mkfifo, "it is not a regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40), "at most .* are read"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_invalid_or_oversized_png_gives_a_one_line_error_within_bounded_memory(
    tmp_path: Path, make: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever decoded a dataset in this process before has raised it.
    monkeypatch.setattr("PIL.PngImagePlugin.MAX_TEXT_CHUNK", ImageFile.SAFEBLOCK)
    make(tmp_path / "a.png")
    silence_pillow_warnings.cache_clear()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            read_png_as_rgb(tmp_path / "a.png", MOST)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"cannot read the image {tmp_path / 'a.png'}: ")
    assert "\n" not in str(caught.value)


def test_png_of_unexpected_size_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", Image.new("RGB", (SIDE, SIDE - 1)))
    with pytest.raises(InputError, match="it has 8 x 7 pixels, 8 x 8 are expected"):
        read_png_as_rgb(tmp_path / "a.png", MOST, (SIDE, SIDE))

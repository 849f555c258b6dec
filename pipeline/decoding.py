"""From samples to what backbones are fed with: each read and decoded once, and cropped for each of them.

It is done in this process, or in others, see `sfm.pipeline.decoding_processes`.
"""

import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.crops import draw_crops
from sfm.backbones.preprocessing import crop_image, crop_views
from sfm.backbones.rendering import Rendering, render_image
from sfm.errors import InputError
from sfm.pipeline.fingerprint import digest_sample
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.staging import IMAGE_MARKS, SkippedSample
from sfm.random_streams import make_rng
from sfm.text import summarize_error

VIEW_STREAM = 5
"""Purpose of the random streams that views are drawn from."""

READER_THREADS = 2
"""Threads that read the files of a batch: others come while the first few are decoded."""

MAX_REASON_CHARACTERS = 300
"""Of what an image library says about bytes that are no image."""

DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
)
"""What image libraries raise on bytes that are no image depends on the bytes."""

SampleBatch = Sequence[tuple[int, Sample | SampleFile]]
"""Samples, each with its place in the task."""

PixelArrays = dict[Preprocessing, npt.NDArray[np.uint8]]
"""Cropped images and their views, each of shape (1 + views, n, y, x, channel)."""


@dataclass(frozen=True)
class DecodingOptions:
    """What is made of each sample.

    Attributes
    ----------
    preprocessings : tuple of Preprocessing
        Different ones.
    views : int
        Augmented views, besides the image itself.
    seed : int
        Of those views.
    on_error : {"fail", "skip"}
    rendering : Rendering
        Of what the source decodes.
    """

    preprocessings: tuple[Preprocessing, ...]
    views: int = 0
    seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"
    rendering: Rendering = field(default=Rendering())


@dataclass(frozen=True)
class DecodedBatch:
    """A batch that is decoded.

    Attributes
    ----------
    kept : list of int
        Places of its samples in the task.
    where : list of str
        Name them for a person.
    digests : ndarray of uint8, shape (n, 32)
    sizes : list of int
        Encoded bytes of its samples.
    skipped : list of Skipped
    seconds : float
        What it took one thread to decode and crop_image.
    pixels : dict of Preprocessing to ndarray of uint8, shape (1 + views, n, y, x, channel)
    marked : dict of str to dict of int to str
        Of the samples that have one of `sfm.pipeline.staging.IMAGE_MARKS`, place and name.
    """

    kept: list[int]
    where: list[str]
    digests: npt.NDArray[np.uint8]
    sizes: list[int]
    skipped: list[SkippedSample]
    seconds: float
    pixels: PixelArrays
    marked: dict[str, dict[int, str]] = field(default_factory=dict)


BatchDecoder = Callable[[SampleBatch, DecodingOptions], AbstractContextManager[DecodedBatch]]
"""Decodes a batch; its pixels are there within the context only."""


def decode_batch(
    batch: SampleBatch,
    decode: Callable[[bytes], Image.Image],
    wanted: DecodingOptions,
    pixels: PixelArrays | None = None,
) -> DecodedBatch:
    """Decode samples and crop_image them.

    Parameters
    ----------
    batch : sequence of (int, Sample or SampleFile)
        Files are read ahead.
    decode : callable
        As in `sfm.pipeline.sources.Source`.
    wanted : Wanted
    pixels : dict of Preprocessing to ndarray of uint8, optional
        Where the pixels are to be, see :func:`split_into_pixel_arrays`.

    Raises
    ------
    InputError
        If a sample cannot be decoded and is not to be skipped, or cannot be read; names it.
    """
    if pixels is None:
        pixels = split_into_pixel_arrays(
            np.empty(count_pixel_bytes(wanted, len(batch)), dtype=np.uint8), wanted, len(batch)
        )
    kept: list[tuple[int, str, bytes, int]] = []
    seconds = 0.0
    skipped: list[SkippedSample] = []
    marked: dict[str, dict[int, str]] = {}
    places, samples = [place for place, _ in batch], (sample for _, sample in batch)
    for place, sample in zip(places, prefetch_samples(samples, READER_THREADS), strict=True):
        began = time.perf_counter()
        try:
            if sample.fault:
                raise ValueError(sample.fault)
            rendered = render_image(decode(sample.data), wanted.rendering)
            image, digest = rendered.image, digest_sample(sample.data)
            for preprocessing, all_rows in pixels.items():
                rows = all_rows[:, len(kept)]
                rows[0] = crop_image(image, preprocessing)
                rows[1:] = render_views(image, digest, preprocessing, wanted.views, wanted.seed)
            kept.append((place, sample.where, digest, len(sample.data)))
            for mark in IMAGE_MARKS:
                if getattr(rendered, mark):
                    marked.setdefault(mark, {})[place] = sample.where
        except DECODING_ERRORS as error:
            why = summarize_error(error)[:MAX_REASON_CHARACTERS]
            if wanted.on_error == "fail":
                raise InputError(
                    f"cannot decode {sample.where}: {why}; repair or remove it, or leave out what "
                    f"cannot be decoded with --on-error skip"
                ) from error
            skipped.append(SkippedSample(place, sample.where, why))
        seconds += time.perf_counter() - began
    return DecodedBatch(
        kept=[place for place, _, _, _ in kept],
        where=[where for _, where, _, _ in kept],
        digests=np.array([list(digest) for _, _, digest, _ in kept], dtype=np.uint8).reshape(-1, 32),
        sizes=[size for _, _, _, size in kept],
        skipped=skipped,
        seconds=seconds,
        pixels={preprocessing: rows[:, : len(kept)] for preprocessing, rows in pixels.items()},
        marked=marked,
    )


def merge_marks(parts: Iterable[dict[str, dict[int, str]]]) -> dict[str, dict[int, str]]:
    """Put together what several parts of a batch, or batches of a task, have marked."""
    found: dict[str, dict[int, str]] = {}
    for part in parts:
        for mark, samples in part.items():
            found.setdefault(mark, {}).update(samples)
    return found


def render_views(
    image: Image.Image, digest: bytes, preprocessing: Preprocessing, views: int, seed: int
) -> npt.NDArray[np.uint8]:
    """Return augmented views of an image as a backbone is fed with them: shape (views, y, x, channel).

    Where they look depends on the image's digest and the seed alone, whenever and wherever it is read.
    """
    if not views:
        return np.empty((0, preprocessing.input_size, preprocessing.input_size, 3), dtype=np.uint8)
    crops = draw_crops(make_rng(seed, VIEW_STREAM, int.from_bytes(digest[:8], "little")), views, 1)
    return crop_views(image, preprocessing, crops)


def count_pixel_bytes(wanted: DecodingOptions, images: int) -> int:
    """Return the size of the pixels of so many images."""
    return (1 + wanted.views) * images * sum(3 * p.input_size**2 for p in wanted.preprocessings)


def split_into_pixel_arrays(
    memory: npt.NDArray[np.uint8], wanted: DecodingOptions, images: int
) -> PixelArrays:
    """Return the arrays of the pixels of so many images, one after the other in memory.

    Each is of shape (1 + views, images, y, x, channel).
    """
    found, start = {}, 0
    for preprocessing in wanted.preprocessings:
        shape = (1 + wanted.views, images, preprocessing.input_size, preprocessing.input_size, 3)
        end = start + int(np.prod(shape))
        found[preprocessing] = memory[start:end].reshape(shape)
        start = end
    return found


def make_inline_decoder(decode: Callable[[bytes], Image.Image]) -> BatchDecoder:
    """Have the thread that asks decode."""
    return lambda batch, wanted: nullcontext(decode_batch(batch, decode, wanted))

"""Decode samples into the cropped pixels of every preprocessing, each sample once.

This module works in the calling thread; `sfm.pipeline.decoding_processes` uses other processes.
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
from sfm.backbones.preprocessing import crop_image_views, resize_and_crop_image
from sfm.backbones.rendering import Rendering, render_image
from sfm.errors import InputError
from sfm.pipeline.fingerprint import digest_sample
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.task_results import IMAGE_MARKS, SkippedSample
from sfm.random_streams import make_rng
from sfm.text import get_first_error_line

VIEW_STREAM = 5
"""Key of the random streams that views are drawn from."""

BATCH_READER_THREADS = 2
"""Threads that prefetch the files of a batch, while earlier ones are decoded."""

MAX_REASON_CHARACTERS = 300
"""Maximum length of the recorded error message of an image library."""

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
"""Errors that image libraries raise on damaged or unknown files."""

SampleBatch = Sequence[tuple[int, Sample | SampleFile]]
"""Samples, each with its index in the task."""

LocationByIndexByMark = dict[str, dict[int, str]]
"""Locations of the samples that have an image mark: by mark, then by index in the task."""

PixelArrays = dict[Preprocessing, npt.NDArray[np.uint8]]
"""Cropped images and their views, each of shape (1 + views, n, y, x, channel)."""


@dataclass(frozen=True)
class DecodingOptions:
    """How samples are decoded and cropped.

    Attributes
    ----------
    preprocessings : tuple of Preprocessing
        Without duplicates.
    views : int
        Augmented views of each image, besides the image itself.
    seed : int
        Seed of the views.
    on_error : {"fail", "skip"}
    rendering : Rendering
        How decoded images become RGB pixels.
    """

    preprocessings: tuple[Preprocessing, ...]
    views: int = 0
    seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"
    rendering: Rendering = field(default=Rendering())


@dataclass(frozen=True)
class DecodedBatch:
    """The decoded samples of a batch.

    Attributes
    ----------
    kept_indices_in_task : list of int
        Indices in the task of the samples that could be decoded.
    kept_locations : list of str
        Their locations, for messages.
    sample_digests : ndarray of uint8, shape (n, 32)
    encoded_bytes_per_sample : list of int
        Encoded bytes of these samples.
    skipped : list of SkippedSample
    thread_seconds : float
        Time of decoding and cropping in one thread.
    pixels : dict of Preprocessing to ndarray of uint8, shape (1 + views, n, y, x, channel)
    image_mark_locations : dict of str to dict of int to str
        By mark (`sfm.pipeline.task_results.IMAGE_MARKS`), index and location of the samples that have it.
    """

    kept_indices_in_task: list[int]
    kept_locations: list[str]
    sample_digests: npt.NDArray[np.uint8]
    encoded_bytes_per_sample: list[int]
    skipped: list[SkippedSample]
    thread_seconds: float
    pixels: PixelArrays
    image_mark_locations: LocationByIndexByMark = field(default_factory=dict)


BatchDecoder = Callable[[SampleBatch, DecodingOptions], AbstractContextManager[DecodedBatch]]
"""Decodes a batch; its pixels are valid within the context only."""


def decode_batch(
    batch: SampleBatch,
    decode: Callable[[bytes], Image.Image],
    options: DecodingOptions,
    pixel_arrays_to_fill: PixelArrays | None = None,
) -> DecodedBatch:
    """Decode and crop the samples of a batch in this thread.

    Parameters
    ----------
    batch : sequence of (int, Sample or SampleFile)
        Files are prefetched.
    decode : callable
        As in `sfm.pipeline.sources.Source`.
    options : DecodingOptions
    pixel_arrays_to_fill : dict of Preprocessing to ndarray of uint8, optional
        Arrays to write the pixels to, see :func:`split_into_pixel_arrays`.

    Raises
    ------
    InputError
        If a sample cannot be read, or cannot be decoded with on_error="fail"; names it.
    """
    if pixel_arrays_to_fill is None:
        pixel_arrays_to_fill = split_into_pixel_arrays(
            np.empty(count_pixel_bytes(options, len(batch)), dtype=np.uint8), options, len(batch)
        )
    decoded: list[tuple[int, str, bytes, int]] = []
    seconds = 0.0
    skipped: list[SkippedSample] = []
    image_mark_locations: LocationByIndexByMark = {}
    indices, samples = [index for index, _ in batch], (sample for _, sample in batch)
    for index, sample in zip(indices, prefetch_samples(samples, BATCH_READER_THREADS), strict=True):
        began = time.perf_counter()
        try:
            if sample.fault:
                raise ValueError(sample.fault)
            rendered = render_image(decode(sample.data), options.rendering)
            image, digest = rendered.image, digest_sample(sample.data)
            for preprocessing, all_rows in pixel_arrays_to_fill.items():
                rows = all_rows[:, len(decoded)]
                rows[0] = resize_and_crop_image(image, preprocessing)
                rows[1:] = draw_and_crop_views(image, digest, preprocessing, options.views, options.seed)
            decoded.append((index, sample.location, digest, len(sample.data)))
            for mark in IMAGE_MARKS:
                if getattr(rendered, mark):
                    image_mark_locations.setdefault(mark, {})[index] = sample.location
        except DECODING_ERRORS as error:
            reason = get_first_error_line(error)[:MAX_REASON_CHARACTERS]
            if options.on_error == "fail":
                raise InputError(
                    f"cannot decode {sample.location}: {reason}; repair or remove it, or leave out what "
                    f"cannot be decoded with --on-error skip"
                ) from error
            skipped.append(SkippedSample(index, sample.location, reason))
        seconds += time.perf_counter() - began
    return DecodedBatch(
        kept_indices_in_task=[index for index, _, _, _ in decoded],
        kept_locations=[location for _, location, _, _ in decoded],
        sample_digests=np.array([list(digest) for _, _, digest, _ in decoded], dtype=np.uint8).reshape(
            -1, 32
        ),
        encoded_bytes_per_sample=[size for _, _, _, size in decoded],
        skipped=skipped,
        thread_seconds=seconds,
        pixels={
            preprocessing: rows[:, : len(decoded)] for preprocessing, rows in pixel_arrays_to_fill.items()
        },
        image_mark_locations=image_mark_locations,
    )


def merge_image_mark_locations(parts: Iterable[LocationByIndexByMark]) -> LocationByIndexByMark:
    """Merge the image marks of several chunks of a batch, or batches of a task."""
    merged: LocationByIndexByMark = {}
    for marked in parts:
        for mark, samples in marked.items():
            merged.setdefault(mark, {}).update(samples)
    return merged


def draw_and_crop_views(
    image: Image.Image, image_digest: bytes, preprocessing: Preprocessing, view_count: int, seed: int
) -> npt.NDArray[np.uint8]:
    """Return augmented views of an image as input of a backbone: shape (views, y, x, channel).

    Their crops depend on the image's digest and the seed alone.
    """
    if not view_count:
        return np.empty((0, preprocessing.input_size, preprocessing.input_size, 3), dtype=np.uint8)
    crops = draw_crops(make_rng(seed, VIEW_STREAM, int.from_bytes(image_digest[:8], "little")), view_count, 1)
    return crop_image_views(image, preprocessing, crops)


def count_pixel_bytes(options: DecodingOptions, image_count: int) -> int:
    """Return the size of the pixel arrays of a number of images."""
    return (1 + options.views) * image_count * sum(3 * p.input_size**2 for p in options.preprocessings)


def split_into_pixel_arrays(
    buffer: npt.NDArray[np.uint8], options: DecodingOptions, image_count: int
) -> PixelArrays:
    """Return views of a buffer as the pixel arrays of a number of images, one after the other.

    Each has the shape (1 + views, images, y, x, channel).
    """
    arrays, start = {}, 0
    for preprocessing in options.preprocessings:
        shape = (1 + options.views, image_count, preprocessing.input_size, preprocessing.input_size, 3)
        end = start + int(np.prod(shape))
        arrays[preprocessing] = buffer[start:end].reshape(shape)
        start = end
    return arrays


def make_inline_decoder(decode: Callable[[bytes], Image.Image]) -> BatchDecoder:
    """Return a decoder that works in the calling thread."""
    return lambda batch, options: nullcontext(decode_batch(batch, decode, options))

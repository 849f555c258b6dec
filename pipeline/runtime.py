"""What a pass over images works with: threads, a way to decode, and forward passes.

On a CPU, each thread takes a batch all the way from encoded bytes to features, with operations that use no
other thread: decoding and computing overlap, no core waits for another, and no bit of a feature depends on
how many cores there are. On a GPU, processes decode, and one thread feeds the device.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.execution.allocator import LARGE_INPUT
from sfm.backbones.execution.modes import ExecutionOption
from sfm.backbones.execution.preparation import prepare_for_inference
from sfm.backbones.image_tensors import pixels_to_device
from sfm.pipeline.decoding import BatchDecoder, make_inline_decoder
from sfm.pipeline.decoding_processes import CHUNK_IMAGES, decoding_process_pool
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample, SampleFile

BATCH_IMAGES = {"cpu": 16, "cuda": 128}
"""Images that are decoded and seen together: on a core, what its cache holds; on a GPU, what fills it."""

LARGE_INPUT_BATCH_IMAGES = 8
"""Of those, on a core, how many large ones go through a backbone together: sixteen are no quicker, and take
half the memory again."""

MAX_DEVICE_BATCHES = 3
"""Batches that are at a GPU: while it computes one, the next is sent and features come back to be kept."""

ForwardFunction = Callable[[Backbone, Tensor, str], Tensor]
"""From a batch of images on a device, in a precision, to features there."""


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch's operations use one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def optimize_for_inference(
    backbones: Iterable[Backbone], precision: str, execution: ExecutionOption = "auto"
) -> list[Backbone]:
    """Return backbones that give the same features but for rounding, sooner where there is a way.

    How weights are laid out for that must not depend on the number of cores.
    """
    with one_torch_thread():
        return [
            prepare_for_inference(backbone, execution) if precision == "float32" else backbone
            for backbone in backbones
        ]


def choose_batch_size(backbone: Backbone) -> int:
    """Return how many images go through a backbone together, whatever others see them too."""
    large = backbone.card.preprocessing.input_size > LARGE_INPUT
    return (
        LARGE_INPUT_BATCH_IMAGES
        if large and backbone.device.type == "cpu"
        else BATCH_IMAGES[backbone.device.type]
    )


def pad_to_power_of_two(images: Tensor) -> Tensor:
    """Fill a batch up with black images, to a power of two.

    For every size of a batch cuDNN plans convolutions anew, which takes a second or more; tar shards end with
    batches of any size.
    """
    short = (1 << (len(images) - 1).bit_length()) - len(images)
    if not short:
        return images
    return torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, short))


def forward_batch(backbone: Backbone, images: Tensor, precision: str) -> Tensor:
    """Return the features of a batch of images, shape (n, D), as they come."""
    mixed = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), mixed:
        return backbone.features(images)


def compute_pixel_features(
    backbone: Backbone,
    pixels: npt.NDArray[np.uint8],
    precision: str = "float32",
    compute: ForwardFunction = forward_batch,
) -> npt.NDArray[np.float32]:
    """Return the features of images that are cropped for a backbone, float32, shape (n, D).

    Parameters
    ----------
    backbone : Backbone
    pixels : ndarray of uint8, shape (n, y, x, channel)
    precision : {"float32", "bf16"}
    compute : callable
        Does what :func:`forward_batch` does.
    """
    device, most, parts = backbone.device, choose_batch_size(backbone), []
    for start in range(0, len(pixels), most):
        images = pixels_to_device(pixels[start : start + most], device)
        found = compute(backbone, images if device.type == "cpu" else pad_to_power_of_two(images), precision)
        parts.append(found[: len(images)].float().cpu().numpy())
    return np.concatenate(parts)


def time_pixel_features(
    backbone: Backbone,
    pixels: npt.NDArray[np.uint8],
    precision: str,
    compute: ForwardFunction = forward_batch,
) -> tuple[npt.NDArray[np.float32], float]:
    """Return what :func:`compute_pixel_features` does, and the seconds that it took."""
    began = time.perf_counter()
    return compute_pixel_features(backbone, pixels, precision, compute), time.perf_counter() - began


@dataclass(frozen=True)
class ExtractionRuntime:
    """What a pass over images works with; one after the other may use it.

    Attributes
    ----------
    threads : int
        Batches in work at a time.
    reading : callable
        Reads samples that are files of their own, or leaves it to what decodes them.
    decoding : callable
        Decodes a batch, see `sfm.pipeline.decoding`.
    features : callable
        Does what :func:`time_pixel_features` does; the seconds are without waiting for a turn.
    """

    threads: int
    reading: Callable[[Iterable[Sample | SampleFile]], Iterable[Sample | SampleFile]]
    decoding: BatchDecoder
    features: Callable[[Backbone, npt.NDArray[np.uint8], str], tuple[npt.NDArray[np.float32], float]]


@contextmanager
def extraction_runtime(source: Source, device: str, count: int) -> Iterator[ExtractionRuntime]:
    """Provide for passes over a source.

    On a CPU every thread does all with a batch. For a GPU, processes read and decode, one for each core, and
    one thread computes: torch keeps for every thread by itself what cuDNN has planned for a convolution, and
    planning takes seconds for a backbone. Others send images and wait.

    Parameters
    ----------
    source : Source
    device : {"cpu", "cuda"}
    count : int
        Cores to use.

    Raises
    ------
    InputError
        If the source's decoder cannot be sent to other processes.
    """
    if device == "cpu":
        yield ExtractionRuntime(
            count, prefetch_samples, make_inline_decoder(source.decode), time_pixel_features
        )
        return
    # What keeps all processes busy, what is at the device, and one to come.
    batches = math.ceil(count * CHUNK_IMAGES / BATCH_IMAGES[device]) + MAX_DEVICE_BATCHES + 1
    gate = threading.Semaphore(MAX_DEVICE_BATCHES)
    with (
        decoding_process_pool(source.decode, count, batches) as decoding,
        ThreadPoolExecutor(1, thread_name_prefix="compute") as computing,
    ):

        def compute(backbone: Backbone, images: Tensor, precision: str) -> Tensor:
            return computing.submit(forward_batch, backbone, images, precision).result()

        def features(
            backbone: Backbone, pixels: npt.NDArray[np.uint8], precision: str
        ) -> tuple[npt.NDArray[np.float32], float]:
            with gate:
                return time_pixel_features(backbone, pixels, precision, compute)

        yield ExtractionRuntime(batches, iter, decoding, features)

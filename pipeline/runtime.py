"""Threads, decoders and forward passes of a pass over images.

On a CPU, each thread takes a batch from encoded bytes to features, with single-threaded operations: decoding
and computing overlap, no core waits for another, and features do not depend on the number of cores. For a
GPU, processes decode, and one thread feeds the device.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.execution.allocator import LARGE_INPUT
from sfm.backbones.execution.modes import ExecutionOption
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.backbones.image_tensors import pixels_to_tensor_on_device
from sfm.pipeline.decoding import BatchDecoder, make_inline_decoder
from sfm.pipeline.decoding_processes import CHUNK_IMAGES, decoding_process_pool
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample, SampleFile

BATCH_IMAGES = {"cpu": 16, "cuda": 128}
"""Images that are decoded together: on a core, as many as its cache holds; on a GPU, enough to fill it."""

LARGE_INPUT_BATCH_IMAGES = 8
"""Large images that go through a backbone together on a core: sixteen are no faster and take 1.5 times the
memory."""

MAX_DEVICE_BATCHES = 3
"""Batches on a GPU: while it computes one, the next is copied to it and features are copied back."""

ForwardFunction = Callable[[Backbone, Tensor, str], Tensor]
"""Computes the features of a batch of images on a device, in a precision."""


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limit torch's operations to one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def find_blas_libraries() -> ThreadpoolController:
    """Find the BLAS libraries of this process once: it takes milliseconds, and a fit limits them often."""
    return ThreadpoolController().select(user_api="blas")


def optimize_for_inference(
    backbones: Iterable[Backbone], precision: str, execution: ExecutionOption = "auto"
) -> list[Backbone]:
    """Return backbones that compute the same features faster, up to rounding, where that is possible.

    The layout of weights must not depend on the number of cores.
    """
    with one_torch_thread():
        return [
            optimize_for_cpu_inference(backbone, execution) if precision == "float32" else backbone
            for backbone in backbones
        ]


def choose_forward_batch_size(backbone: Backbone) -> int:
    """Return the batch size of a backbone."""
    large = backbone.card.preprocessing.input_size > LARGE_INPUT
    return (
        LARGE_INPUT_BATCH_IMAGES
        if large and backbone.device.type == "cpu"
        else BATCH_IMAGES[backbone.device.type]
    )


def pad_batch_to_power_of_two(image_batch: Tensor) -> Tensor:
    """Pad a batch with black images.

    cuDNN plans convolutions anew for every batch size, which takes a second or more; tar shards end with
    batches of any size.
    """
    padding = (1 << (len(image_batch) - 1).bit_length()) - len(image_batch)
    if not padding:
        return image_batch
    return torch.nn.functional.pad(image_batch, (0, 0, 0, 0, 0, 0, 0, padding))


def forward_batch(backbone: Backbone, images: Tensor, precision: str) -> Tensor:
    """Return the features of a batch of images, shape (n, D), in the precision of the forward pass."""
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), autocast:
        return backbone.features(images)


def compute_pixel_features(
    backbone: Backbone,
    pixels: npt.NDArray[np.uint8],
    precision: str = "float32",
    forward: ForwardFunction = forward_batch,
) -> npt.NDArray[np.float32]:
    """Return the features of images that are cropped for a backbone, float32, shape (n, D).

    Parameters
    ----------
    backbone : Backbone
    pixels : ndarray of uint8, shape (n, y, x, channel)
    precision : {"float32", "bf16"}
    forward : callable
        Signature and result of :func:`forward_batch`.
    """
    device, batch_size, parts = backbone.device, choose_forward_batch_size(backbone), []
    for start in range(0, len(pixels), batch_size):
        images = pixels_to_tensor_on_device(pixels[start : start + batch_size], device)
        rows = forward(
            backbone, images if device.type == "cpu" else pad_batch_to_power_of_two(images), precision
        )
        parts.append(rows[: len(images)].float().cpu().numpy())
    return np.concatenate(parts)


def compute_and_time_pixel_features(
    backbone: Backbone,
    pixels: npt.NDArray[np.uint8],
    precision: str,
    forward: ForwardFunction = forward_batch,
) -> tuple[npt.NDArray[np.float32], float]:
    """Return the result and the duration, in seconds, of :func:`compute_pixel_features`."""
    began = time.perf_counter()
    return compute_pixel_features(backbone, pixels, precision, forward), time.perf_counter() - began


@dataclass(frozen=True)
class ExtractionRuntime:
    """Resources of passes over images; passes may use it one after the other.

    Attributes
    ----------
    max_batches_in_flight : int
        As many threads are to drive the runtime.
    load_samples : callable
        Reads sample files, or leaves that to the decoder.
    decode_batch : callable
        See `sfm.pipeline.decoding.BatchDecoder`.
    compute_and_time_features : callable
        Signature and result of :func:`compute_and_time_pixel_features`; the seconds exclude waiting for the
        device.
    """

    max_batches_in_flight: int
    load_samples: Callable[[Iterable[Sample | SampleFile]], Iterable[Sample | SampleFile]]
    decode_batch: BatchDecoder
    compute_and_time_features: Callable[
        [Backbone, npt.NDArray[np.uint8], str], tuple[npt.NDArray[np.float32], float]
    ]


@contextmanager
def extraction_runtime(source: Source, device_type: str, core_count: int) -> Iterator[ExtractionRuntime]:
    """Start the threads and processes for passes over a source.

    On a CPU every thread reads, decodes and computes. For a GPU, processes read and decode, one per core, and
    one thread computes: torch keeps cuDNN's plans per thread, and planning takes seconds for a backbone.
    Other threads copy images and wait.

    Parameters
    ----------
    source : Source
    device_type : {"cpu", "cuda"}
    core_count : int
        Number of cores to use.

    Raises
    ------
    InputError
        If the source's decoder cannot be sent to other processes.
    """
    if device_type == "cpu":
        yield ExtractionRuntime(
            core_count, prefetch_samples, make_inline_decoder(source.decode), compute_and_time_pixel_features
        )
        return
    # Enough to keep all processes busy, those at the device, and the next one.
    batches = math.ceil(core_count * CHUNK_IMAGES / BATCH_IMAGES[device_type]) + MAX_DEVICE_BATCHES + 1
    device_slots = threading.Semaphore(MAX_DEVICE_BATCHES)
    with (
        decoding_process_pool(source.decode, core_count, batches) as decode_batch,
        ThreadPoolExecutor(1, thread_name_prefix="compute") as compute_thread,
    ):

        def forward_in_thread(backbone: Backbone, images: Tensor, precision: str) -> Tensor:
            return compute_thread.submit(forward_batch, backbone, images, precision).result()

        def compute_and_time_features(
            backbone: Backbone, pixels: npt.NDArray[np.uint8], precision: str
        ) -> tuple[npt.NDArray[np.float32], float]:
            with device_slots:
                return compute_and_time_pixel_features(backbone, pixels, precision, forward_in_thread)

        yield ExtractionRuntime(batches, iter, decode_batch, compute_and_time_features)

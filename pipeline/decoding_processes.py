"""Worker processes that read and decode images for a GPU.

Threads of one process share the interpreter lock. On a GPU a forward pass is hundreds of short calls, each of
which may wait for the lock: with many decoding threads the device is idle. A decoding process loads no
torch, so it starts quickly; its pixels lie in memory that it shares with this process.
"""

import math
import mmap
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple

import cloudpickle
import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.errors import InputError
from sfm.pipeline.decoding import (
    BatchDecoder,
    DecodedBatch,
    DecodingOptions,
    PixelArrays,
    SampleBatch,
    count_pixel_bytes,
    decode_batch,
    merge_image_mark_locations,
    split_into_pixel_arrays,
)
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.staging import IncompleteExtractionError

CHUNK_IMAGES = 32
"""Maximum number of images that a process decodes at a time: small enough that processes finish a
batch at about the same time, and large enough to amortise the messages."""


class SharedBuffer:
    """Memory that is shared with other processes: the pixels of a batch, then its encoded samples.

    Parameters
    ----------
    file : BinaryIO
        An in-memory file. Once it is closed, the buffer cannot grow.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = np.empty(0, dtype=np.uint8)

    def remap_if_smaller(self, min_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the buffer, mapped anew if it is smaller than a size that the file has."""
        if len(self.bytes) < min_bytes:
            self.bytes = np.frombuffer(mmap.mmap(self.file.fileno(), 0), dtype=np.uint8)
        return self.bytes

    def grow_and_remap_if_smaller(self, min_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the buffer, enlarged if it is smaller than a size."""
        if len(self.bytes) < min_bytes:
            # Reserve more: later batches may be larger, and untouched pages take no memory.
            self.file.truncate(min_bytes + min_bytes // 4)
        return self.remap_if_smaller(min_bytes)


@contextmanager
def decoding_process_pool(
    decode: Callable[[bytes], Image.Image], process_count: int, max_open_batches: int
) -> Iterator[BatchDecoder]:
    """Start processes that decode chunks of batches.

    Parameters
    ----------
    decode : callable
        As in `sfm.pipeline.sources.Source`; it is pickled.
    process_count : int
        Number of processes; they start at once, and end with the context or with this process.
    max_open_batches : int
        Number of batches that are decoded, or whose pixels are in use, at a time: further
        threads wait. Batches are cut into enough chunks to keep all processes busy with this number.

    Raises
    ------
    InputError
        If `decode` cannot be pickled; from the decoder, as
        :func:`~sfm.pipeline.decoding.decode_batch` does.
    RuntimeError
        From the decoder, if `decode` raises an unexpected error.
    IncompleteExtractionError
        From the decoder, if a process is lost.
    """
    pickled_decode = pickle_decode_function(decode)
    min_chunks = math.ceil(process_count / max_open_batches)
    idle_processes: SimpleQueue[ChunkDecoder] = SimpleQueue()
    free_buffers: SimpleQueue[tuple[int, SharedBuffer]] = SimpleQueue()

    def decode_chunk(chunk: BatchChunk) -> DecodedBatch:
        process = idle_processes.get()
        try:
            return process(chunk)
        finally:
            idle_processes.put(process)

    with ExitStack() as stack:
        files = [stack.enter_context(create_memfd_file()) for _ in range(max_open_batches)]
        for numbered_buffer in enumerate(map(SharedBuffer, files)):
            free_buffers.put(numbered_buffer)
        buffer_descriptors = [file.fileno() for file in files]
        for _ in range(process_count):
            idle_processes.put(stack.enter_context(decoding_process(pickled_decode, buffer_descriptors)))
        threads = stack.enter_context(ThreadPoolExecutor(process_count, thread_name_prefix="decode"))

        @contextmanager
        def decode_in_processes(batch: SampleBatch, options: DecodingOptions) -> Iterator[DecodedBatch]:
            number, buffer = free_buffers.get()
            futures: list[Future[DecodedBatch]] = []
            try:
                samples, end = write_loaded_samples_behind_pixels(batch, options, buffer)
                chunks = [
                    BatchChunk(number, end, options, len(samples), first, chunk_samples)
                    for first, chunk_samples in split_into_chunks_by_first_index(samples, min_chunks).items()
                ]
                for chunk in chunks:
                    futures.append(threads.submit(decode_chunk, chunk))
                decoded = [future.result() for future in futures]
                pixels = split_into_pixel_arrays(buffer.bytes, options, len(samples))
                yield merge_decoded_chunks(decoded, [chunk.first_index_in_batch for chunk in chunks], pixels)
            finally:
                # The processes write to the buffer until the last of them is done, also where one failed.
                wait(futures)
                free_buffers.put((number, buffer))

        yield decode_in_processes


def pickle_decode_function(decode: Callable[[bytes], Image.Image]) -> bytes:
    """Pickle a source's decode function.

    Raises
    ------
    InputError
        If it cannot be pickled.
    """
    try:
        pickled: bytes = cloudpickle.dumps(decode)
    except Exception as error:
        raise InputError(
            f"the decode function of the source cannot be sent to the decoding processes "
            f"({error}): make it picklable, or use --device cpu"
        ) from error
    return pickled


def create_memfd_file() -> BinaryIO:
    """Return a new in-memory file."""
    return os.fdopen(os.memfd_create("sfm-pixels"), "r+b", buffering=0)


SampleReference = tuple[int, str, str, tuple[int, int] | None]
"""Index of a sample in the task, its label, its name, and the start and end of its bytes in the buffer; None
if it is a file of its own, of that name."""


class BufferContents(NamedTuple):
    """What a shared buffer holds behind the pixels of a batch.

    Attributes
    ----------
    sample_references : list of SampleReference
        All samples of the batch.
    end_byte : int
        End of the last sample, from the start of the buffer.
    """

    sample_references: list[SampleReference]
    end_byte: int


@dataclass(frozen=True)
class BatchChunk:
    """Samples of a batch that one process decodes.

    Attributes
    ----------
    buffer_index, buffer_bytes : int
        Index of the shared buffer that holds the batch, and its size in bytes.
    options : DecodingOptions
    batch_image_count, first_index_in_batch : int
        Number of samples in the batch, and index in the batch of the first of this chunk.
    sample_references : list of SampleReference
    """

    buffer_index: int
    buffer_bytes: int
    options: DecodingOptions
    batch_image_count: int
    first_index_in_batch: int
    sample_references: list[SampleReference]


ChunkDecoder = Callable[[BatchChunk], DecodedBatch]
"""Decodes a chunk in another process; writes the pixels to the shared buffer."""


def write_loaded_samples_behind_pixels(
    batch: SampleBatch, options: DecodingOptions, buffer: SharedBuffer
) -> BufferContents:
    """Write the samples of a batch that are in memory to a shared buffer, behind the pixels."""
    end = count_pixel_bytes(options, len(batch))
    encoded_bytes = sum(len(sample.data) for _, sample in batch if isinstance(sample, Sample))
    memory = buffer.grow_and_remap_if_smaller(end + encoded_bytes)
    locations: list[SampleReference] = []
    for index, sample in batch:
        span = None
        if isinstance(sample, Sample):
            span = end, end + len(sample.data)
            memory.data[slice(*span)] = sample.data
            end = span[1]
        locations.append((index, sample.class_id, sample.location, span))
    return BufferContents(locations, end)


def split_into_chunks_by_first_index(
    sample_references: list[SampleReference], min_chunk_count: int
) -> dict[int, list[SampleReference]]:
    """Split samples into chunks of about equal size, by the index of the first sample of each.

    Parameters
    ----------
    min_chunk_count : int
        Number of chunks to make if there are enough samples.
    """
    count = max(
        math.ceil(len(sample_references) / CHUNK_IMAGES), min(len(sample_references), min_chunk_count)
    )
    bounds = np.linspace(0, len(sample_references), count + 1).round().astype(int).tolist()
    return {first: sample_references[first:last] for first, last in pairwise(bounds)}


def merge_decoded_chunks(
    chunks: Sequence[DecodedBatch], first_indices_in_batch: Sequence[int], batch_pixels: PixelArrays
) -> DecodedBatch:
    """Merge decoded chunks into one batch.

    Parameters
    ----------
    first_indices_in_batch : sequence of int
        Index of the first sample of each chunk.
    batch_pixels : dict of Preprocessing to ndarray of uint8
        Pixel arrays; within a chunk they have no gaps.
    """
    skipped = [skipped for chunk in chunks for skipped in chunk.skipped]
    if skipped:
        batch_pixels = {
            preprocessing: np.concatenate(
                [
                    rows[:, first : first + len(chunk.kept_indices_in_task)]
                    for chunk, first in zip(chunks, first_indices_in_batch, strict=True)
                ],
                axis=1,
            )
            for preprocessing, rows in batch_pixels.items()
        }
    return DecodedBatch(
        kept_indices_in_task=[index for chunk in chunks for index in chunk.kept_indices_in_task],
        kept_locations=[location for chunk in chunks for location in chunk.kept_locations],
        sample_digests=np.concatenate([chunk.sample_digests for chunk in chunks]),
        encoded_bytes_per_sample=[size for chunk in chunks for size in chunk.encoded_bytes_per_sample],
        skipped=skipped,
        thread_seconds=sum(chunk.thread_seconds for chunk in chunks),
        pixels=batch_pixels,
        image_mark_locations=merge_image_mark_locations(chunk.image_mark_locations for chunk in chunks),
    )


@contextmanager
def decoding_process(pickled_decode: bytes, buffer_descriptors: Sequence[int]) -> Iterator[ChunkDecoder]:
    """Start a decoding process, and yield a function that decodes chunks in it.

    Parameters
    ----------
    pickled_decode : bytes
        The ``decode`` of a `sfm.pipeline.sources.Source`.
    buffer_descriptors : sequence of int
        File descriptors of the shared buffers.
    """
    with ExitStack() as stack:
        own_end, other_end = (stack.enter_context(end) for end in Pipe())
        path = [str(folder) for folder in sys.path]
        arguments = f"{other_end.fileno()}, {list(buffer_descriptors)}"
        program = (
            f"import sys; sys.path[:] = {path!r}; "
            f"from {__name__} import serve_decoding_requests; serve_decoding_requests({arguments})"
        )
        # In a new session: only the parent process gets Ctrl-C, and it ends this one.
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[other_end.fileno(), *buffer_descriptors],
            start_new_session=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        other_end.close()
        initialised = False

        def decode_chunk(chunk: BatchChunk) -> DecodedBatch:
            nonlocal initialised
            try:
                if not initialised:
                    own_end.send_bytes(pickled_decode)
                    initialised = True
                own_end.send(chunk)
                answer: DecodedBatch | Exception = own_end.recv()
            except (EOFError, OSError) as error:
                raise IncompleteExtractionError(
                    "a process that decodes images died, perhaps out of memory: run the same command again "
                    "to resume after the last complete partition"
                ) from error
            if isinstance(answer, Exception):
                raise answer
            return answer

        yield decode_chunk


def serve_decoding_requests(connection_descriptor: int, buffer_descriptors: Sequence[int]) -> None:
    """Decode chunks for the parent process until it closes the connection.

    Parameters
    ----------
    connection_descriptor : int
        File descriptor of the connection.
    buffer_descriptors : sequence of int
        File descriptors of the shared buffers.
    """
    connection = Connection(connection_descriptor)
    buffers = [SharedBuffer(os.fdopen(descriptor, "r+b", buffering=0)) for descriptor in buffer_descriptors]
    try:
        pickled_decode, decode = connection.recv_bytes(), None
        while True:
            chunk: BatchChunk = connection.recv()
            memory = buffers[chunk.buffer_index].remap_if_smaller(chunk.buffer_bytes)
            batch: SampleBatch = [
                (
                    index,
                    Sample(memory[slice(*span)].tobytes(), label, location)
                    if span
                    else SampleFile(location, label),
                )
                for index, label, location, span in chunk.sample_references
            ]
            pixels = {
                preprocessing: rows[:, chunk.first_index_in_batch : chunk.first_index_in_batch + len(batch)]
                for preprocessing, rows in split_into_pixel_arrays(
                    memory, chunk.options, chunk.batch_image_count
                ).items()
            }
            answer: DecodedBatch | Exception
            try:
                # Only the parent process can have sent it.
                decode = decode or pickle.loads(pickled_decode)  # noqa: S301
                answer = replace(decode_batch(batch, decode, chunk.options, pixels), pixels={})
            except InputError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - the parent process raises it
                # Not every exception can be pickled.
                answer = RuntimeError("".join(traceback.format_exception(error)))
            connection.send(answer)
    except (EOFError, ConnectionError):
        return

"""Processes that do nothing but read and decode, for a GPU.

Threads of one process take turns at whatever Python does between the calls of image libraries. On a GPU a
forward pass is hundreds of short calls, each of which may have to wait for its turn: many threads that decode
leave the device idle. A process that decodes loads no torch, so that it is there at once; what it crops lies
in memory that it shares with this process.
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
from typing import BinaryIO

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
    merge_marks,
    split_into_pixel_arrays,
)
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.staging import IncompleteExtractionError

CHUNK_IMAGES = 32
"""Images that a process decodes at a time, at most: few, so that none works long on the last ones while
others are done, and a batch is soon there; and enough to be worth the asking."""


class SharedBuffer:
    """Memory that is shared with other processes: the pixels of a batch, then its encoded samples.

    Parameters
    ----------
    file : BinaryIO
        In memory. Once it is closed, the memory cannot grow.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = np.empty(0, dtype=np.uint8)

    def seen(self, size: int) -> npt.NDArray[np.uint8]:
        """Return the memory, of so many bytes at least, which the file has."""
        if len(self.bytes) < size:
            self.bytes = np.frombuffer(mmap.mmap(self.file.fileno(), 0), dtype=np.uint8)
        return self.bytes

    def grown(self, size: int) -> npt.NDArray[np.uint8]:
        """Return the memory, made larger where need be."""
        if len(self.bytes) < size:
            # Rarely: other batches have somewhat larger samples, and what is not touched takes no memory.
            self.file.truncate(size + size // 4)
        return self.seen(size)


@contextmanager
def decoding_process_pool(
    decode: Callable[[bytes], Image.Image], count: int, batches: int
) -> Iterator[BatchDecoder]:
    """Have processes decode, a part of a batch each.

    Parameters
    ----------
    decode : callable
        As in `sfm.pipeline.sources.Source`; it is sent to them.
    count : int
        Processes; they are started at once, and end with the context, or with this process.
    batches : int
        That are decoded, or whose pixels are in use, at a time: a thread that asks for one more waits. Small
        ones are cut into parts enough for so many to keep all processes busy.

    Raises
    ------
    InputError
        If `decode` cannot be sent; when asked, as :func:`~sfm.pipeline.decoding.decode_batch` does.
    RuntimeError
        When asked, if the decoder raises what it should not.
    Unfinished
        When asked, if a process is lost.
    """
    try:
        sent = cloudpickle.dumps(decode)
    except Exception as error:
        raise InputError(
            f"what decodes the images cannot be sent to the processes that decode for a GPU "
            f"({error}): have the source's decode hold only what can be pickled, or use --device cpu"
        ) from error
    least = math.ceil(count / batches)
    idle: SimpleQueue[ChunkDecoder] = SimpleQueue()
    free: SimpleQueue[tuple[int, SharedBuffer]] = SimpleQueue()

    def answered(part: BatchChunk) -> DecodedBatch:
        ask = idle.get()
        try:
            return ask(part)
        finally:
            idle.put(ask)

    with ExitStack() as stack:
        files = [stack.enter_context(create_memory_file()) for _ in range(batches)]
        for numbered in enumerate(map(SharedBuffer, files)):
            free.put(numbered)
        for _ in range(count):
            idle.put(stack.enter_context(decoding_process(sent, [file.fileno() for file in files])))
        asking = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="ask"))

        @contextmanager
        def decoded(batch: SampleBatch, wanted: DecodingOptions) -> Iterator[DecodedBatch]:
            number, memory = free.get()
            answers: list[Future[DecodedBatch]] = []
            try:
                rows, end = write_samples(batch, wanted, memory)
                parts = [
                    BatchChunk(number, end, wanted, len(rows), *cut) for cut in split_into_chunks(rows, least)
                ]
                for part in parts:
                    answers.append(asking.submit(answered, part))
                found = [answer.result() for answer in answers]
                yield merge_chunks(
                    found,
                    [part.first for part in parts],
                    split_into_pixel_arrays(memory.bytes, wanted, len(rows)),
                )
            finally:
                # The memory is theirs until the last of them is done, also where one of them has failed.
                wait(answers)
                free.put((number, memory))

        yield decoded


def create_memory_file() -> BinaryIO:
    """Return a file in memory."""
    return os.fdopen(os.memfd_create("sfm-pixels"), "r+b", buffering=0)


SampleLocation = tuple[int, str, str, tuple[int, int] | None]
"""Of a sample its place in the task, its label, what names it, and where its bytes begin and end in shared
memory; None if it is a file of its own, of that name."""


@dataclass(frozen=True)
class BatchChunk:
    """Some samples of a batch, for a process to decode.

    Attributes
    ----------
    memory, size : int
        Number of the shared memory where the batch is, and how many bytes are there.
    wanted : Wanted
    images, first : int
        Samples in the batch, and the place of the first of these among them.
    rows : list of Row
    """

    memory: int
    size: int
    wanted: DecodingOptions
    images: int
    first: int
    rows: list[SampleLocation]


ChunkDecoder = Callable[[BatchChunk], DecodedBatch]
"""Asks a process; the pixels of its answer are in the shared memory."""


def write_samples(
    batch: SampleBatch, wanted: DecodingOptions, memory: SharedBuffer
) -> tuple[list[SampleLocation], int]:
    """Lay the samples of a batch that are read down in shared memory, behind its pixels.

    Returns
    -------
    list of Row
    int
        Where the last one ends.
    """
    end = count_pixel_bytes(wanted, len(batch))
    whole = memory.grown(end + sum(len(sample.data) for _, sample in batch if isinstance(sample, Sample)))
    rows: list[SampleLocation] = []
    for place, sample in batch:
        span = None
        if isinstance(sample, Sample):
            span = end, end + len(sample.data)
            whole.data[slice(*span)] = sample.data
            end = span[1]
        rows.append((place, sample.label, sample.where, span))
    return rows, end


def split_into_chunks(rows: list[SampleLocation], least: int) -> list[tuple[int, list[SampleLocation]]]:
    """Cut rows into parts that are alike, each with the place of its first row.

    Parameters
    ----------
    least : int
        Parts there should be, as far as there are rows.
    """
    count = max(math.ceil(len(rows) / CHUNK_IMAGES), min(len(rows), least))
    places = np.linspace(0, len(rows), count + 1).round().astype(int).tolist()
    return [(first, rows[first:last]) for first, last in pairwise(places)]


def merge_chunks(parts: Sequence[DecodedBatch], firsts: Sequence[int], whole: PixelArrays) -> DecodedBatch:
    """Return a batch from its parts.

    Parameters
    ----------
    firsts : sequence of int
        Where each part begins.
    whole : dict of Preprocessing to ndarray of uint8
        The pixels of the batch; those of each part have no gaps.
    """
    skipped = [skipped for part in parts for skipped in part.skipped]
    if skipped:
        whole = {
            preprocessing: np.concatenate(
                [rows[:, first : first + len(part.kept)] for part, first in zip(parts, firsts, strict=True)],
                axis=1,
            )
            for preprocessing, rows in whole.items()
        }
    return DecodedBatch(
        kept=[place for part in parts for place in part.kept],
        where=[where for part in parts for where in part.where],
        digests=np.concatenate([part.digests for part in parts]),
        sizes=[size for part in parts for size in part.sizes],
        skipped=skipped,
        seconds=sum(part.seconds for part in parts),
        pixels=whole,
        marked=merge_marks(part.marked for part in parts),
    )


@contextmanager
def decoding_process(decode: bytes, memories: Sequence[int]) -> Iterator[ChunkDecoder]:
    """Start a process that decodes, and return how to ask it.

    Parameters
    ----------
    decode : bytes
        Pickled; as in `sfm.pipeline.sources.Source`.
    memories : sequence of int
        File descriptors of the memories that are shared with it.
    """
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in Pipe())
        path = [str(folder) for folder in sys.path]
        given = f"{theirs.fileno()}, {list(memories)}"
        program = (
            f"import sys; sys.path[:] = {path!r}; from {__name__} import serve_chunks; serve_chunks({given})"
        )
        # In a session of its own: Ctrl-C is for the process that started it, which ends it.
        process = subprocess.Popen(
            [sys.executable, "-c", program], pass_fds=[theirs.fileno(), *memories], start_new_session=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        theirs.close()
        told = False

        def ask(part: BatchChunk) -> DecodedBatch:
            nonlocal told
            try:
                if not told:
                    ours.send_bytes(decode)
                    told = True
                ours.send(part)
                answer: DecodedBatch | Exception = ours.recv()
            except (EOFError, OSError) as error:
                raise IncompleteExtractionError(
                    "a process that decodes images was lost, perhaps for want of memory: run the "
                    "same command again; an extraction goes on from the last complete partition"
                ) from error
            if isinstance(answer, Exception):
                raise answer
            return answer

        yield ask


def serve_chunks(connection: int, descriptors: Sequence[int]) -> None:
    """Decode parts of batches for the process at the other end of a connection until it hangs up.

    Parameters
    ----------
    connection : int
        File descriptor.
    descriptors : sequence of int
        File descriptors of the shared memories.
    """
    asking = Connection(connection)
    memories = [SharedBuffer(os.fdopen(descriptor, "r+b", buffering=0)) for descriptor in descriptors]
    try:
        sent, decode = asking.recv_bytes(), None
        while True:
            part: BatchChunk = asking.recv()
            memory = memories[part.memory].seen(part.size)
            batch: SampleBatch = [
                (
                    place,
                    Sample(memory[slice(*span)].tobytes(), label, where)
                    if span
                    else SampleFile(where, label),
                )
                for place, label, where, span in part.rows
            ]
            pixels = {
                preprocessing: rows[:, part.first : part.first + len(batch)]
                for preprocessing, rows in split_into_pixel_arrays(memory, part.wanted, part.images).items()
            }
            answer: DecodedBatch | Exception
            try:
                # From the process that started this one, and from nobody else.
                decode = decode or pickle.loads(sent)  # noqa: S301
                answer = replace(decode_batch(batch, decode, part.wanted, pixels), pixels={})
            except InputError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - the process that asks raises it
                # Not every exception can be sent.
                answer = RuntimeError("".join(traceback.format_exception(error)))
            asking.send(answer)
    except (EOFError, ConnectionError):
        return

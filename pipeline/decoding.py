"""From encoded samples to what backbones are fed with: each decoded once, and cropped for each of them.

In this process, or in processes that do nothing else. Threads of one process take turns at whatever Python
does between the calls of image libraries. On a GPU a forward pass is hundreds of short calls, each of which
may have to wait for its turn: many threads that decode leave the device idle. A process that decodes loads
no torch, so that it is there at once; what it crops lies in memory that it shares with this process.
"""

import mmap
import os
import pickle
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Literal

import cloudpickle
import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.crops import draw_crops, stream
from sfm.backbones.preprocess import crop, look_through
from sfm.errors import InputError
from sfm.pipeline.fingerprint import sample_digest
from sfm.pipeline.sources.source import Sample
from sfm.pipeline.staging import Skipped, Unfinished

VIEWS = 5
"""Purpose of the random streams that views are drawn from."""

UNDECODABLE = (
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

Batch = Sequence[tuple[int, Sample]]
"""Samples, each with its place in the task."""


@dataclass(frozen=True)
class Wanted:
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
    """

    preprocessings: tuple[Preprocessing, ...]
    views: int = 0
    seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class Decoded:
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
        What it took.
    pixels : dict of Preprocessing to ndarray of uint8, shape (1 + views, n, y, x, channel)
        The images, then their views.
    """

    kept: list[int]
    where: list[str]
    digests: npt.NDArray[np.uint8]
    sizes: list[int]
    skipped: list[Skipped]
    seconds: float
    pixels: dict[Preprocessing, npt.NDArray[np.uint8]] = field(default_factory=dict)


Decoding = Callable[[Batch, Wanted], AbstractContextManager[Decoded]]
"""Decodes a batch; its pixels are there within the context only."""


def decode_batch(
    batch: Batch,
    decode: Callable[[bytes], Image.Image],
    wanted: Wanted,
    memory: npt.NDArray[np.uint8] | None = None,
) -> Decoded:
    """Decode samples and crop them.

    Parameters
    ----------
    batch : sequence of (int, Sample)
    decode : callable
        As in `sfm.pipeline.sources.Source`.
    wanted : Wanted
    memory : ndarray of uint8, optional
        Where the pixels are to be, see :func:`pixels_in`.

    Raises
    ------
    InputError
        If a sample cannot be decoded and is not to be skipped; names it.
    """
    began = time.perf_counter()
    if memory is None:
        memory = np.empty(pixel_bytes(wanted, len(batch)), dtype=np.uint8)
    pixels = pixels_in(memory, wanted, len(batch))
    kept: list[tuple[int, Sample, bytes]] = []
    skipped: list[Skipped] = []
    for place, sample in batch:
        try:
            image, digest = decode(sample.data), sample_digest(sample.data)
            for preprocessing, all_rows in pixels.items():
                rows = all_rows[:, len(kept)]
                rows[0] = crop(image, preprocessing)
                rows[1:] = views_of(image, digest, preprocessing, wanted.views, wanted.seed)
            kept.append((place, sample, digest))
        except UNDECODABLE as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            if wanted.on_error == "fail":
                raise InputError(
                    f"cannot decode {sample.where}: {why}; repair or remove it, or leave out what cannot be "
                    f"decoded with --on-error skip"
                ) from error
            skipped.append(Skipped(place, sample.where, why))
    return Decoded(
        kept=[place for place, _, _ in kept],
        where=[sample.where for _, sample, _ in kept],
        digests=np.array([list(digest) for _, _, digest in kept], dtype=np.uint8).reshape(-1, 32),
        sizes=[len(sample.data) for _, sample, _ in kept],
        skipped=skipped,
        seconds=time.perf_counter() - began,
        pixels={preprocessing: rows[:, : len(kept)] for preprocessing, rows in pixels.items()},
    )


def views_of(
    image: Image.Image, digest: bytes, preprocessing: Preprocessing, views: int, seed: int
) -> npt.NDArray[np.uint8]:
    """Return augmented views of an image as a backbone is fed with them: shape (views, y, x, channel).

    Where they look depends on the image's digest and the seed alone, whenever and wherever it is read.
    """
    if not views:
        return np.empty((0, preprocessing.input_size, preprocessing.input_size, 3), dtype=np.uint8)
    crops = draw_crops(stream(seed, VIEWS, int.from_bytes(digest[:8], "little")), views, 1)
    return look_through(image, preprocessing, crops)


def pixel_bytes(wanted: Wanted, images: int) -> int:
    """Return the size of the pixels of so many images."""
    return (1 + wanted.views) * images * sum(3 * p.input_size**2 for p in wanted.preprocessings)


def pixels_in(
    memory: npt.NDArray[np.uint8], wanted: Wanted, images: int
) -> dict[Preprocessing, npt.NDArray[np.uint8]]:
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


def decoding_here(decode: Callable[[bytes], Image.Image]) -> Decoding:
    """Have the thread that asks decode."""
    return lambda batch, wanted: nullcontext(decode_batch(batch, decode, wanted))


@contextmanager
def decoding_in_processes(decode: Callable[[bytes], Image.Image], count: int) -> Iterator[Decoding]:
    """Have processes decode, each for one thread at a time; a thread that asks waits for one that is free.

    Parameters
    ----------
    decode : callable
        As in `sfm.pipeline.sources.Source`; it is sent to them.
    count : int
        Processes; they are started at once, and end with the context, or with this process.

    Raises
    ------
    InputError
        If `decode` cannot be sent.
    """
    try:
        sent = cloudpickle.dumps(decode)
    except Exception as error:
        raise InputError(
            f"what decodes the images cannot be sent to the processes that decode for a GPU ({error}): have "
            f"the source's decode hold only what can be pickled, or use --device cpu"
        ) from error
    free: SimpleQueue[Callable[[Batch, Wanted], Decoded]] = SimpleQueue()

    @contextmanager
    def decoded(batch: Batch, wanted: Wanted) -> Iterator[Decoded]:
        process = free.get()
        try:
            yield process(batch, wanted)
        finally:
            free.put(process)

    with ExitStack() as processes:
        for _ in range(count):
            free.put(processes.enter_context(decoding_process(sent)))
        yield decoded


@contextmanager
def decoding_process(decode: bytes) -> Iterator[Callable[[Batch, Wanted], Decoded]]:
    """Start a process that decodes batches, and return how to ask it.

    The pixels of an answer are there until the next.

    Parameters
    ----------
    decode : bytes
        Pickled; as in `sfm.pipeline.sources.Source`.

    Raises
    ------
    InputError
        When asked, as :func:`decode_batch` does.
    RuntimeError
        When asked, if the decoder raises what it should not.
    Unfinished
        When asked, if the process is lost.
    """
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in Pipe())
        file = stack.enter_context(os.fdopen(os.memfd_create("sfm-pixels"), "r+b", buffering=0))
        ends = (theirs.fileno(), file.fileno())
        path = [str(folder) for folder in sys.path]
        program = f"import sys; sys.path[:] = {path!r}; from sfm.pipeline.decoding import serve; serve{ends}"
        # In a session of its own: Ctrl-C is for the process that started it, which ends it.
        process = subprocess.Popen([sys.executable, "-c", program], pass_fds=ends, start_new_session=True)
        stack.callback(process.wait)
        stack.callback(process.kill)
        theirs.close()
        memory, told = np.empty(0, dtype=np.uint8), False

        def ask(batch: Batch, wanted: Wanted) -> Decoded:
            nonlocal memory, told
            sizes = [len(sample.data) for _, sample in batch]
            start = pixel_bytes(wanted, len(batch))
            try:
                if len(memory) < start + sum(sizes):
                    # Rarely: other batches have somewhat larger files.
                    file.truncate(start + 2 * sum(sizes))
                    memory = shared(file.fileno())
                for (_, sample), size in zip(batch, sizes, strict=True):
                    memory.data[start : start + size] = sample.data
                    start += size
                rows = [(place, sample.label, sample.where) for place, sample in batch]
                if not told:
                    ours.send_bytes(decode)
                    told = True
                ours.send((wanted, rows, sizes))
                answer: Decoded | Exception = ours.recv()
            except (EOFError, OSError) as error:
                raise Unfinished(
                    "a process that decodes images was lost, perhaps for want of memory: run the same "
                    "command again; an extraction goes on from the last complete partition"
                ) from error
            if isinstance(answer, Exception):
                raise answer
            pixels = pixels_in(memory, wanted, len(batch))
            return replace(answer, pixels={p: rows[:, : len(answer.kept)] for p, rows in pixels.items()})

        yield ask


def shared(descriptor: int) -> npt.NDArray[np.uint8]:
    """Return the memory behind a descriptor, all of it."""
    return np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8)


def serve(connection: int, descriptor: int) -> None:
    """Decode batches for the process at the other end of a connection until it hangs up.

    Parameters
    ----------
    connection, descriptor : int
        File descriptors, of the connection and of shared memory: the pixels, then the encoded samples.
    """
    asking = Connection(connection)
    memory = np.empty(0, dtype=np.uint8)
    try:
        sent, decode = asking.recv_bytes(), None
        while True:
            wanted, rows, sizes = asking.recv()
            start = pixel_bytes(wanted, len(rows))
            if len(memory) < start + sum(sizes):
                memory = shared(descriptor)
            batch = []
            for (place, label, where), size in zip(rows, sizes, strict=True):
                batch.append((place, Sample(memory[start : start + size].tobytes(), label, where)))
                start += size
            answer: Decoded | Exception
            try:
                # From the process that started this one, and from nobody else.
                decode = decode or pickle.loads(sent)  # noqa: S301
                answer = replace(decode_batch(batch, decode, wanted, memory), pixels={})
            except InputError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - the process that asks raises it
                # Not every exception can be sent.
                answer = RuntimeError("".join(traceback.format_exception(error)))
            asking.send(answer)
    except (EOFError, ConnectionError):
        return

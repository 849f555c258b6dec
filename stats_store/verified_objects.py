"""Zarr stores that compare every object with its published digest on reading, or record it on writing."""

import asyncio
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import obstore
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore, WrapperStore

from sfm.errors import DamageError, InputError
from sfm.stats_store.array_layouts import ArrayLayout
from sfm.stats_store.cards import ObjectRecord
from sfm.stats_store.concurrency import run_in_daemon_thread
from sfm.stats_store.objects import create_object_unless_identical, read_object

DECODE_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SystemError,
)
"""Exceptions that zarr and its codecs raise for bytes that are not a valid array."""


def make_object_record(data: bytes) -> ObjectRecord:
    """Return the record of an object for its commit: size and SHA-256."""
    return ObjectRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def require_published_bytes(path: str, data: bytes | memoryview, record: ObjectRecord) -> None:
    """Compare the bytes of an object with its record in the commit.

    Raises
    ------
    DamageError
        If size or SHA-256 differ; names the object.
    """
    if len(data) != record.size:
        raise DamageError(f"damaged object {path}: {len(data)} bytes, {record.size} were published")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DamageError(f"damaged object {path}: its SHA-256 is not the published one")


def read_published_object(objects: obstore.store.ObjectStore, path: str, record: ObjectRecord) -> bytes:
    """Read an object and compare it with its record.

    Raises
    ------
    DamageError
        If it is missing or differs from its record; names it.
    """

    def check_record(data: bytes) -> bytes:
        require_published_bytes(path, data, record)
        return data

    try:
        return read_object(objects, path, check_record, record.size)
    except FileNotFoundError as error:
        raise DamageError(f"missing object {path}: it was published and is gone") from error


@contextmanager
def translate_array_decode_errors(path: str) -> Iterator[None]:
    """Translate the errors of zarr about an array that it cannot decode.

    The bytes are the published ones, so the writer wrote an invalid array.

    Raises
    ------
    DamageError
        Names the array.
    """
    try:
        yield
    except InputError:
        raise
    except DECODE_ERRORS as error:
        raise DamageError(f"damaged array {path}: it cannot be decoded ({type(error).__name__})") from error


class VerifiedZarrStore(WrapperStore[ObjectStore[Any]]):
    """A read-only Zarr store that compares every object with the commit of its run.

    Objects are always read completely, since only complete objects have a digest. The
    CRC32C of chunks protects plain Zarr readers; only the digest reveals two chunks that were swapped.

    Parameters
    ----------
    store : zarr.storage.ObjectStore
    records_by_path : mapping of str to ObjectRecord
        By full path. Objects without a record do not exist; objects with one must exist.
    known_objects_by_path : mapping of str to bytes
        Objects that were read and compared before; they are not read again.
    layouts_by_path : mapping of str to ArrayLayout
        All arrays that can be opened, by full path; see
        :func:`~sfm.stats_store.array_layouts.parse_layouts_by_path_and_problems`.
    """

    def __init__(
        self,
        store: ObjectStore[Any],
        records_by_path: Mapping[str, ObjectRecord],
        known_objects_by_path: Mapping[str, bytes],
        layouts_by_path: Mapping[str, ArrayLayout],
    ) -> None:
        super().__init__(store)
        self._records_by_path, self._known_objects_by_path = records_by_path, known_objects_by_path
        self.layouts_by_path = layouts_by_path

    def _with_store(self, store: Store) -> "VerifiedZarrStore":
        assert isinstance(store, ObjectStore)
        return VerifiedZarrStore(
            store, self._records_by_path, self._known_objects_by_path, self.layouts_by_path
        )

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object or a range of it, after comparing all of it with its record."""
        record = self._records_by_path.get(key)
        if record is None:
            if key.endswith("zarr.json"):
                return None
            # Empty chunks are written too: a chunk without a record means a damaged commit, not zeros.
            raise DamageError(f"missing object {key}: the commit does not list it")
        data = self._known_objects_by_path.get(key)
        if data is None:
            data = await asyncio.to_thread(read_published_object, self._store.store, key, record)
        array_path, is_chunk, _ = key.partition("/c/")
        chunk_problem = (
            self.layouts_by_path[array_path].find_encoded_chunk_size_problem(data) if is_chunk else None
        )
        if chunk_problem:
            # Checked before decoding, which would allocate the size that the chunk claims.
            raise DamageError(f"damaged object {key}: {chunk_problem}")
        return prototype.buffer.from_bytes(_select_byte_range(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return ranges of objects, each after comparing the complete object with its record."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]


class RecordingZarrStore(WrapperStore[ObjectStore[Any]]):
    """A Zarr store that writes one run, and records size and SHA-256 of every object.

    No other process writes that run, so objects that were not written here do not exist. Not requesting them
    saves most requests of creating an array.

    Parameters
    ----------
    store : zarr.storage.ObjectStore
    run_id : str
        Id of the run.
    records_by_path : dict of str to ObjectRecord
        Records by full path; every written object is added.
    """

    def __init__(
        self, store: ObjectStore[Any], run_id: str, records_by_path: dict[str, ObjectRecord]
    ) -> None:
        super().__init__(store)
        self._run_id, self._records_by_path = run_id, records_by_path

    def _with_store(self, store: Store) -> "RecordingZarrStore":
        assert isinstance(store, ObjectStore)
        return RecordingZarrStore(store, self._run_id, self._records_by_path)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object that was written before, or None."""
        return await self._store.get(key, prototype, byte_range) if key in self._records_by_path else None

    async def set(self, key: str, value: Buffer) -> None:
        """Create an object and record it; every object is written once."""
        data = value.to_bytes()
        # A daemon thread: an interrupt does not wait for a server that does not answer.
        await run_in_daemon_thread(lambda: create_object_unless_identical(self._store.store, key, data))
        self._records_by_path[key] = make_object_record(data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Create the metadata of a group between the run and an array, unless it was written before.

        The metadata of the run itself holds the cards, and is created with them.
        """
        run = f"runs/{self._run_id}/"
        if key.startswith(run) and key != f"{run}zarr.json" and key not in self._records_by_path:
            await self.set(key, value)


def _select_byte_range(data: bytes, byte_range: ByteRequest | None) -> bytes:
    match byte_range:
        case None:
            return data
        case RangeByteRequest(start=start, end=end):
            return data[start:end]
        case OffsetByteRequest(offset=offset):
            return data[offset:]
        case SuffixByteRequest(suffix=suffix):
            return data[-suffix:] if suffix else b""

"""Zarr stores that compare bytes: with what was published when they read, or for it when they write."""

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
from sfm.stats_store.cards import ObjectRecord
from sfm.stats_store.concurrency import in_daemon_thread
from sfm.stats_store.declared import Layout
from sfm.stats_store.objects import read_object, write_object

UNDECODABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, SystemError)
"""What zarr and its codecs raise for bytes that are no array."""


def record_of(data: bytes) -> ObjectRecord:
    """Return what a commit says of an object with this content."""
    return ObjectRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def require_published(path: str, data: bytes | memoryview, record: ObjectRecord) -> None:
    """Compare an object with its record in the commit.

    Raises
    ------
    DamageError
        If size or SHA-256 differ; names the object.
    """
    if len(data) != record.size:
        raise DamageError(f"damaged object {path}: {len(data)} bytes, {record.size} were published")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DamageError(f"damaged object {path}: its SHA-256 is not the published one")


def read_published(objects: obstore.store.ObjectStore, path: str, record: ObjectRecord) -> bytes:
    """Read an object and compare it with its record.

    Raises
    ------
    DamageError
        If it is gone or is not what was published; names it.
    """

    def published(data: bytes) -> bytes:
        require_published(path, data, record)
        return data

    try:
        return read_object(objects, path, published, record.size)
    except FileNotFoundError as error:
        raise DamageError(f"missing object {path}: it was published and is gone") from error


@contextmanager
def decoding(path: str) -> Iterator[None]:
    """Report an array that zarr cannot decode.

    Its bytes are the published ones, so its writer was at fault.

    Raises
    ------
    DamageError
        Names the array.
    """
    try:
        yield
    except InputError:
        raise
    except UNDECODABLE as error:
        raise DamageError(f"damaged array {path}: it cannot be decoded ({type(error).__name__})") from error


class VerifiedStore(WrapperStore[ObjectStore[Any]]):
    """Checks every object it hands out against the commit of one run.

    Objects are read whole, whatever range was asked for, since only whole objects have a digest. CRC32C in
    the chunks protects plain Zarr readers; it cannot notice two chunks that were swapped, the digest does.

    Parameters
    ----------
    store : zarr.storage.ObjectStore
    records : mapping of str to ObjectRecord
        By full path. An object that is not listed does not exist; one that is listed must.
    read : mapping of str to bytes
        Objects that were read and compared before; they are not asked for again.
    layouts : mapping of str to Layout
        Arrays by full path, as :func:`~sfm.stats_store.declared.find_layouts` gives them: all there are.
    """

    def __init__(
        self,
        store: ObjectStore[Any],
        records: Mapping[str, ObjectRecord],
        read: Mapping[str, bytes],
        layouts: Mapping[str, Layout],
    ) -> None:
        super().__init__(store)
        self._records, self._read, self.layouts = records, read, layouts

    def _with_store(self, store: Store) -> "VerifiedStore":
        assert isinstance(store, ObjectStore)
        return VerifiedStore(store, self._records, self._read, self.layouts)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object, or the asked part of it, after comparing the whole with its record."""
        record = self._records.get(key)
        if record is None:
            if key.endswith("zarr.json"):
                return None
            # Every chunk is written, so a chunk without a record is no chunk of zeros but a torn commit.
            raise DamageError(f"missing object {key}: the commit does not list it")
        data = self._read.get(key)
        if data is None:
            data = await asyncio.to_thread(read_published, self._store.store, key, record)
        array, is_chunk, _ = key.partition("/c/")
        problem = self.layouts[array].chunk_problem(data) if is_chunk else None
        if problem:
            # Before it is decoded: that would take what it claims.
            raise DamageError(f"damaged object {key}: {problem}")
        return prototype.buffer.from_bytes(_part(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of objects, each after comparing the whole with its record."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]


class RecordingStore(WrapperStore[ObjectStore[Any]]):
    """Writes one run, and notes size and SHA-256 of every object.

    Nobody else writes there, so that what was not written through it does not exist; not asking saves most of
    the requests that creating an array costs.

    Parameters
    ----------
    store : zarr.storage.ObjectStore
    run : str
        Id of the run.
    written : dict of str to ObjectRecord
        By full path; is added to.
    """

    def __init__(self, store: ObjectStore[Any], run: str, written: dict[str, ObjectRecord]) -> None:
        super().__init__(store)
        self._run, self._written = run, written

    def _with_store(self, store: Store) -> "RecordingStore":
        assert isinstance(store, ObjectStore)
        return RecordingStore(store, self._run, self._written)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return what was written before, or None."""
        return await self._store.get(key, prototype, byte_range) if key in self._written else None

    async def set(self, key: str, value: Buffer) -> None:
        """Create an object, and note what was given; each is written once."""
        data = value.to_bytes()
        # Whoever interrupts a write does not wait for a server that stands still.
        await in_daemon_thread(lambda: write_object(self._store.store, key, data))
        self._written[key] = record_of(data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Create metadata of a group between the run and an array, unless that was done before.

        That of the run holds the cards, and is created with them; those above it are the store's.
        """
        run = f"runs/{self._run}/"
        if key.startswith(run) and key != f"{run}zarr.json" and key not in self._written:
            await self.set(key, value)


def _part(data: bytes, byte_range: ByteRequest | None) -> bytes:
    match byte_range:
        case None:
            return data
        case RangeByteRequest(start=start, end=end):
            return data[start:end]
        case OffsetByteRequest(offset=offset):
            return data[offset:]
        case SuffixByteRequest(suffix=suffix):
            return data[-suffix:] if suffix else b""

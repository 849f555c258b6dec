"""Compare a store, byte by byte and number by number, with what was published."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.errors import DamageError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.stats_store.cards import Commit, DatasetCard, ObjectRecord, Summary
from sfm.stats_store.commits import commit_path, read_cards
from sfm.stats_store.concurrency import REQUESTS, Budget, concurrently
from sfm.stats_store.declared import Layout, chunks_by_array, find_layouts
from sfm.stats_store.digest import stream_digest
from sfm.stats_store.location import UnreadableError, reaching
from sfm.stats_store.schema import UpgradeError
from sfm.stats_store.store import Store
from sfm.stats_store.values import Comparison, value_problem
from sfm.stats_store.verified import VerifiedStore, decoding, read_published

WINDOW_BYTES = 16 * 2**20
MATRIX_BYTES = 128 * 2**20
"""Largest scatter matrix, of 4,096 features, that is held whole and so compared with its transpose."""

HELD_BYTES = 256 * 2**20
"""Memory for what is being compared, of all entries together."""

ENTRIES, ARRAYS, CHUNKS = 8, 8, 8
"""How many of each are looked at side by side; ``REQUESTS`` is the limit of all together."""


@dataclass(frozen=True)
class Verdict:
    """What became of one entry since it was published.

    Attributes
    ----------
    commit : str
        Path of its commit below the store's root.
    summary : Summary or None
        None where the commit cannot be read.
    objects, size : int
        How many objects the commit lists, and their published size in bytes.
    problems : list of str
        One line per problem, with the path of the object; empty for a sound entry.
    readable : bool
        Whether all of it could be read; false where access was denied, which `problems` says.
    """

    commit: str
    summary: Summary | None
    objects: int
    size: int
    problems: list[str]
    readable: bool = True

    @property
    def sound(self) -> bool:
        """Whether everything is as it was published."""
        return not self.problems


def verify(
    store: Store, summaries: Sequence[Summary] | None = None, progress: ProgressCallback = no_progress
) -> list[Verdict]:
    """Check entries against their commits.

    Of every entry: the commit against its own digest and its place in the index, every object it lists
    against size and SHA-256, the digest of every array recomputed from its chunks, the cards against the
    entry's key, the entry digest, shapes and types against the cards, and values: those of each array, and
    arrays against each other. Every object is read once.

    Parameters
    ----------
    store : Store
    summaries : sequence of Summary, optional
        Which entries; default: all visible ones. Commits of replaced and removed generations are then read
        as well, and have a verdict if they are damaged; their runs may have been collected.
    progress : callable, optional
        Told about every object.

    Returns
    -------
    list of Verdict
        One per entry, sound or not, in the order of their keys or of `summaries`.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    unlisted: list[str] = []
    if summaries is None:
        index = store.index()
        keys, unlisted = index.generations.values(), index.unreadable
        paths = [path for versions in keys for path in versions]
        visible = {versions[-1] for versions in keys}
    else:
        paths = [commit_path(s) for s in summaries]
        visible = set(paths)
    with reaching(store.url):
        commits = concurrently(lambda p: commit_or_verdict(store, p), paths, progress, "read", "commits")
        read = dict(zip(paths, commits, strict=True))
        entries = [
            (path, commit)
            for path, commit in read.items()
            if isinstance(commit, Commit) and commit.kind == "entry" and path in visible
        ]
        total = sum(len(commit.objects) for _, commit in entries)
        check = Check(store, Counter(progress, total))
        verdicts = concurrently(lambda entry: check.entry(*entry), entries, limit=ENTRIES)
    checked = {verdict.commit: verdict for verdict in verdicts}
    others = {path: verdict for path, verdict in read.items() if isinstance(verdict, Verdict)}
    found = [v for path in paths if (v := checked.get(path) or others.get(path))]
    return found + [Verdict("index", None, 0, 0, [problem], readable=False) for problem in unlisted]


class Counter:
    """Counts checked objects, from any thread, and says so."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()
        progress(Progress("verify", 0, total, "objects"))

    def add(self, objects: int) -> None:
        """Count some more."""
        with self._lock:
            self._done += objects
            self._progress(Progress("verify", self._done, self._total, "objects"))


def commit_or_verdict(store: Store, path: str) -> Commit | Verdict:
    """Return a commit, or what is wrong with it."""
    try:
        return store.commit(path)
    except (DamageError, UpgradeError) as error:
        return Verdict(path, None, 0, 0, [str(error)])
    except UnreadableError as error:
        return Verdict(path, None, 0, 0, [f"{path}: {error}"], readable=False)


class Check:
    """Checks entries, some at a time: in all not more than ``REQUESTS`` requests and ``HELD_BYTES``.

    Parameters
    ----------
    store : Store
    counter : Counter
    """

    def __init__(self, store: Store, counter: Counter) -> None:
        self._store, self._counter = store, counter
        self._slots, self._memory = threading.Semaphore(REQUESTS), Budget(HELD_BYTES)

    def entry(self, path: str, commit: Commit) -> Verdict:
        """Check everything that a commit vouches for."""
        assert commit.summary is not None
        run = f"runs/{commit.run}"
        records = {f"{run}/{name}": record for name, record in commit.objects.items()}
        size = sum(record.size for record in records.values())
        chunks = {
            name: [f"{run}/{name}/{key}" for key in keys] for name, keys in chunks_by_array(commit).items()
        }
        listed = {p for paths in chunks.values() for p in paths}
        metadata = [p for p in records if p.endswith("/zarr.json") and p not in listed]
        others = [p for p in records if not p.endswith("/zarr.json") and p not in listed]
        try:
            read = dict(zip(metadata, self.objects(metadata, records), strict=True))
            problems = [found for found in read.values() if isinstance(found, str)]
            sound = {p: found for p, found in read.items() if isinstance(found, bytes)}
            problems += self.problems(others, records)
            self._counter.add(len(metadata) + len(others))
            arrays, found = open_arrays(commit, records, sound)
            problems += found

            def array(name: str) -> list[str]:
                return self.array(arrays, name, chunks[name])

            found = [line for lines in concurrently(array, chunks, limit=ARRAYS) for line in lines]
            if not found:
                contradictions = arrays.comparison.problems()
                found = [f"damaged array {run}/{name}: {line}" for name, line in contradictions.items()]
            problems += found
        except UnreadableError as error:
            return Verdict(path, commit.summary, len(records), size, [str(error)], readable=False)
        return Verdict(path, commit.summary, len(records), size, list(dict.fromkeys(problems)))

    def array(self, arrays: "EntryArrays", name: str, chunks: Sequence[str]) -> list[str]:
        """Return what is wrong with an array."""
        problems: list[str] = []
        if f"{arrays.run}/{name}" not in arrays.layouts:
            # Of a later minor version, or of no shape it can have: its bytes can be compared, not its values.
            problems = self.problems(chunks, arrays.records)
        else:
            found = self.content_problem(arrays, name)
            # The first damaged chunk ends the reading of an array: look at every one, to name them all.
            problems = (self.problems(chunks, arrays.records) or [found]) if found else []
        self._counter.add(len(chunks))
        return problems

    def content_problem(self, arrays: "EntryArrays", name: str) -> str | None:
        """Recompute an array's digest from its chunks and check its values; return what is wrong, or None."""
        path, dataset, found = f"{arrays.run}/{name}", arrays.dataset, list[str | None]()
        assert dataset is not None
        try:
            with decoding(path):
                array = arrays.open(self._store, path)

                def parts() -> Iterator[npt.NDArray[Any]]:
                    most = MATRIX_BYTES if name == "train/within_scatter" else WINDOW_BYTES
                    for start, stop, chunks in windows(array, path, most):
                        with self.held(arrays, array, stop - start, chunks) as read:
                            rows = arrays.open(self._store, path, read)[start:stop]
                            assert isinstance(rows, np.ndarray)
                            found.append(value_problem(name, rows, dataset))
                            arrays.comparison.add(name, rows, start)
                            yield rows

                digest = stream_digest(parts(), array.dtype, array.shape)
        except DamageError as error:
            return str(error)
        if digest != arrays.digests[name]:
            return f"damaged array {path}: its digest is not the published one"
        problem = next(filter(None, found), None)
        return f"damaged array {path}: {problem}" if problem else None

    @contextmanager
    def held(
        self, arrays: "EntryArrays", array: "zarr.Array[Any]", rows: int, chunks: Sequence[str]
    ) -> Iterator[dict[str, bytes]]:
        """Read chunks, and hold memory for them and for the rows unpacked from them."""
        size = sum(arrays.records[p].size for p in chunks) + rows * row_bytes(array)
        taken = self._memory.take(size)
        try:
            yield dict(zip(chunks, concurrently(self.one(arrays.records), chunks, limit=CHUNKS), strict=True))
        finally:
            self._memory.give_back(taken)

    def one(self, records: dict[str, ObjectRecord]) -> Callable[[str], bytes]:
        """Return what reads an object and compares it with its record."""

        def read(path: str) -> bytes:
            with self._slots, reaching(self._store.url):
                return read_published(self._store.objects, path, records[path])

        return read

    def objects(self, paths: Sequence[str], records: dict[str, ObjectRecord]) -> list[bytes | str]:
        """Return every object, or what is wrong with it."""
        read = self.one(records)

        def read_or_problem(path: str) -> bytes | str:
            try:
                return read(path)
            except DamageError as error:
                return str(error)

        return concurrently(read_or_problem, paths, limit=CHUNKS)

    def problems(self, paths: Sequence[str], records: dict[str, ObjectRecord]) -> list[str]:
        """Return what is wrong with objects, of which a few are held at a time."""
        read = self.one(records)

        def problem(path: str) -> str:
            held = self._memory.take(records[path].size)
            try:
                read(path)
            except DamageError as error:
                return str(error)
            finally:
                self._memory.give_back(held)
            return ""

        return [found for found in concurrently(problem, paths, limit=CHUNKS) if found]


@dataclass(frozen=True)
class EntryArrays:
    """The arrays of an entry while they are checked.

    Attributes
    ----------
    run : str
        Path of the run.
    digests : dict of str to str
        The published digest of every array.
    records : dict of str to ObjectRecord
        Every object of the run, by full path.
    metadata : dict of str to bytes
        Every sound ``zarr.json`` of it.
    dataset : DatasetCard or None
        None where it cannot be read; then there are no layouts.
    layouts : dict of str to Layout
        Arrays that can be opened, by full path.
    comparison : Comparison
        Takes in what arrays have in common.
    """

    run: str
    digests: dict[str, str]
    records: dict[str, ObjectRecord]
    metadata: dict[str, bytes]
    dataset: DatasetCard | None
    layouts: dict[str, Layout]
    comparison: Comparison = field(default_factory=Comparison)

    def open(self, store: Store, path: str, read: dict[str, bytes] | None = None) -> "zarr.Array[Any]":
        """Open an array, some of whose chunks have been read."""
        objects = ZarrObjectStore(store.objects, read_only=True)
        known = VerifiedStore(objects, self.records, self.metadata | (read or {}), self.layouts)
        return zarr.open_array(known, path=path, mode="r", zarr_format=3)


def open_arrays(
    commit: Commit, records: dict[str, ObjectRecord], metadata: dict[str, bytes]
) -> tuple[EntryArrays, list[str]]:
    """Return the arrays of an entry, and what is wrong with its cards and with their shapes."""
    run, dataset, layouts = f"runs/{commit.run}", None, dict[str, Layout]()
    path, problems = f"{run}/zarr.json", list[str]()
    if path in metadata:
        try:
            cards = read_cards(commit, metadata[path])
            dataset = cards.dataset
            layouts, problems = find_layouts(commit, cards, metadata)
        except (DamageError, UpgradeError) as error:
            problems = [str(error)]
    return EntryArrays(run, commit.arrays, records, metadata, dataset, layouts), problems


def windows(array: "zarr.Array[Any]", path: str, most: int) -> Iterator[tuple[int, int, list[str]]]:
    """Yield an array in parts of whole chunks: first row, end, and the paths of the chunks.

    So none is read twice, and memory stays bounded: parts have `most` bytes, or are one row of chunks.
    """
    rows = array.chunks[0]
    step = rows * max(1, most // max(1, rows * row_bytes(array)))
    inner = [range(-(-n // size)) for n, size in zip(array.shape[1:], array.chunks[1:], strict=True)]
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        outer = range(start // rows, -(-stop // rows))
        yield start, stop, ["/".join(map(str, (path, "c", *place))) for place in product(outer, *inner)]


def row_bytes(array: "zarr.Array[Any]") -> int:
    """Return the size of a row in memory."""
    return max(1, array.nbytes // max(1, array.shape[0]))

"""Compare a store, byte by byte and number by number, with what was published."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy.typing as npt
import zarr
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.errors import DamageError, InputError
from sfm.events import Listener, Progress, nobody
from sfm.stats_store.cards import Commit, ObjectRecord, Summary
from sfm.stats_store.commits import commit_path, read_cards
from sfm.stats_store.concurrency import REQUESTS, Budget, concurrently
from sfm.stats_store.digest import stream_digest
from sfm.stats_store.location import UnreadableError, reaching
from sfm.stats_store.schema import UpgradeError, is_known
from sfm.stats_store.store import Store
from sfm.stats_store.verified import VerifiedStore, read_published

WINDOW_BYTES = 16 * 2**20
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
    store: Store, summaries: Sequence[Summary] | None = None, progress: Listener = nobody
) -> list[Verdict]:
    """Check entries against their commits.

    Of every entry: the commit against its own digest and its place in the index, every object it lists
    against size and SHA-256, the digest of every array recomputed from its chunks, the cards against the
    entry's key, and the entry digest. Every object is read once.

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

    def __init__(self, progress: Listener, total: int) -> None:
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
        by_array = {name: [p for p in records if p.startswith(f"{run}/{name}/c/")] for name in commit.arrays}
        chunks = {p for paths in by_array.values() for p in paths}
        metadata = [p for p in records if p not in chunks]
        try:
            read = dict(zip(metadata, self.objects(metadata, records), strict=True))
            problems = [found for found in read.values() if isinstance(found, str)]
            sound = {p: found for p, found in read.items() if isinstance(found, bytes)}
            self._counter.add(len(metadata))
            if not problems:
                problems += card_problems(commit, sound[f"{run}/zarr.json"])

            def array(name: str) -> list[str]:
                return self.array(f"{run}/{name}", commit.arrays[name], by_array[name], records, sound)

            problems += [line for lines in concurrently(array, by_array, limit=ARRAYS) for line in lines]
        except UnreadableError as error:
            return Verdict(path, commit.summary, len(records), size, [str(error)], readable=False)
        return Verdict(path, commit.summary, len(records), size, list(dict.fromkeys(problems)))

    def array(
        self,
        path: str,
        published: str,
        chunks: Sequence[str],
        records: dict[str, ObjectRecord],
        metadata: dict[str, bytes],
    ) -> list[str]:
        """Return what is wrong with an array."""
        problems: list[str] = []
        if not is_known(path.split("/", 2)[2]):
            # Of a later minor version: its bytes can be compared, not its values.
            problems = self.problems(chunks, records)
        else:
            found = self.digest_problem(path, published, records, metadata)
            # The first damaged chunk ends the reading of an array: look at every one, to name them all.
            problems = (self.problems(chunks, records) or [found]) if found else []
        self._counter.add(len(chunks))
        return problems

    def digest_problem(
        self, path: str, published: str, records: dict[str, ObjectRecord], metadata: dict[str, bytes]
    ) -> str | None:
        """Recompute an array's digest from its chunks; return what is wrong, or None."""
        objects = ZarrObjectStore(self._store.objects, read_only=True)
        try:
            array = zarr.open_array(
                VerifiedStore(objects, records, metadata), path=path, mode="r", zarr_format=3
            )

            def parts() -> Iterator[npt.NDArray[Any]]:
                for start, stop, chunks in windows(array, path):
                    # What is read, and what is unpacked from it.
                    held = self._memory.take(
                        sum(records[p].size for p in chunks if p in records)
                        + (stop - start) * row_bytes(array)
                    )
                    try:
                        known = [p for p in chunks if p in records]
                        read = dict(
                            zip(known, concurrently(self.one(records), known, limit=CHUNKS), strict=True)
                        )
                        arrays = VerifiedStore(objects, records, metadata | read)
                        part = zarr.open_array(arrays, path=path, mode="r", zarr_format=3)
                        yield part[start:stop]  # type: ignore[misc]
                    finally:
                        self._memory.give_back(held)

            digest = stream_digest(parts(), array.dtype, array.shape)
        except DamageError as error:
            return str(error)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            # The bytes are the published ones, but no array: its writer was at fault.
            return f"damaged array {path}: it cannot be decoded ({type(error).__name__})"
        return None if digest == published else f"damaged array {path}: its digest is not the published one"

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


def card_problems(commit: Commit, group: bytes) -> list[str]:
    """Return what is wrong with the cards of a run; they repeat what its commit says."""
    try:
        read_cards(commit, group)
    except (DamageError, UpgradeError) as error:
        return [str(error)]
    return []


def windows(array: "zarr.Array[Any]", path: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield an array in parts of whole chunks: first row, end, and the paths of the chunks.

    So none is read twice and memory stays bounded.
    """
    rows = array.chunks[0] if array.shards is None else array.shards[0]
    step = rows * max(1, WINDOW_BYTES // max(1, rows * row_bytes(array)))
    inner = [range(-(-n // size)) for n, size in zip(array.shape[1:], array.chunks[1:], strict=True)]
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        outer = range(start // rows, -(-stop // rows))
        yield start, stop, ["/".join(map(str, (path, "c", *place))) for place in product(outer, *inner)]


def row_bytes(array: "zarr.Array[Any]") -> int:
    """Return the size of a row in memory."""
    return max(1, array.nbytes // max(1, array.shape[0]))

"""Verify entries: compare all bytes with the published digests, and check all values."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.errors import DamageError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.stats_store.array_layouts import (
    ArrayLayout,
    get_chunk_sizes_by_array_and_key,
    parse_layouts_by_path_and_problems,
)
from sfm.stats_store.array_values import ArrayConsistencyCheck, find_value_problem
from sfm.stats_store.cards import Commit, DatasetCard, ObjectRecord, Summary
from sfm.stats_store.commits import make_commit_path, parse_entry_cards
from sfm.stats_store.concurrency import MAX_REQUESTS, MemoryBudget, map_concurrently
from sfm.stats_store.digests import compute_chunked_array_digest
from sfm.stats_store.location import AccessDeniedError, translate_errors
from sfm.stats_store.schema import UpgradeNeededError
from sfm.stats_store.store import Store
from sfm.stats_store.store_index import read_store_index
from sfm.stats_store.verified_objects import (
    VerifiedZarrStore,
    read_published_object,
    translate_array_decode_errors,
)

MAX_WINDOW_BYTES = 16 * 2**20
MAX_MATRIX_BYTES = 128 * 2**20
"""Largest scatter matrix that is read at once, and so compared with its transpose: 4,096 features."""

MAX_VERIFY_BYTES = 256 * 2**20
"""Memory for bytes and rows that are being compared, of all entries together."""

MAX_ENTRIES_AT_ONCE, MAX_ARRAYS_AT_ONCE, MAX_CHUNKS_AT_ONCE = 8, 8, 8
"""How many of each are verified concurrently; ``MAX_REQUESTS`` limits all together."""


@dataclass(frozen=True)
class EntryVerdict:
    """The result of verifying one entry.

    Attributes
    ----------
    commit_path : str
        Path of its commit below the store's root.
    summary : Summary or None
        None if the commit cannot be read.
    object_count, size_bytes : int
        Number of objects in the commit, and their published size in bytes.
    problems : list of str
        One line per problem, with the path of the object; empty for an undamaged entry.
    is_access_granted : bool
        False if access to a part was denied; `problems` names it.
    """

    commit_path: str
    summary: Summary | None
    object_count: int
    size_bytes: int
    problems: list[str]
    is_access_granted: bool = True

    @property
    def is_sound(self) -> bool:
        """Whether the entry was read and has no problem."""
        return not self.problems


def verify_entries(
    store: Store, summaries: Sequence[Summary] | None = None, progress: ProgressCallback = no_progress
) -> list[EntryVerdict]:
    """Verify entries against their commits.

    For every entry this compares the commit with its own digest and path, every object with its size and
    SHA-256, every array with its digest, the cards with the key of the entry, and shapes and types with the
    cards. It checks the values of every array, and arrays against each other. Every object is read once.

    Parameters
    ----------
    store : Store
    summaries : sequence of Summary, optional
        Entries to verify; default: all visible ones. Commits of replaced and removed generations are then
        read as well, and have a verdict if they are damaged; their runs may have been collected.
    progress : callable, optional
        Called after every object.

    Returns
    -------
    list of EntryVerdict
        One per entry, damaged or not, in the order of their keys or of `summaries`.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    unlisted_folders: list[str] = []
    if summaries is None:
        index = read_store_index(store.objects, store.url)
        unlisted_folders = index.unlisted_folder_notes
        paths = [path for key_paths in index.commit_paths_by_key.values() for path in key_paths]
        newest_paths = {key_paths[-1] for key_paths in index.commit_paths_by_key.values()}
    else:
        paths = [make_commit_path(summary) for summary in summaries]
        newest_paths = set(paths)
    with translate_errors(store.url):
        results = map_concurrently(
            lambda path: read_commit_or_verdict(store, path), paths, progress, "read", "commits"
        )
        commits = [
            (path, commit)
            for path, commit in zip(paths, results, strict=True)
            if isinstance(commit, Commit) and commit.kind == "entry" and path in newest_paths
        ]
        total = sum(len(commit.objects) for _, commit in commits)
        verifier = EntryVerifier(store, VerifiedObjectCounter(progress, total))
        verdicts = map_concurrently(
            lambda item: verifier.verify_entry(*item), commits, max_threads=MAX_ENTRIES_AT_ONCE
        )
    verdict_by_path = {
        result.commit_path: result for result in (*results, *verdicts) if isinstance(result, EntryVerdict)
    }
    sorted_verdicts = [verdict_by_path[path] for path in paths if path in verdict_by_path]
    return sorted_verdicts + [
        EntryVerdict("index", None, 0, 0, [problem], is_access_granted=False) for problem in unlisted_folders
    ]


class VerifiedObjectCounter:
    """Counts verified objects and reports progress; thread-safe."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()
        progress(Progress("verify", 0, total, "objects"))

    def add(self, object_count: int) -> None:
        """Add a number of verified objects."""
        with self._lock:
            self._done += object_count
            self._progress(Progress("verify", self._done, self._total, "objects"))


def read_commit_or_verdict(store: Store, commit_path: str) -> Commit | EntryVerdict:
    """Return a commit, or the verdict about one that cannot be read."""
    try:
        return store.read_commit(commit_path)
    except (DamageError, UpgradeNeededError) as error:
        return EntryVerdict(commit_path, None, 0, 0, [str(error)])
    except AccessDeniedError as error:
        return EntryVerdict(commit_path, None, 0, 0, [f"{commit_path}: {error}"], is_access_granted=False)


class EntryVerifier:
    """Verifies entries; thread-safe. ``MAX_REQUESTS`` and ``MAX_VERIFY_BYTES`` bound all together.

    Parameters
    ----------
    store : Store
    counter : VerifiedObjectCounter
    """

    def __init__(self, store: Store, counter: VerifiedObjectCounter) -> None:
        self._store, self._counter = store, counter
        self._slots, self._memory = threading.Semaphore(MAX_REQUESTS), MemoryBudget(MAX_VERIFY_BYTES)

    def verify_entry(self, commit_path: str, commit: Commit) -> EntryVerdict:
        """Verify the objects, arrays and cards of one entry; `commit_path` is that of its commit."""
        assert commit.summary is not None
        run = f"runs/{commit.run}"
        records = {f"{run}/{name}": record for name, record in commit.objects.items()}
        size = sum(record.size for record in records.values())
        chunks = {
            name: [f"{run}/{name}/{key}" for key in keys]
            for name, keys in get_chunk_sizes_by_array_and_key(commit).items()
        }
        chunk_paths = {p for paths in chunks.values() for p in paths}
        metadata_paths = [p for p in records if p.endswith("/zarr.json") and p not in chunk_paths]
        other_paths = [p for p in records if not p.endswith("/zarr.json") and p not in chunk_paths]
        try:
            results = dict(
                zip(metadata_paths, self.read_objects_or_problems(metadata_paths, records), strict=True)
            )
            problems = [result for result in results.values() if isinstance(result, str)]
            problems += self.find_object_problems(other_paths, records)
            self._counter.add(len(metadata_paths) + len(other_paths))
            metadata = {p: result for p, result in results.items() if isinstance(result, bytes)}
            arrays, layout_problems = parse_arrays_to_verify_and_problems(commit, records, metadata)
            array_problems = map_concurrently(
                lambda name: self.verify_array(arrays, name, chunks[name]),
                chunks,
                max_threads=MAX_ARRAYS_AT_ONCE,
            )
            problems += [*layout_problems, *chain.from_iterable(array_problems)]
            if not any(array_problems):
                contradictions = arrays.consistency_check.find_contradictions_by_array()
                problems += [f"damaged array {run}/{name}: {line}" for name, line in contradictions.items()]
        except AccessDeniedError as error:
            return EntryVerdict(
                commit_path, commit.summary, len(records), size, [str(error)], is_access_granted=False
            )
        return EntryVerdict(commit_path, commit.summary, len(records), size, list(dict.fromkeys(problems)))

    def verify_array(
        self, arrays: "ArraysToVerify", array_name: str, chunk_paths: Sequence[str]
    ) -> list[str]:
        """Verify an array; return one line per problem."""
        if f"{arrays.run_path}/{array_name}" not in arrays.layouts_by_path:
            # Of a newer schema, or with an invalid layout: its bytes can be compared, but not its values.
            problems = self.find_object_problems(chunk_paths, arrays.records_by_path)
        else:
            problem = self.find_digest_or_value_problem(arrays, array_name)
            # Reading stops at the first damaged chunk: compare all of them, to name each.
            problems = (
                (self.find_object_problems(chunk_paths, arrays.records_by_path) or [problem])
                if problem
                else []
            )
        self._counter.add(len(chunk_paths))
        return problems

    def find_digest_or_value_problem(self, arrays: "ArraysToVerify", array_name: str) -> str | None:
        """Recompute the digest of an array from its chunks and check its values; return a problem or None."""
        path, dataset, problems = f"{arrays.run_path}/{array_name}", arrays.dataset, list[str | None]()
        assert dataset is not None
        try:
            with translate_array_decode_errors(path):
                array = arrays.open_array(self._store, path)
                max_bytes = MAX_MATRIX_BYTES if array_name == "train/within_scatter" else MAX_WINDOW_BYTES

                def read_windows() -> Iterator[npt.NDArray[Any]]:
                    for start, stop, chunk_paths in iterate_row_ranges_with_chunk_paths(
                        array, path, max_bytes
                    ):
                        with self.read_chunks_within_budget(
                            arrays, array, stop - start, chunk_paths
                        ) as chunks:
                            rows = arrays.open_array(self._store, path, chunks)[start:stop]
                            assert isinstance(rows, np.ndarray)
                            problems.append(find_value_problem(array_name, rows, dataset))
                            arrays.consistency_check.add_rows(array_name, rows, start)
                            yield rows

                digest = compute_chunked_array_digest(read_windows(), array.dtype, array.shape)
        except DamageError as error:
            return str(error)
        if digest != arrays.digest_by_array[array_name]:
            return f"damaged array {path}: its digest is not the published one"
        problem = next(filter(None, problems), None)
        return f"damaged array {path}: {problem}" if problem else None

    @contextmanager
    def read_chunks_within_budget(
        self,
        arrays: "ArraysToVerify",
        array: "zarr.Array[Any]",
        decoded_row_count: int,
        chunk_paths: Sequence[str],
    ) -> Iterator[dict[str, bytes]]:
        """Read chunks within the memory budget, which also covers the rows decoded from them."""
        size = sum(
            arrays.records_by_path[path].size for path in chunk_paths
        ) + decoded_row_count * compute_row_bytes(array)
        acquired = self._memory.acquire(size)
        try:
            read_object = self.make_verified_object_reader(arrays.records_by_path)
            chunks = map_concurrently(read_object, chunk_paths, max_threads=MAX_CHUNKS_AT_ONCE)
            yield dict(zip(chunk_paths, chunks, strict=True))
        finally:
            self._memory.release(acquired)

    def make_verified_object_reader(self, records_by_path: dict[str, ObjectRecord]) -> Callable[[str], bytes]:
        """Return a function that reads an object and compares it with its record."""

        def read_object(path: str) -> bytes:
            with self._slots, translate_errors(self._store.url):
                return read_published_object(self._store.objects, path, records_by_path[path])

        return read_object

    def read_objects_or_problems(
        self, paths: Sequence[str], records_by_path: dict[str, ObjectRecord]
    ) -> list[bytes | str]:
        """Return the bytes of every object, or its problem."""
        read_object = self.make_verified_object_reader(records_by_path)

        def read_object_or_problem(path: str) -> bytes | str:
            try:
                return read_object(path)
            except DamageError as error:
                return str(error)

        return map_concurrently(read_object_or_problem, paths, max_threads=MAX_CHUNKS_AT_ONCE)

    def find_object_problems(
        self, paths: Sequence[str], records_by_path: dict[str, ObjectRecord]
    ) -> list[str]:
        """Compare objects with their records within the memory budget; return one line per problem."""
        read_object = self.make_verified_object_reader(records_by_path)

        def find_object_problem(path: str) -> str:
            acquired = self._memory.acquire(records_by_path[path].size)
            try:
                read_object(path)
            except DamageError as error:
                return str(error)
            finally:
                self._memory.release(acquired)
            return ""

        return list(
            filter(None, map_concurrently(find_object_problem, paths, max_threads=MAX_CHUNKS_AT_ONCE))
        )


@dataclass(frozen=True)
class ArraysToVerify:
    """The arrays of an entry that is being verified.

    Attributes
    ----------
    run_path : str
        Path of the run.
    digest_by_array : dict of str to str
        The published digest of every array.
    records_by_path : dict of str to ObjectRecord
        Record of every object of the run, by full path.
    zarr_json_by_path : dict of str to bytes
        Every undamaged ``zarr.json`` of the run, by full path.
    dataset : DatasetCard or None
        None if it cannot be read; then there are no layouts.
    layouts_by_path : dict of str to ArrayLayout
        Layouts of the arrays that can be opened, by full path.
    consistency_check : ArrayConsistencyCheck
        Compares arrays with each other.
    """

    run_path: str
    digest_by_array: dict[str, str]
    records_by_path: dict[str, ObjectRecord]
    zarr_json_by_path: dict[str, bytes]
    dataset: DatasetCard | None
    layouts_by_path: dict[str, ArrayLayout]
    consistency_check: ArrayConsistencyCheck = field(default_factory=ArrayConsistencyCheck)

    def open_array(
        self, store: Store, array_path: str, read_chunks_by_path: dict[str, bytes] | None = None
    ) -> "zarr.Array[Any]":
        """Open an array, with chunks that have been read already."""
        objects = ZarrObjectStore(store.objects, read_only=True)
        verified = VerifiedZarrStore(
            objects,
            self.records_by_path,
            self.zarr_json_by_path | (read_chunks_by_path or {}),
            self.layouts_by_path,
        )
        return zarr.open_array(verified, path=array_path, mode="r", zarr_format=3)


def parse_arrays_to_verify_and_problems(
    commit: Commit, records_by_path: dict[str, ObjectRecord], zarr_json_by_path: dict[str, bytes]
) -> tuple[ArraysToVerify, list[str]]:
    """Return the arrays of an entry, and one line per problem with its cards and layouts."""
    run, dataset, layouts = f"runs/{commit.run}", None, dict[str, ArrayLayout]()
    path, problems = f"{run}/zarr.json", list[str]()
    if path in zarr_json_by_path:
        try:
            cards = parse_entry_cards(commit, zarr_json_by_path[path])
            dataset = cards.dataset
            layouts, problems = parse_layouts_by_path_and_problems(commit, cards, zarr_json_by_path)
        except (DamageError, UpgradeNeededError) as error:
            problems = [str(error)]
    return ArraysToVerify(run, commit.arrays, records_by_path, zarr_json_by_path, dataset, layouts), problems


def iterate_row_ranges_with_chunk_paths(
    array: "zarr.Array[Any]", array_path: str, max_window_bytes: int
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first row, end row and chunk paths of consecutive windows of an array.

    Windows consist of complete chunks, so that none is read twice. They have at most `max_window_bytes`,
    or one row of chunks.
    """
    rows = array.chunks[0]
    step = rows * max(1, max_window_bytes // max(1, rows * compute_row_bytes(array)))
    inner = [range(-(-n // size)) for n, size in zip(array.shape[1:], array.chunks[1:], strict=True)]
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        outer = range(start // rows, -(-stop // rows))
        yield (
            start,
            stop,
            ["/".join(map(str, (array_path, "c", *chunk_index))) for chunk_index in product(outer, *inner)],
        )


def compute_row_bytes(array: "zarr.Array[Any]") -> int:
    """Return the size of one row of an array in memory."""
    return max(1, array.nbytes // max(1, array.shape[0]))

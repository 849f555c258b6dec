"""Compare a store, byte by byte and number by number, with what was published."""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import zarr
from pydantic import ValidationError
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError
from sfm.events import Listener, Progress, nobody
from sfm.stats_store.cards import Commit, DatasetCard, ExtractionCard, ObjectRecord, Summary
from sfm.stats_store.digest import entry_digest, stream_digest
from sfm.stats_store.location import reaching
from sfm.stats_store.publish import options_digest
from sfm.stats_store.schema import UpgradeError, is_known
from sfm.stats_store.store import PARALLEL_REQUESTS, Store, commit_name
from sfm.stats_store.verified import VerifiedStore, read_published

WINDOW_BYTES = 32 * 2**20


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
    """

    commit: str
    summary: Summary | None
    objects: int
    size: int
    problems: list[str]

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
    if summaries is None:
        keys = store.generations().values()
        paths = [path for versions in keys for path in versions]
        visible = {versions[-1] for versions in keys}
    else:
        paths = [f"index/{s.key}/{commit_name(s.generation)}" for s in summaries]
        visible = set(paths)
    with reaching(store.url), ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        read = dict(zip(paths, pool.map(lambda path: commit_or_problem(store, path), paths), strict=True))
        entries = [
            (path, commit)
            for path, commit in read.items()
            if isinstance(commit, Commit) and commit.kind == "entry" and path in visible
        ]
        counter = Counter(progress, sum(len(commit.objects) for _, commit in entries))
        checked = {path: verify_entry(store, path, commit, counter, pool) for path, commit in entries}
    unreadable = {
        path: Verdict(path, None, 0, 0, [problem])
        for path, problem in read.items()
        if isinstance(problem, str)
    }
    return [v for path in paths if (v := checked.get(path) or unreadable.get(path))]


class Counter:
    """Counts checked objects and says so."""

    def __init__(self, progress: Listener, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(Progress("verify", 0, total, "objects"))

    def add(self, objects: int) -> None:
        """Count some more."""
        self._done += objects
        self._progress(Progress("verify", self._done, self._total, "objects"))


def commit_or_problem(store: Store, path: str) -> Commit | str:
    """Return a commit, or what is wrong with it."""
    try:
        return store.commit(path)
    except (DamageError, UpgradeError) as error:
        return str(error)


def verify_entry(
    store: Store, path: str, commit: Commit, counter: Counter, pool: ThreadPoolExecutor
) -> Verdict:
    """Check everything that a commit vouches for."""
    assert commit.summary is not None
    run = f"runs/{commit.run}"
    records = {f"{run}/{name}": record for name, record in commit.objects.items()}
    by_array = {name: [p for p in records if p.startswith(f"{run}/{name}/c/")] for name in commit.arrays}
    chunks = {p for paths in by_array.values() for p in paths}

    def examine(paths: Iterable[str]) -> list[bytes | str]:
        return list(pool.map(lambda path: object_or_problem(store, path, records[path]), paths))

    def problems_of(paths: Iterable[str]) -> list[str]:
        return [found for found in examine(paths) if isinstance(found, str)]

    metadata = [p for p in records if p not in chunks]
    read = dict(zip(metadata, examine(metadata), strict=True))
    problems = [found for found in read.values() if isinstance(found, str)]
    sound = {p: found for p, found in read.items() if isinstance(found, bytes)}
    counter.add(len(metadata))
    if not problems:
        problems += card_problems(commit, sound.get(f"{run}/zarr.json"))
    arrays = VerifiedStore(ZarrObjectStore(store.objects, read_only=True), records, sound)
    for name, paths in by_array.items():
        if not is_known(name):
            problems += problems_of(
                paths
            )  # of a later minor version: its bytes can be compared, not its values
            counter.add(len(paths))
            continue
        found = array_problem(arrays, f"{run}/{name}", commit.arrays[name])
        # The first damaged chunk ends the reading of an array: look at every one, to name them all.
        problems += (problems_of(paths) or [found]) if found else []
        counter.add(len(paths))
    size = sum(record.size for record in records.values())
    return Verdict(path, commit.summary, len(records), size, list(dict.fromkeys(problems)))


def object_or_problem(store: Store, path: str, record: ObjectRecord) -> bytes | str:
    """Return an object, or what is wrong with it."""
    try:
        return read_published(store.objects, path, record)
    except DamageError as error:
        return str(error)


def card_problems(commit: Commit, group: bytes | None) -> list[str]:
    """Compare the cards of a run with the key of its entry, and the entry digest with what it covers."""
    summary, path = commit.summary, f"runs/{commit.run}/zarr.json"
    assert summary is not None
    if group is None:
        return [f"missing object {path}: it was not published"]
    try:
        cards = json.loads(group)["attributes"]
        backbone = BackboneCard.model_validate(cards["backbone"]).hash
        fingerprint = DatasetCard.model_validate(cards["dataset"]).fingerprint
        options = options_digest(ExtractionCard.model_validate(cards["extraction"]).options)
    except (KeyError, TypeError, ValidationError) as error:
        return [f"damaged object {path}: its cards cannot be read ({type(error).__name__})"]
    problems = [
        f"damaged object {path}: its {what} is not the one in the entry's key"
        for what, found, wanted in (
            ("backbone", backbone, summary.backbone_hash),
            ("dataset", fingerprint, summary.fingerprint),
            ("options", options, summary.options),
        )
        if found != wanted
    ]
    if entry_digest(commit.arrays, backbone, fingerprint, options) != summary.entry_digest:
        problems.append(f"damaged entry {summary.entry_digest[:12]}: its digest is not that of its content")
    return problems


def array_problem(arrays: VerifiedStore, path: str, published: str) -> str | None:
    """Recompute an array's digest from its chunks; return what is wrong, or None."""
    try:
        array = zarr.open_array(arrays, path=path, mode="r", zarr_format=3)
        digest = stream_digest(windows(array), array.dtype, array.shape)
    except DamageError as error:
        return str(error)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        # The bytes are the published ones, but no array: its writer was at fault.
        return f"damaged array {path}: it cannot be decoded ({type(error).__name__})"
    return None if digest == published else f"damaged array {path}: its digest is not the published one"


def windows(array: "zarr.Array[Any]") -> Iterator[npt.NDArray[Any]]:
    """Yield an array in parts of whole chunks, so that none is read twice and memory stays bounded."""
    step = array.chunks[0] if array.shards is None else array.shards[0]
    row_bytes = max(1, array.nbytes // max(1, array.shape[0]))
    step *= max(1, WINDOW_BYTES // (step * row_bytes))
    for start in range(0, array.shape[0], step):
        part: npt.NDArray[Any] = array[start : start + step]  # type: ignore[assignment]
        yield part

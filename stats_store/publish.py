"""Write a run, then make it visible by one commit, or not at all."""

import contextlib
import datetime
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError, InputError
from sfm.stats_store.cards import (
    ClassifierCard,
    Commit,
    DatasetCard,
    ExtractionCard,
    ObjectRecord,
    SchemaVersion,
    Summary,
)
from sfm.stats_store.commits import MARK, commit_name, generation_after, generation_of, parse_commit, seal
from sfm.stats_store.concurrency import concurrently
from sfm.stats_store.digest import (
    BLOCK_ROWS,
    array_digest,
    block_digest,
    canonical,
    combine_blocks,
    entry_digest,
    sha256,
)
from sfm.stats_store.location import reaching
from sfm.stats_store.objects import (
    OccupiedError,
    create_object,
    delete_run,
    read_object,
    settle,
    write_object,
)
from sfm.stats_store.schema import CROP_MODE, create_array
from sfm.stats_store.store import Store, group_metadata
from sfm.stats_store.verified import RecordingStore, read_published, record_of
from sfm.untrusted_files import MAX_JSON_BYTES

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A run that is being written; nobody sees it until :func:`publish`.

    Attributes
    ----------
    run : str
        Its folder below ``runs/``.
    digests : dict of str to str
        Digest of every array written so far.
    written : dict of str to ObjectRecord
        Every object of an array written so far, by full path.
    offered : list of str
        Paths of the commits that may have made the run visible.
    """

    store: Store
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    digests: dict[str, str] = field(default_factory=dict)
    written: dict[str, ObjectRecord] = field(default_factory=dict)
    offered: list[str] = field(default_factory=list)

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write a whole array.

        Raises
        ------
        InputError
            If the store cannot be written.
        """
        with reaching(self.store.url):
            self._create(name, array.shape, array.dtype)[...] = array
        self.digests[name] = array_digest(array)

    def write_blocks(
        self,
        name: str,
        blocks: Iterable[npt.NDArray[Any]],
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
    ) -> None:
        """Write an array from consecutive blocks of ``BLOCK_ROWS`` rows; only the last may be shorter.

        Raises
        ------
        InputError
            If the store cannot be written.
        ValueError
            If the blocks do not make up `shape`.
        """
        kind = np.dtype(dtype)
        with reaching(self.store.url):
            target = self._create(name, shape, kind)
        step = target.chunks[0]
        digests, start = [], 0
        for block in blocks:
            if start % BLOCK_ROWS:
                raise ValueError(f"{name}: only the last block may be shorter than {BLOCK_ROWS} rows")
            digests.append(block_digest(block.astype(kind, copy=False)))
            for row in range(0, len(block), step):
                with reaching(self.store.url):
                    target[start + row : start + min(row + step, len(block))] = block[row : row + step]
            start += len(block)
        if start != shape[0]:
            raise ValueError(f"{name}: {start} rows given, {shape[0]} announced")
        self.digests[name] = combine_blocks(digests, kind, shape)

    def discard(self) -> None:
        """Delete what was written, unless readers may see it already.

        A writer that never learned whether its commit arrived cannot know, and one may not be allowed to
        delete at all: garbage collection takes what is left.
        """
        if not self.offered:
            try:
                delete_run(self.store.objects, self.run)
            except (BaseError, OSError) as error:
                LOG.warning("runs/%s is left for `sfm store gc` (%s)", self.run, type(error).__name__)

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> "zarr.Array[Any]":
        objects = RecordingStore(ZarrObjectStore(self.store.objects), self.run, self.written)
        return create_array(objects, self.run, name, shape, dtype)


@dataclass(frozen=True)
class Published:
    """What became of a draft.

    Attributes
    ----------
    summary : Summary
        The entry that a reader sees now under the draft's key.
    outcome : {"published", "already there", "another writer was first"}
        Unless published, the draft's data has been deleted again.
    """

    summary: Summary
    outcome: Literal["published", "already there", "another writer was first"]


def options_digest(options: dict[str, Any]) -> str:
    """Return the digest of everything besides backbone and data that shapes an entry's arrays."""
    return sha256(canonical(options))


def current(store: Store, key: str) -> tuple[int, Commit | None]:
    """Return the highest generation of a key (0 if none) and its commit."""
    paths = store.generations(key).get(key, [])
    return (generation_of(paths[-1]), store.commit(paths[-1])) if paths else (0, None)


def publish(
    draft: Draft,
    backbone: BackboneCard,
    dataset: DatasetCard,
    extraction: ExtractionCard,
    classifier: ClassifierCard,
    *,
    replace: bool = False,
) -> Published:
    """Make a draft visible under its key: backbone hash, dataset fingerprint, options digest.

    Parameters
    ----------
    draft : Draft
        All arrays written.
    replace : bool
        Commit the next generation even if the key holds an entry.

    Returns
    -------
    Published
    """
    store, options = draft.store, options_digest(extraction.options)
    key = f"{backbone.hash}/{dataset.fingerprint}/{options}"
    paths = store.generations(key).get(key, [])
    existing = standing(store, paths[-1]) if paths and not replace else None
    if existing and existing.kind == "entry" and existing.summary:
        draft.discard()
        return Published(existing.summary, "already there")
    attributes = {
        "backbone": backbone.model_dump(mode="json"),
        "dataset": dataset.model_dump(mode="json"),
        "extraction": extraction.model_dump(mode="json"),
        "classifier": classifier.model_dump(mode="json"),
    }
    metadata = group_metadata(attributes)
    if len(metadata) > MAX_JSON_BYTES:
        raise InputError(
            f"the names and cards of {dataset.name} take {len(metadata)} bytes as JSON, and no reader takes "
            f"more than {MAX_JSON_BYTES}"
        )
    with reaching(store.url):
        write_object(store.objects, f"runs/{draft.run}/zarr.json", metadata)
        draft.written[f"runs/{draft.run}/zarr.json"] = record_of(metadata)
        objects = kept(draft)
        settle(store.objects, f"runs/{draft.run}")
    generation = generation_of(paths[-1]) if paths else 0
    while True:
        generation = generation_after(generation, key)
        summary = Summary(
            dataset=dataset.name,
            backbone=backbone.spec,
            model=backbone.model,
            backbone_hash=backbone.hash,
            image_size=backbone.preprocessing.input_size,
            fingerprint=dataset.fingerprint,
            options=options,
            role=extraction.role,
            classes=len(dataset.class_ids),
            features=backbone.features,
            train_samples=dataset.train_samples,
            test_samples=dataset.test_samples,
            held_out_top1=classifier.held_out_top1,
            listing=extraction.listing,
            entry_digest=entry_digest(draft.digests, backbone.hash, dataset.fingerprint, options),
            generation=generation,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        commit = Commit(
            schema_version=SchemaVersion(requires=requirements(backbone)),
            kind="entry",
            run=draft.run,
            summary=summary,
            arrays=draft.digests,
            objects=objects,
        )
        draft.offered.append(f"index/{key}/{commit_name(generation)}")
        winner = put_commit(store, key, generation, commit)
        if winner.run == draft.run:
            return Published(summary, "published")
        draft.offered.clear()
        if winner.kind == "entry" and winner.summary:
            draft.discard()
            return Published(winner.summary, "another writer was first")
        # Someone removed the entry at this very moment: ours is the next generation.


def requirements(backbone: BackboneCard) -> list[str]:
    """Return what a reader must know to use an entry of a backbone as it was made."""
    return [] if backbone.preprocessing.crop_mode == "center" else [CROP_MODE]


def standing(store: Store, path: str) -> Commit:
    """Read the newest commit of a key, and say what helps if it is damaged."""
    try:
        return store.commit(path)
    except DamageError as error:
        raise DamageError(f"{error}; --replace publishes the next generation over it") from error


def kept(draft: Draft) -> dict[str, ObjectRecord]:
    """Read a run back, and return the record of every object by path below ``runs/<run>/``.

    Raises
    ------
    DamageError
        If the store did not keep what was written; nothing has been published then.
    """

    def check(path: str) -> None:
        try:
            read_published(draft.store.objects, path, draft.written[path])
        except DamageError as error:
            raise DamageError(
                f"{draft.store.url} did not keep what was written, nothing was published: {error}"
            ) from error

    concurrently(check, draft.written)
    return {path.removeprefix(f"runs/{draft.run}/"): record for path, record in draft.written.items()}


def put_commit(store: Store, key: str, generation: int, commit: Commit) -> Commit:
    """Create one generation of a key, unless another writer has: exactly one creation succeeds.

    A writer whose answer was lost on the way, or who is told that the object exists, looks at what stands
    there: it may be its own.

    Returns
    -------
    Commit
        The one that now stands: `commit`, or the one that was there first.

    Raises
    ------
    InputError
        If the store cannot be reached, or cannot be written.
    """
    content = commit.model_dump(mode="json", by_alias=True)
    return put_commit_bytes(store, f"index/{key}/{commit_name(generation)}", seal(content))


def put_commit_bytes(store: Store, path: str, data: bytes) -> Commit:
    """Create a commit of these bytes, as :func:`put_commit` does; a copy keeps what it does not know."""
    ours = parse_commit(data, path)
    with reaching(store.url):
        winner = created_or_found(store, path, data)
        if winner.run == ours.run:
            # From here on the absence of the commit is a loss, and readers can tell.
            with contextlib.suppress(OccupiedError):
                write_object(store.objects, path.removesuffix(".json") + MARK, b"")
    return winner


def created_or_found(store: Store, path: str, data: bytes) -> Commit:
    """Create a commit unless there is one, and return the one that stands."""
    for last in (False, False, True):
        try:
            create_object(store.objects, path, data)
            return parse_commit(data, path)
        except AlreadyExistsError:
            pass
        except (PermissionDeniedError, UnauthenticatedError, OSError):
            raise  # It certainly did not arrive.
        except BaseError:
            if last:
                raise
        with contextlib.suppress(FileNotFoundError):
            return read_object(store.objects, path, lambda found: parse_commit(found, path))
    raise InputError(f"{store.url} says that {path} exists, and that it does not: it is not fit for a store")

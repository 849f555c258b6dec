"""Write the arrays of a run, then publish it atomically by one commit."""

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
from sfm.stats_store.commits import (
    PUBLISHED_SUFFIX,
    EntryCards,
    encode_commit_with_digest,
    get_next_generation,
    make_commit_file_name,
    make_summary_fields,
    parse_commit,
    parse_generation,
)
from sfm.stats_store.concurrency import map_concurrently
from sfm.stats_store.digests import (
    BLOCK_ROWS,
    combine_block_digests,
    compute_array_digest,
    compute_block_digest,
    compute_entry_digest,
    compute_sha256,
    encode_canonical_json,
)
from sfm.stats_store.location import translate_errors
from sfm.stats_store.objects import (
    ObjectExistsError,
    create_object,
    create_object_unless_identical,
    delete_run,
    read_object,
    sync_objects_to_disk,
)
from sfm.stats_store.schema import CROP_MODE_REQUIREMENT, create_run_array
from sfm.stats_store.store import Store, encode_group_metadata
from sfm.stats_store.verified_objects import RecordingZarrStore, make_object_record, read_published_object
from sfm.untrusted_files import MAX_JSON_BYTES

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A run that is being written, invisible to readers until :func:`publish_draft`.

    Attributes
    ----------
    run_id : str
        Id of the run: its folder below ``runs/``.
    digests_by_array : dict of str to str
        Digest of every array written so far.
    records_by_path : dict of str to ObjectRecord
        Every object of an array written so far, by full path.
    proposed_commit_paths : list of str
        Paths of the commits that may have made the run visible.
    """

    store: Store
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    digests_by_array: dict[str, str] = field(default_factory=dict)
    records_by_path: dict[str, ObjectRecord] = field(default_factory=dict)
    proposed_commit_paths: list[str] = field(default_factory=list)

    def write_array(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write an array of the run.

        Raises
        ------
        InputError
            If the store cannot be written.
        """
        with translate_errors(self.store.url):
            self._create_array(name, array.shape, array.dtype)[...] = array
        self.digests_by_array[name] = compute_array_digest(array)

    def write_array_blocks(
        self, name: str, blocks: Iterable[npt.NDArray[Any]], shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> None:
        """Write an array from consecutive blocks of ``BLOCK_ROWS`` rows; only the last may be shorter.

        Raises
        ------
        InputError
            If the store cannot be written.
        ValueError
            If the blocks do not add up to `shape`.
        """
        array_dtype = np.dtype(dtype)
        with translate_errors(self.store.url):
            target = self._create_array(name, shape, array_dtype)
        step = target.chunks[0]
        digests, start = [], 0
        for block in blocks:
            if start % BLOCK_ROWS:
                raise ValueError(f"{name}: only the last block may be shorter than {BLOCK_ROWS} rows")
            digests.append(compute_block_digest(block.astype(array_dtype, copy=False)))
            for row in range(0, len(block), step):
                with translate_errors(self.store.url):
                    target[start + row : start + min(row + step, len(block))] = block[row : row + step]
            start += len(block)
        if start != shape[0]:
            raise ValueError(f"{name}: {start} rows given, {shape[0]} announced")
        self.digests_by_array[name] = combine_block_digests(digests, array_dtype, shape)

    def discard(self) -> None:
        """Delete the objects written, unless a commit may have made them visible.

        A writer that got no response to its commit cannot know whether it exists, and some writers may not
        delete objects: garbage collection deletes the rest.
        """
        if not self.proposed_commit_paths:
            try:
                delete_run(self.store.objects, self.run_id)
            except (BaseError, OSError) as error:
                LOG.warning("runs/%s is left for `sfm store gc` (%s)", self.run_id, type(error).__name__)

    def _create_array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> "zarr.Array[Any]":
        objects = RecordingZarrStore(ZarrObjectStore(self.store.objects), self.run_id, self.records_by_path)
        return create_run_array(objects, self.run_id, name, shape, dtype)


@dataclass(frozen=True)
class PublishResult:
    """The outcome of publishing a draft.

    Attributes
    ----------
    summary : Summary
        The entry that readers see now under the key of the draft.
    outcome : {"published", "already there", "another writer was first"}
        Unless published, the data of the draft has been deleted again.
    """

    summary: Summary
    outcome: Literal["published", "already there", "another writer was first"]


def compute_options_digest(options: dict[str, Any]) -> str:
    """Return the digest of the options of an extraction, which is part of the entry's key."""
    return compute_sha256(encode_canonical_json(options))


def publish_draft(
    draft: Draft,
    backbone: BackboneCard,
    dataset: DatasetCard,
    extraction: ExtractionCard,
    classifier: ClassifierCard,
    *,
    replace: bool = False,
) -> PublishResult:
    """Make a draft visible under its key: backbone hash, dataset fingerprint, options digest.

    Parameters
    ----------
    draft : Draft
        All arrays written.
    backbone, dataset, extraction, classifier : BackboneCard, DatasetCard, ExtractionCard, ClassifierCard
        Cards of the entry.
    replace : bool
        Commit the next generation even if the key holds an entry.

    Returns
    -------
    PublishResult

    Raises
    ------
    DamageError
        If the store returns other bytes than were written, or the newest commit of the key is damaged.
    InputError
        If the store cannot be written, or the cards are larger than a reader accepts.
    """
    store, cards = draft.store, EntryCards(backbone, dataset, extraction, classifier)
    key = f"{backbone.hash}/{dataset.fingerprint}/{compute_options_digest(extraction.options)}"
    paths = store.list_commit_paths_by_key(key).get(key, [])
    existing_commit = read_commit_or_advise_replace(store, paths[-1]) if paths and not replace else None
    if existing_commit and existing_commit.kind == "entry" and existing_commit.summary:
        draft.discard()
        return PublishResult(existing_commit.summary, "already there")
    objects = write_cards_and_verify_run(draft, cards)
    generation = parse_generation(paths[-1]) if paths else 0
    while True:
        generation = get_next_generation(generation, key)
        commit = make_entry_commit(draft, cards, objects, generation)
        draft.proposed_commit_paths.append(f"index/{key}/{make_commit_file_name(generation)}")
        stored_commit = create_or_get_commit(store, key, generation, commit)
        assert stored_commit.summary is not None
        if stored_commit.run == draft.run_id:
            return PublishResult(stored_commit.summary, "published")
        draft.proposed_commit_paths.clear()
        if stored_commit.kind == "entry":
            draft.discard()
            return PublishResult(stored_commit.summary, "another writer was first")
        # Another writer removed the entry in between: the draft becomes the generation after the tombstone.


def write_cards_and_verify_run(draft: Draft, cards: EntryCards) -> dict[str, ObjectRecord]:
    """Write the cards of a draft, read all of its objects back and sync them.

    Returns
    -------
    dict of str to ObjectRecord
        Record of every object of the run, by path below ``runs/<run>/``.

    Raises
    ------
    DamageError
        If the store returns other bytes than were written.
    InputError
        If the cards are larger than a reader accepts.
    """
    metadata = encode_group_metadata(
        {name: card.model_dump(mode="json") for name, card in vars(cards).items()}
    )
    if len(metadata) > MAX_JSON_BYTES:
        raise InputError(
            f"the names and cards of {cards.dataset.name} take {len(metadata)} bytes as JSON, and no reader "
            f"takes more than {MAX_JSON_BYTES}"
        )
    run = f"runs/{draft.run_id}"
    with translate_errors(draft.store.url):
        create_object_unless_identical(draft.store.objects, f"{run}/zarr.json", metadata)
        draft.records_by_path[f"{run}/zarr.json"] = make_object_record(metadata)
        verify_written_objects(draft)
        sync_objects_to_disk(draft.store.objects, run)
    return {path.removeprefix(f"{run}/"): record for path, record in draft.records_by_path.items()}


def make_entry_commit(
    draft: Draft, cards: EntryCards, records_by_object_name: dict[str, ObjectRecord], generation: int
) -> Commit:
    """Return the commit that publishes a draft as one generation of its key."""
    fields = make_summary_fields(cards)
    digest = compute_entry_digest(
        draft.digests_by_array, fields["backbone_hash"], fields["fingerprint"], fields["options"]
    )
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Commit(
        schema_version=SchemaVersion(requires=list_schema_requirements(cards.backbone)),
        kind="entry",
        run=draft.run_id,
        summary=Summary(**fields, entry_digest=digest, generation=generation, created=created),
        arrays=draft.digests_by_array,
        objects=records_by_object_name,
    )


def list_schema_requirements(backbone: BackboneCard) -> list[str]:
    """Return the requirements that a reader must know to use an entry of a backbone."""
    return [] if backbone.preprocessing.crop_mode == "center" else [CROP_MODE_REQUIREMENT]


def read_commit_or_advise_replace(store: Store, path: str) -> Commit:
    """Read the newest commit of a key; the error about a damaged one recommends ``--replace``."""
    try:
        return store.read_commit(path)
    except DamageError as error:
        raise DamageError(f"{error}; --replace publishes the next generation over it") from error


def verify_written_objects(draft: Draft) -> None:
    """Read every object of a draft back and compare it with its record.

    Raises
    ------
    DamageError
        If the store returns other bytes than were written; nothing has been published then.
    """

    def verify_object(path: str) -> None:
        try:
            read_published_object(draft.store.objects, path, draft.records_by_path[path])
        except DamageError as error:
            raise DamageError(
                f"{draft.store.url} does not return the bytes that were written; "
                f"nothing was published: {error}"
            ) from error

    map_concurrently(verify_object, draft.records_by_path)


def create_or_get_commit(store: Store, entry_key: str, generation: int, commit: Commit) -> Commit:
    """Create the commit of one generation of a key; exactly one of several writers succeeds.

    A writer that lost the response, or is told that the object exists, reads it: it may be that writer's.

    Returns
    -------
    Commit
        The commit in the store: `commit`, or that of the writer that was first.

    Raises
    ------
    InputError
        If the store cannot be reached, or cannot be written.
    """
    content = commit.model_dump(mode="json", by_alias=True)
    return create_or_get_commit_and_mark_published(
        store, f"index/{entry_key}/{make_commit_file_name(generation)}", encode_commit_with_digest(content)
    )


def create_or_get_commit_and_mark_published(store: Store, path: str, encoded_commit: bytes) -> Commit:
    """Create a commit from its bytes, as :func:`create_or_get_commit` does; unknown fields are preserved."""
    own_commit = parse_commit(encoded_commit, path)
    with translate_errors(store.url):
        stored_commit = create_or_get_unmarked_commit(store, path, encoded_commit)
        if stored_commit.run == own_commit.run:
            # The mark lets readers tell a lost commit from one that never existed.
            with contextlib.suppress(ObjectExistsError):
                create_object_unless_identical(
                    store.objects, path.removesuffix(".json") + PUBLISHED_SUFFIX, b""
                )
    return stored_commit


def create_or_get_unmarked_commit(store: Store, path: str, encoded_commit: bytes) -> Commit:
    """Create a commit unless its path is taken; return the commit at that path."""
    for is_last_attempt in (False, False, True):
        try:
            create_object(store.objects, path, encoded_commit)
            return parse_commit(encoded_commit, path)
        except AlreadyExistsError:
            pass
        except (PermissionDeniedError, UnauthenticatedError, OSError):
            raise  # the commit certainly did not arrive
        except BaseError:
            if is_last_attempt:
                raise
        with contextlib.suppress(FileNotFoundError):
            return read_object(store.objects, path, lambda found: parse_commit(found, path))
    raise InputError(
        f"{store.url} answers both that {path} exists and that it does not: it cannot hold a store"
    )

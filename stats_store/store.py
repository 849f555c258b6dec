"""Open or create a store, and read its entries. Only what the index lists exists."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy.typing as npt
import zarr
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import ObjectStore
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError, InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.array_layouts import parse_layouts_by_path_or_raise
from sfm.stats_store.array_values import find_missing_centre_problem, find_value_problem
from sfm.stats_store.cards import (
    ClassifierCard,
    Commit,
    DatasetCard,
    ExtractionCard,
    SchemaVersion,
    Summary,
)
from sfm.stats_store.cloud_providers import is_missing_bucket_error
from sfm.stats_store.commits import (
    PUBLISHED_SUFFIX,
    make_commit_path,
    parse_commit_or_damage,
    parse_entry_cards,
    parse_store_schema_version,
)
from sfm.stats_store.concurrency import map_concurrently
from sfm.stats_store.location import AccessDeniedError, connect_object_store, redact_url, translate_errors
from sfm.stats_store.objects import (
    create_object,
    delete_object,
    is_empty_location,
    read_object,
    require_writable_local_store,
)
from sfm.stats_store.schema import UpgradeNeededError, require_supported_schema, strip_sub_class_suffix
from sfm.stats_store.store_index import read_store_index
from sfm.stats_store.verified_objects import (
    VerifiedZarrStore,
    read_published_object,
    translate_array_decode_errors,
)

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """A store of entries.

    Attributes
    ----------
    url : str
        Its URL, without credentials.
    objects : obstore.store.ObjectStore
    """

    url: str
    objects: ObjectStore = field(repr=False)

    def list_summaries_and_problems(
        self, progress: ProgressCallback = no_progress
    ) -> tuple[list[Summary], list[str]]:
        """Return the summaries of all visible entries, and why others cannot be read.

        One listing, then one request per entry for the commit of its latest generation. An entry whose newest
        commit is damaged, needs a newer version of this program or cannot be read is left out; it neither
        falls back to the generation before nor hides other entries.

        Returns
        -------
        list of Summary
            Ordered by dataset, backbone, size, role and creation.
        list of str
            One line per entry that cannot be read, with the path of its commit.
        """
        index = read_store_index(self.objects, self.url)
        latest = [paths[-1] for paths in index.commit_paths_by_key.values()]
        results = map_concurrently(self._read_summary_or_problem, latest, progress, "list", "entries")
        entries = [summary for summary in results if isinstance(summary, Summary)]
        entries.sort(key=lambda s: (s.dataset, s.backbone, s.image_size, s.role, s.created))
        return entries, index.unlisted_folder_notes + [
            reason for reason in results if isinstance(reason, str)
        ]

    def list_summaries(self, progress: ProgressCallback = no_progress) -> list[Summary]:
        """Return the summaries of all visible entries; log a warning for each that cannot be read.

        See :meth:`list_summaries_and_problems`.
        """
        entries, reasons = self.list_summaries_and_problems(progress)
        for reason in reasons:
            LOG.warning("left out of %s: %s", self.url, reason)
        return entries

    def list_commit_paths_by_key(self, entry_key: str = "") -> dict[str, list[str]]:
        """Return the paths of the commits of all keys, or of one, oldest first.

        Raises
        ------
        InputError
            If the store cannot be reached, or the folder of the key cannot be listed.
        """
        index = read_store_index(self.objects, self.url, entry_key)
        if entry_key and index.unlisted_folder_notes:
            raise AccessDeniedError(index.unlisted_folder_notes[0])
        return index.commit_paths_by_key

    def read_commit(self, path: str) -> Commit:
        """Read and validate a commit, also that it is at the path where its writer put it.

        Raises
        ------
        DamageError
            If it is missing, does not match its own digest, belongs to another path, or holds values that no
            writer writes.
        InputError
            If this version cannot read its schema, or the store cannot be reached.
        """
        with translate_errors(self.url):
            try:
                result = read_object(self.objects, path, lambda data: parse_commit_or_damage(data, path))
            except FileNotFoundError:
                mark = path.rpartition("/")[2].removesuffix(".json") + PUBLISHED_SUFFIX
                raise DamageError(
                    f"missing commit {path}: it was published and is gone; if it never was, delete {mark} "
                    f"there"
                ) from None
        if isinstance(result, DamageError):
            raise result
        return result

    def _read_summary_or_problem(self, path: str) -> Summary | str | None:
        try:
            commit = self.read_commit(path)
            return commit.summary if commit.kind == "entry" else None
        except (DamageError, UpgradeNeededError, AccessDeniedError) as error:
            return str(error)

    def read_entry_commit(self, summary: Summary) -> Commit:
        """Read the commit that holds a summary.

        Raises
        ------
        DamageError
            If it publishes another entry by now, or as :meth:`read_commit` does.
        """
        commit = self.read_commit(make_commit_path(summary))
        if commit.summary is None or commit.summary.entry_digest != summary.entry_digest:
            raise DamageError(
                f"damaged commit of {summary.dataset}: its entry is no longer {summary.entry_digest[:12]}"
            )
        return commit

    def open_entry(self, summary: Summary) -> "Entry":
        """Open the entry of a summary; its metadata and cards are compared with the commit.

        Raises
        ------
        DamageError
            If metadata is missing or was changed, or a card contradicts the commit.
        InputError
            If this version cannot read it, or the store cannot be reached.
        """
        commit = self.read_entry_commit(summary)
        assert commit.summary is not None
        records = {f"runs/{commit.run}/{path}": record for path, record in commit.objects.items()}
        metadata = [path for path in records if path.endswith("/zarr.json")]
        with translate_errors(self.url):
            data = map_concurrently(
                lambda path: read_published_object(self.objects, path, records[path]), metadata
            )
            read = dict(zip(metadata, data, strict=True))
        cards = parse_entry_cards(commit, read[f"runs/{commit.run}/zarr.json"])
        layouts = parse_layouts_by_path_or_raise(commit, cards, read)
        return Entry(
            store_url=self.url,
            summary=commit.summary,
            commit=commit,
            backbone=cards.backbone,
            dataset=cards.dataset,
            extraction=cards.extraction,
            classifier=cards.classifier,
            arrays=VerifiedZarrStore(ZarrObjectStore(self.objects, read_only=True), records, read, layouts),
        )


@dataclass(frozen=True)
class Entry:
    """The statistics of one dataset through one backbone.

    Attributes
    ----------
    store_url : str
        URL of the store it was opened from, without credentials.
    summary, backbone, dataset, extraction, classifier
        Its summary and cards.
    """

    store_url: str
    summary: Summary
    commit: Commit
    backbone: BackboneCard
    dataset: DatasetCard
    extraction: ExtractionCard
    classifier: ClassifierCard
    arrays: VerifiedZarrStore

    def list_array_names(self) -> list[str]:
        """Return the names of the entry's arrays, e.g. ``train/mean``."""
        return sorted(self.commit.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.commit.arrays

    def open_array(self, array_name: str) -> "zarr.Array[Any]":
        """Open an array without reading its values.

        Raises
        ------
        DamageError
            If its metadata is missing or damaged.
        InputError
            If the entry holds no such array, or the store cannot be reached.
        """
        if array_name not in self:
            raise InputError(
                f"the entry of {self.summary.dataset} through {self.summary.backbone} holds no {array_name}; "
                f"it holds {', '.join(self.list_array_names())}"
            )
        path = f"runs/{self.commit.run}/{array_name}"
        if path not in self.arrays.layouts_by_path:
            raise InputError(f"{array_name} is of a kind that this version cannot read: upgrade sfm-distill")
        with translate_errors(self.store_url), translate_array_decode_errors(path):
            return zarr.open_array(self.arrays, path=path, mode="r", zarr_format=3)

    def read_array(self, array_name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """Read an array, or some of its rows; all bytes and values are checked.

        Bytes are compared with the published digests. Values must be possible for such an array: see
        :mod:`sfm.stats_store.array_values`.

        Raises
        ------
        DamageError
            If a chunk is missing or damaged, or a value is impossible; names it.
        InputError
            If the entry holds no such array, or the store cannot be reached.
        """
        selected = self._read_array_without_value_check(array_name, rows)
        problem = find_value_problem(array_name, selected, self.dataset)
        count = array_name.replace("train/centre_", "train/centre_count_")
        if not problem and strip_sub_class_suffix(array_name) == "train/centre" and count in self:
            problem = find_missing_centre_problem(selected, self._read_array_without_value_check(count, rows))
        if problem:
            raise DamageError(f"damaged array runs/{self.commit.run}/{array_name}: {problem}")
        return selected

    def _read_array_without_value_check(self, array_name: str, rows: slice | None) -> npt.NDArray[Any]:
        array = self.open_array(array_name)
        with translate_errors(self.store_url), translate_array_decode_errors(array.path):
            selected: npt.NDArray[Any] = array[rows if rows is not None else slice(None)]  # type: ignore[assignment]
        return selected


class StoreConnections(NamedTuple):
    """Connections to a store that retry for minutes and for seconds, and its URL without credentials."""

    url: str
    patient_objects: ObjectStore
    brief_objects: ObjectStore


def connect_with_patient_and_brief_retries(
    location: str | ObjectStore, *, create_local_folder: bool
) -> StoreConnections:
    """Connect to the objects of a store twice; an obstore store is taken as it is."""
    if not isinstance(location, str):
        return StoreConnections(type(location).__name__, location, location)
    return StoreConnections(
        redact_url(location),
        connect_object_store(location, create_local_folder=create_local_folder),
        connect_object_store(location, create_local_folder=create_local_folder, use_long_retries=False),
    )


def open_store(location: str | ObjectStore) -> Store:
    """Open a store for reading.

    Parameters
    ----------
    location : str or obstore.store.ObjectStore
        A local path, an ``s3://``, ``gs://`` or ``az://`` URL, or an obstore store such as ``MemoryStore``.

    Raises
    ------
    InputError
        If there is no store, this version cannot read its schema, or the location cannot be reached.
    """
    return open_store_or_advise(location, "give the URL of a store, or create one with `sfm extract`")


def open_store_or_advise(location: str | ObjectStore, advice: str) -> Store:
    """Open a store; the error about a location without a store ends with `advice`. See :func:`open_store`."""
    url, patient_objects, brief_objects = connect_with_patient_and_brief_retries(
        location, create_local_folder=False
    )
    with translate_errors(url):
        try:
            schema = read_object(brief_objects, "zarr.json", parse_store_schema_version)
        except (FileNotFoundError, DamageError) as error:
            if is_missing_bucket_error(error):
                raise
            raise InputError(
                f"{url} is not a store: it has no readable root zarr.json with an sfm schema; {advice}"
            ) from None
    require_supported_schema(schema, url)
    return Store(url, patient_objects)


def open_or_create_store(location: str | ObjectStore) -> Store:
    """Open a store for writing; create it if its location is empty.

    Parameters
    ----------
    location : str or obstore.store.ObjectStore
        As for :func:`open_store`.

    Raises
    ------
    InputError
        If the location holds something else, cannot be written, or does not support the conditional writes
        that commits need.
    """
    url, _, brief_objects = connect_with_patient_and_brief_retries(location, create_local_folder=True)
    with translate_errors(url):
        root = encode_group_metadata({"schema": SchemaVersion().model_dump()})
        is_new = is_empty_location(brief_objects) and create_object_if_absent(
            url, brief_objects, "zarr.json", root
        )
        # If it exists by now, another writer has just created the store, which is fine.
        advice = "it holds other files: give an empty folder, or that of a store"
        store = open_store_or_advise(location, advice)
        # A server that ignores the condition rewrites the same bytes, and so reveals itself without harm.
        if create_object_if_absent(
            url, brief_objects, "zarr.json", read_object(brief_objects, "zarr.json", bytes)
        ):
            if is_new:
                with suppress(BaseError):
                    delete_object(brief_objects, "zarr.json")
            raise make_conditional_write_error(url)
        if is_new:
            create_object_if_absent(url, brief_objects, "runs/zarr.json", encode_group_metadata({}))
        require_writable_local_store(brief_objects)
    return store


def encode_group_metadata(attributes: dict[str, Any]) -> bytes:
    """Return the encoded metadata of a Zarr group with these attributes."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def create_object_if_absent(store_url: str, objects: ObjectStore, path: str, data: bytes) -> bool:
    """Create an object unless its path is taken; return whether it was created.

    Raises
    ------
    InputError
        If the server does not support conditional writes.
    """
    try:
        create_object(objects, path, data)
    except AlreadyExistsError:
        return False
    except BaseError as error:
        if isinstance(error, NotSupportedError) or "501 Not Implemented" in str(error):
            raise make_conditional_write_error(store_url) from None
        raise
    return True


def make_conditional_write_error(store_url: str) -> InputError:
    """Return the error about a location without conditional writes."""
    return InputError(
        f"{store_url} cannot hold a store: it does not support conditional writes (on S3: PUT with "
        f"If-None-Match), without which two writers overwrite each other; use another bucket or server"
    )

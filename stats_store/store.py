"""Open a store and read its entries. What the index does not show does not exist."""

import json
import logging
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import zarr
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import ObjectStore
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError, InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.cards import (
    ClassifierCard,
    Commit,
    DatasetCard,
    ExtractionCard,
    SchemaVersion,
    Summary,
)
from sfm.stats_store.clouds import is_without_container
from sfm.stats_store.commits import (
    COMMIT,
    KEY_FOLDER,
    MARK,
    commit_path,
    generation_of,
    parse_sealed,
    read_cards,
    root_schema,
)
from sfm.stats_store.concurrency import concurrently
from sfm.stats_store.declared import require_layouts
from sfm.stats_store.disk import unlisted
from sfm.stats_store.location import UnreadableError, connect, reaching, shown
from sfm.stats_store.objects import (
    create_object,
    delete_object,
    is_empty,
    list_readable,
    read_object,
    require_writable,
)
from sfm.stats_store.schema import UpgradeError, generic, require_readable
from sfm.stats_store.values import centre_problem, value_problem
from sfm.stats_store.verified import VerifiedStore, decoding, read_published

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """What the index of a store lists.

    Attributes
    ----------
    generations : dict of str to list of str
        By key (backbone hash/fingerprint/options) the paths of all commits, oldest first.
    unreadable : list of str
        One line per folder on a disk that may not be listed.
    """

    generations: dict[str, list[str]]
    unreadable: list[str]


@dataclass(frozen=True)
class Store:
    """A place that holds entries.

    Attributes
    ----------
    url : str
        Where it is, without credentials.
    objects : obstore.store.ObjectStore
    """

    url: str
    objects: ObjectStore = field(repr=False)

    def survey(self, progress: ProgressCallback = no_progress) -> tuple[list[Summary], list[str]]:
        """Return a summary of every visible entry, and why others cannot be shown.

        One listing, then one request per entry: the commit of its highest generation. An entry whose newest
        commit is damaged, or needs a later version of this program, or may not be read, does not stand for
        the one it replaced, nor in the way of the others.

        Returns
        -------
        list of Summary
            Ordered by dataset, backbone, size, role and creation.
        list of str
            One line per entry that cannot be shown, with the path of its commit.
        """
        index = self.index()
        latest = [versions[-1] for versions in index.generations.values()]
        found = concurrently(self._summary_or_reason, latest, progress, "list", "entries")
        entries = [summary for summary in found if isinstance(summary, Summary)]
        entries.sort(key=lambda s: (s.dataset, s.backbone, s.image_size, s.role, s.created))
        return entries, index.unreadable + [reason for reason in found if isinstance(reason, str)]

    def summaries(self, progress: ProgressCallback = no_progress) -> list[Summary]:
        """Return a summary of every visible entry; logs a warning for each that cannot be shown.

        See :meth:`survey`.
        """
        entries, reasons = self.survey(progress)
        for reason in reasons:
            LOG.warning("left out of %s: %s", self.url, reason)
        return entries

    def generations(self, key: str = "") -> dict[str, list[str]]:
        """Return the paths of all commits by key, or of one key, oldest first; see :meth:`index`.

        Raises
        ------
        InputError
            If the store cannot be reached, or the folder of the key may not be listed.
        """
        index = self.index(key)
        if key and index.unreadable:
            raise UnreadableError(index.unreadable[0])
        return index.generations

    def index(self, key: str = "") -> Index:
        """List the commits of all keys, or of one.

        A newest commit that was published and is gone is among them: reading it says so, where its absence
        would bring back what it replaced or removed.

        Raises
        ------
        InputError
            If the store cannot be reached.
        """
        with reaching(self.url):
            where = f"index/{key}" if key else "index"
            listed, unreadable = list_readable(self.objects, where, enter=KEY_FOLDER.fullmatch)
        commits: dict[str, set[str]] = defaultdict(set)
        marked: dict[str, set[str]] = defaultdict(set)
        for item in listed:
            if found := COMMIT.fullmatch(item["path"]):
                to = marked if found[3] == MARK else commits
                to[found[1]].add(item["path"].removesuffix(found[3]) + ".json")
        for folder, paths in marked.items():
            newest = max(map(generation_of, commits[folder]), default=0)
            commits[folder] |= {path for path in paths if generation_of(path) > newest}
        return Index(
            {name: sorted(paths, key=generation_of) for name, paths in commits.items() if paths},
            [unlisted(folder) for folder in unreadable],
        )

    def commit(self, path: str) -> Commit:
        """Read a commit and check that it is what its writer wrote, where its writer put it.

        Raises
        ------
        DamageError
            If the object is gone, does not match its own digest, belongs elsewhere in the index, or holds
            what no writer writes.
        InputError
            If it was written with a schema that this version cannot read, or the store cannot be reached.
        """
        with reaching(self.url):
            try:
                found = read_object(self.objects, path, lambda data: parse_sealed(data, path))
            except FileNotFoundError:
                mark = path.rpartition("/")[2].removesuffix(".json") + MARK
                raise DamageError(
                    f"missing commit {path}: it was published and is gone; if it never was, delete {mark} "
                    f"there"
                ) from None
        if isinstance(found, DamageError):
            raise found
        return found

    def _summary_or_reason(self, path: str) -> Summary | str | None:
        try:
            commit = self.commit(path)
            return commit.summary if commit.kind == "entry" else None
        except (DamageError, UpgradeError, UnreadableError) as error:
            return str(error)

    def commit_of(self, summary: Summary) -> Commit:
        """Read the commit that a summary shows.

        Raises
        ------
        DamageError
            If it shows another entry by now, or as :meth:`commit` does.
        """
        commit = self.commit(commit_path(summary))
        if commit.summary is None or commit.summary.entry_digest != summary.entry_digest:
            raise DamageError(
                f"damaged commit of {summary.dataset}: its entry is no longer {summary.entry_digest[:12]}"
            )
        return commit

    def open(self, summary: Summary) -> "Entry":
        """Open the entry that a summary shows; metadata and cards are checked against the commit here.

        Raises
        ------
        DamageError
            If metadata is missing or is not what was published, or a card is not that of the commit's entry.
        InputError
            If this version cannot read it, or the store cannot be reached.
        """
        commit = self.commit_of(summary)
        assert commit.summary is not None
        records = {f"runs/{commit.run}/{path}": record for path, record in commit.objects.items()}
        metadata = [path for path in records if path.endswith("/zarr.json")]
        with reaching(self.url):
            data = concurrently(lambda path: read_published(self.objects, path, records[path]), metadata)
            read = dict(zip(metadata, data, strict=True))
        cards = read_cards(commit, read[f"runs/{commit.run}/zarr.json"])
        layouts = require_layouts(commit, cards, read)
        return Entry(
            store_url=self.url,
            summary=commit.summary,
            commit=commit,
            backbone=cards.backbone,
            dataset=cards.dataset,
            extraction=cards.extraction,
            classifier=cards.classifier,
            arrays=VerifiedStore(ZarrObjectStore(self.objects, read_only=True), records, read, layouts),
        )


@dataclass(frozen=True)
class Entry:
    """The statistics of one dataset through one backbone.

    Attributes
    ----------
    store_url : str
        Where it was opened, without credentials.
    summary, backbone, dataset, extraction, classifier
        What the entry says about itself.
    """

    store_url: str
    summary: Summary
    commit: Commit
    backbone: BackboneCard
    dataset: DatasetCard
    extraction: ExtractionCard
    classifier: ClassifierCard
    arrays: VerifiedStore

    def names(self) -> list[str]:
        """Return the names of the entry's arrays, e.g. ``train/mean``."""
        return sorted(self.commit.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.commit.arrays

    def array(self, name: str) -> "zarr.Array[Any]":
        """Return an array without reading it.

        Raises
        ------
        DamageError
            If its metadata is missing or damaged.
        InputError
            If the entry holds no such array, or the store cannot be reached.
        """
        if name not in self:
            raise InputError(
                f"the entry of {self.summary.dataset} through {self.summary.backbone} holds no {name}; "
                f"it holds {', '.join(self.names())}"
            )
        path = f"runs/{self.commit.run}/{name}"
        if path not in self.arrays.layouts:
            raise InputError(f"{name} is of a kind that this version cannot read: upgrade sfm-distill")
        with reaching(self.store_url), decoding(path):
            return zarr.open_array(self.arrays, path=path, mode="r", zarr_format=3)

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """Read an array, or some of its rows; every byte and every value is checked.

        Bytes are compared with the published digest. Values are those that such an array can hold: see
        :mod:`sfm.stats_store.values`.

        Raises
        ------
        DamageError
            If a chunk is missing or damaged, or a value cannot be; names it.
        InputError
            If the entry holds no such array, or the store cannot be reached.
        """
        selected = self._read(name, rows)
        problem = value_problem(name, selected, self.dataset)
        count = name.replace("train/centre_", "train/centre_count_")
        if not problem and generic(name) == "train/centre" and count in self:
            problem = centre_problem(selected, self._read(count, rows))
        if problem:
            raise DamageError(f"damaged array runs/{self.commit.run}/{name}: {problem}")
        return selected

    def _read(self, name: str, rows: slice | None) -> npt.NDArray[Any]:
        array = self.array(name)
        with reaching(self.store_url), decoding(array.path):
            selected: npt.NDArray[Any] = array[rows if rows is not None else slice(None)]  # type: ignore[assignment]
        return selected


def located(place: str | ObjectStore, *, create: bool) -> tuple[str, ObjectStore, ObjectStore]:
    """Return a store's shown URL, its objects, and the same with little patience, for the first request."""
    if not isinstance(place, str):
        return type(place).__name__, place, place
    return shown(place), connect(place, create=create), connect(place, create=create, patient=False)


def open_store(place: str | ObjectStore) -> Store:
    """Open a store for reading.

    Parameters
    ----------
    place : str or obstore.store.ObjectStore
        A local path, or an ``s3://``, ``gs://`` or ``az://`` URL; or what obstore made of one, a
        ``MemoryStore`` for instance.

    Raises
    ------
    InputError
        If there is no store, its schema is unknown to this version, or the place cannot be reached.
    """
    return opened(place, "give the URL of a store, or create one with `sfm extract`")


def opened(place: str | ObjectStore, advice: str) -> Store:
    """Open a store, with this advice for a place that is none; see :func:`open_store`."""
    url, objects, first = located(place, create=False)
    with reaching(url):
        try:
            schema = read_object(first, "zarr.json", root_schema)
        except (FileNotFoundError, DamageError) as error:
            if is_without_container(error):
                raise
            raise InputError(
                f"{url} is not a store: it has no readable root zarr.json with an sfm schema; {advice}"
            ) from None
    require_readable(schema, url)
    return Store(url, objects)


def create_store(place: str | ObjectStore) -> Store:
    """Open a store for writing; make one where there is nothing yet.

    Parameters
    ----------
    place : str or obstore.store.ObjectStore
        As for :func:`open_store`.

    Raises
    ------
    InputError
        If the place holds something that is not a store, cannot be written, or does not support the
        conditional writes that commits need.
    """
    url, _, first = located(place, create=True)
    with reaching(url):
        root = group_metadata({"schema": SchemaVersion().model_dump()})
        made = is_empty(first) and created(url, first, "zarr.json", root)
        # Where it is there by now, another writer made the store a moment ago, which is just as well.
        store = opened(place, "it holds other files: give an empty folder, or that of a store")
        # What is written is what is there: nothing is lost on a server that does as it is told.
        if created(url, first, "zarr.json", read_object(first, "zarr.json", bytes)):
            if made:
                with suppress(BaseError):
                    delete_object(first, "zarr.json")
            raise no_conditional_writes(url)
        if made:
            created(url, first, "runs/zarr.json", group_metadata({}))
        require_writable(first)
    return store


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Return the metadata of a Zarr group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def created(url: str, objects: ObjectStore, path: str, data: bytes) -> bool:
    """Create an object; return False if there is one.

    Raises
    ------
    InputError
        If the server says that it knows no such thing.
    """
    try:
        create_object(objects, path, data)
    except AlreadyExistsError:
        return False
    except BaseError as error:
        if isinstance(error, NotSupportedError) or "501 Not Implemented" in str(error):
            raise no_conditional_writes(url) from None
        raise
    return True


def no_conditional_writes(url: str) -> InputError:
    """Return the refusal of a place where writers would overwrite each other's commits."""
    return InputError(
        f"{url} cannot hold a store: it does not support conditional writes (on S3: PUT with "
        f"If-None-Match), without which two writers overwrite each other; use another bucket or server"
    )

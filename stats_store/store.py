"""Open a store and read its entries. What the index does not show does not exist."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import obstore
import zarr
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore
from pydantic import ValidationError
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError, InputError
from sfm.stats_store.cards import (
    ClassifierCard,
    Commit,
    DatasetCard,
    ExtractionCard,
    SchemaVersion,
    Summary,
)
from sfm.stats_store.digest import canonical, sha256
from sfm.stats_store.location import connect, first_line, shown
from sfm.stats_store.schema import require_readable
from sfm.stats_store.verified import VerifiedStore, require_published

PARALLEL_REQUESTS = 16


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
    objects: ObjectStore

    def summaries(self) -> list[Summary]:
        """Return a summary of every visible entry, ordered by dataset, backbone, size, role and creation.

        One listing, then one request per entry: the commit of its highest generation.

        Raises
        ------
        DamageError
            If a commit is not what its writer wrote.
        """
        latest = [versions[-1] for versions in self.generations().values()]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            commits = list(pool.map(self.commit, latest))
        found = [commit.summary for commit in commits if commit.kind == "entry" and commit.summary]
        return sorted(found, key=lambda s: (s.dataset, s.backbone, s.image_size, s.role, s.created))

    def generations(self, key: str = "") -> dict[str, list[str]]:
        """Return the paths of all commits by key (backbone hash/fingerprint/options), oldest first."""
        found: dict[str, list[str]] = {}
        for path in self._paths(f"index/{key}" if key else "index"):
            parts = path.split("/")
            if len(parts) == 5 and parts[4].removesuffix(".json").isdigit():
                found.setdefault("/".join(parts[1:4]), []).append(path)
        return {name: sorted(paths, key=generation_of) for name, paths in found.items()}

    def commit(self, path: str) -> Commit:
        """Read a commit and check that it is what its writer wrote.

        Raises
        ------
        DamageError
            If the object is gone or does not match its own digest.
        InputError
            If it was written with a schema that this version cannot read.
        """
        try:
            return parse_commit(bytes(obstore.get(self.objects, path).bytes()), path)
        except FileNotFoundError as error:
            raise DamageError(f"missing commit {path} in {self.url}") from error

    def open(self, summary: Summary) -> "Entry":
        """Open the entry that a summary shows; its metadata is checked against the commit here.

        Raises
        ------
        DamageError
            If metadata is missing or is not what was published.
        """
        commit = self.commit(f"index/{summary.key}/{commit_name(summary.generation)}")
        records = {f"runs/{commit.run}/{path}": record for path, record in commit.objects.items()}
        metadata = [path for path in records if path.endswith("/zarr.json")]

        def checked(path: str) -> bytes:
            try:
                data = bytes(obstore.get(self.objects, path).bytes())
            except FileNotFoundError as error:
                raise DamageError(f"missing object {path}: it was published and is gone") from error
            require_published(path, data, records[path])
            return data

        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            read = dict(zip(metadata, pool.map(checked, metadata), strict=True))
        cards = json.loads(read[f"runs/{commit.run}/zarr.json"])["attributes"]
        return Entry(
            summary=summary,
            commit=commit,
            backbone=BackboneCard.model_validate(cards["backbone"]),
            dataset=DatasetCard.model_validate(cards["dataset"]),
            extraction=ExtractionCard.model_validate(cards["extraction"]),
            classifier=ClassifierCard.model_validate(cards["classifier"]),
            arrays=VerifiedStore(ZarrObjectStore(self.objects, read_only=True), records),
        )

    def _paths(self, prefix: str) -> Iterator[str]:
        for batch in obstore.list(self.objects, prefix=prefix):
            for item in batch:
                yield item["path"]


@dataclass(frozen=True)
class Entry:
    """The statistics of one dataset through one backbone.

    Attributes
    ----------
    summary, backbone, dataset, extraction, classifier
        What the entry says about itself.
    """

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
        InputError
            If the entry holds no such array.
        """
        if name not in self:
            raise InputError(
                f"the entry of {self.summary.dataset} through {self.summary.backbone} holds no {name}; "
                f"it holds {', '.join(self.names())}"
            )
        return zarr.open_array(self.arrays, path=f"runs/{self.commit.run}/{name}", mode="r", zarr_format=3)

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """Read an array, or some of its rows; every byte is compared with the published digest.

        Raises
        ------
        DamageError
            If a chunk is missing or damaged; names it.
        InputError
            If the entry holds no such array.
        """
        selected: npt.NDArray[Any] = self.array(name)[rows if rows is not None else slice(None)]  # type: ignore[assignment]
        return selected


def commit_name(generation: int) -> str:
    """Return the file name of a generation's commit."""
    return f"{generation:08d}.json"


def generation_of(path: str) -> int:
    """Return the generation that a commit's path names."""
    return int(path.rpartition("/")[2].removesuffix(".json"))


def parse_commit(data: bytes, path: str) -> Commit:
    """Parse the bytes of a commit; see :meth:`Store.commit` for the errors."""
    try:
        envelope = json.loads(data)
        content = envelope["commit"]
        intact = sha256(canonical(content)) == envelope["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"damaged commit {path}: not readable as a commit") from error
    if not intact:
        raise DamageError(f"damaged commit {path}: it does not match its own digest")
    require_readable(SchemaVersion.model_validate(content["schema"]), path)
    try:
        return Commit.model_validate(content)
    except ValidationError as error:
        raise DamageError(f"damaged commit {path}: {error.error_count()} fields are not valid") from error


def open_store(url: str) -> Store:
    """Open a store for reading.

    Parameters
    ----------
    url : str
        A local path, or an ``s3://``, ``gs://`` or ``az://`` URL.

    Raises
    ------
    InputError
        If there is no store at the URL, or its schema is unknown to this version.
    """
    objects = connect(url)
    try:
        root = json.loads(bytes(obstore.get(objects, "zarr.json").bytes()))
        schema = SchemaVersion.model_validate(root["attributes"]["schema"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{shown(url)} is not a store: it has no readable root zarr.json with an sfm schema; "
            f"give the URL of a store, or create one with `sfm extract`"
        ) from error
    except BaseError as error:
        raise InputError(f"cannot read {shown(url)}: {first_line(error)}") from error
    require_readable(schema, shown(url))
    return Store(shown(url), objects)


def create_store(url: str) -> Store:
    """Open a store for writing; make one where there is nothing yet.

    Raises
    ------
    InputError
        If the place holds something that is not a store, or cannot be written.
    """
    objects = connect(url, create=True)
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"schema": SchemaVersion().model_dump()},
    }
    try:
        first = next(iter(obstore.list(objects, chunk_size=1)), None)
        if not first:
            obstore.put(objects, "zarr.json", json.dumps(root, indent=1).encode(), mode="create")
    except AlreadyExistsError:
        pass  # another writer made the store a moment ago: just as well
    except (BaseError, OSError) as error:
        raise InputError(f"cannot write to {shown(url)}: {first_line(error)}") from error
    return open_store(url)

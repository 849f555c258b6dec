"""Write a run, then make it visible by one commit, or not at all."""

import datetime
import json
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import obstore
from obstore.exceptions import AlreadyExistsError
from zarr.storage import ObjectStore as ZarrObjectStore

from sfm.backbones.card import BackboneCard
from sfm.stats_store.cards import (
    ClassifierCard,
    Commit,
    DatasetCard,
    ExtractionCard,
    ObjectRecord,
    Summary,
)
from sfm.stats_store.digest import (
    BLOCK_ROWS,
    block_digest,
    canonical,
    combine_blocks,
    entry_digest,
    sha256,
)
from sfm.stats_store.location import delete_below
from sfm.stats_store.schema import create_array
from sfm.stats_store.store import PARALLEL_REQUESTS, Store, commit_name, generation_of


@dataclass(frozen=True)
class Draft:
    """A run that is being written; nobody sees it until :func:`publish`.

    Attributes
    ----------
    run : str
        Its folder below ``runs/``.
    digests : dict of str to str
        Digest of every array written so far.
    """

    store: Store
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    digests: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write a whole array."""
        blocks = (array[i : i + BLOCK_ROWS] for i in range(0, len(array), BLOCK_ROWS))
        self.write_blocks(name, blocks, array.shape, array.dtype)

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
        ValueError
            If the blocks do not make up `shape`.
        """
        kind = np.dtype(dtype)
        target = create_array(ZarrObjectStore(self.store.objects), self.run, name, shape, kind)
        step = target.chunks[0]
        digests, start = [], 0
        for block in blocks:
            if start % BLOCK_ROWS:
                raise ValueError(f"{name}: only the last block may be shorter than {BLOCK_ROWS} rows")
            digests.append(block_digest(block.astype(kind, copy=False)))
            for row in range(0, len(block), step):
                target[start + row : start + min(row + step, len(block))] = block[row : row + step]
            start += len(block)
        if start != shape[0]:
            raise ValueError(f"{name}: {start} rows given, {shape[0]} announced")
        self.digests[name] = combine_blocks(digests, kind, shape)

    def discard(self) -> None:
        """Delete what was written."""
        delete_below(self.store.objects, f"runs/{self.run}")


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
    generation, existing = current(store, key)
    if existing and existing.kind == "entry" and existing.summary and not replace:
        draft.discard()
        return Published(existing.summary, "already there")
    attributes = {
        "backbone": backbone.model_dump(mode="json"),
        "dataset": dataset.model_dump(mode="json"),
        "extraction": extraction.model_dump(mode="json"),
        "classifier": classifier.model_dump(mode="json"),
    }
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    obstore.put(store.objects, f"runs/{draft.run}/zarr.json", json.dumps(group, indent=1).encode())
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
        generation=generation + 1,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    commit = Commit(
        kind="entry", run=draft.run, summary=summary, arrays=draft.digests, objects=recorded(store, draft.run)
    )
    winner = put_commit(store, key, generation + 1, commit)
    if winner.run == draft.run:
        return Published(summary, "published")
    draft.discard()
    return Published(winner.summary or summary, "another writer was first")


def put_commit(store: Store, key: str, generation: int, commit: Commit) -> Commit:
    """Create one generation of a key, unless another writer has: exactly one creation succeeds.

    A writer whose answer was lost on the way is told that the object exists; it finds its own run in it.

    Returns
    -------
    Commit
        The one that now stands: `commit`, or the one that was there first.
    """
    path = f"index/{key}/{commit_name(generation)}"
    content = commit.model_dump(mode="json", by_alias=True)
    envelope = {"commit": content, "sha256": sha256(canonical(content))}
    try:
        obstore.put(store.objects, path, json.dumps(envelope).encode(), mode="create")
    except AlreadyExistsError:
        return store.commit(path)
    return commit


def recorded(store: Store, run: str) -> dict[str, ObjectRecord]:
    """Read a run back and record size and SHA-256 of every object, by path below ``runs/<run>/``."""
    prefix = f"runs/{run}"
    paths = [item["path"] for batch in obstore.list(store.objects, prefix=prefix) for item in batch]

    def record(path: str) -> ObjectRecord:
        data = bytes(obstore.get(store.objects, path).bytes())
        return ObjectRecord(size=len(data), sha256=sha256(data))

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        records = pool.map(record, paths)
        return {path.removeprefix(prefix + "/"): r for path, r in zip(paths, records, strict=True)}

"""Entries that are changed and signed again, as whoever wrote them could."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfm.stats_store.cards import Summary
from sfm.stats_store.commits import encode_commit_with_digest, make_commit_path
from sfm.stats_store.digests import compute_entry_digest
from sfm.stats_store.store import Store
from sfm.stats_store.verified_objects import make_object_record


def get_run_folder(store: Store, summary: Summary) -> Path:
    """Return the folder of an entry's run."""
    return Path(store.url) / "runs" / store.read_entry_commit(summary).run


def rewrite_commit(store: Store, summary: Summary, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a commit of a store in a folder and digest it again; returns its file."""
    path = Path(store.url) / make_commit_path(summary)
    content = json.loads(path.read_bytes())["commit"]
    change(content)
    key = (summary.backbone_hash, summary.fingerprint, summary.options)
    content["summary"]["entry_digest"] = compute_entry_digest(content["arrays"], *key)
    path.write_bytes(encode_commit_with_digest(content))
    return path


def change_object(store: Store, summary: Summary, name: str, data: bytes) -> None:
    """Write an object of a run, and list it in the commit."""
    path = get_run_folder(store, summary) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    record = make_object_record(data).model_dump()
    rewrite_commit(store, summary, lambda content: content["objects"].update({name: record}))


def change_metadata(
    store: Store, summary: Summary, array: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Change the ``zarr.json`` of an array."""
    metadata = json.loads((get_run_folder(store, summary) / array / "zarr.json").read_bytes())
    change(metadata)
    change_object(store, summary, f"{array}/zarr.json", json.dumps(metadata).encode())

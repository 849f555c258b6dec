"""Small entries of random numbers, published for real; most helpers are those of the store's contract."""

import os
import time
from pathlib import Path

from sfm.stats_store.cards import Summary
from sfm.stats_store.commits import make_commit_path
from sfm.stats_store.digests import compute_entry_digest
from sfm.stats_store.publication import create_or_get_commit
from sfm.stats_store.store import Store
from sfm.testing.stores import (
    CLASSES,
    CLASSIFIER,
    FEATURES,
    TEST_SAMPLES,
    TRAIN_SAMPLES,
    make_backbone_card,
    publish_random_entry,
    publish_with_placeholder_cards,
    write_random_arrays,
)

__all__ = [
    "CLASSES",
    "CLASSIFIER",
    "FEATURES",
    "TEST_SAMPLES",
    "TRAIN_SAMPLES",
    "age_files",
    "make_backbone_card",
    "publish_fake_commits",
    "publish_random_entry",
    "publish_with_placeholder_cards",
    "write_random_arrays",
]


def publish_fake_commits(store: Store, summary: Summary, entries: int) -> None:
    """Publish commits like that of an entry, of other data and without runs."""
    whole = store.read_commit(make_commit_path(summary))
    for number in range(entries):
        fingerprint, run = f"{number:064x}", f"{number:032x}"
        digest = compute_entry_digest(whole.arrays, summary.backbone_hash, fingerprint, summary.options)
        own = summary.model_copy(update={"fingerprint": fingerprint, "entry_digest": digest})
        create_or_get_commit(store, own.key, 1, whole.model_copy(update={"run": run, "summary": own}))


def age_files(path: Path, days: float = 8) -> None:
    """Set the times of all files in a folder back."""
    then = time.time() - days * 86400
    for file in [*path.rglob("*"), path]:
        os.utime(file, (then, then))

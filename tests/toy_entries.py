"""Small entries of random numbers, published for real."""

import hashlib
import os
import time
from pathlib import Path

import numpy as np

from sfm.backbones.card import BackboneCard, Preprocessing
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, Summary
from sfm.stats_store.commits import make_commit_path
from sfm.stats_store.digests import compute_entry_digest
from sfm.stats_store.publication import Draft, PublishResult, create_commit, publish_draft
from sfm.stats_store.store import Store

CLASSES, FEATURES = 4, 6
TRAIN, TEST = 20, 5000

CLASSIFIER = ClassifierCard(
    solver="none", l2=1.0, iterations=1, converged=True, held_out_top1=0.5, held_out_top5=None
)


def backbone_card(spec: str = "lite0", size: int = 96, weights: str = "w") -> BackboneCard:
    """A card of a backbone that nobody needs to load."""
    preprocessing = Preprocessing(
        input_size=size, resize=size, resampling="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    return BackboneCard(
        spec=spec,
        model=f"timm_{spec}",
        rule="pre-logits",
        weights=hashlib.sha256(weights.encode()).hexdigest(),
        preprocessing=preprocessing,
        features=FEATURES,
    )


def fill(draft: Draft, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a few arrays of random numbers and return them."""
    rng = np.random.default_rng(seed)
    arrays = {
        "train/count": 1 + rng.multinomial(TRAIN - CLASSES, np.full(CLASSES, 1 / CLASSES)),
        "train/mean": rng.standard_normal((CLASSES, FEATURES)),
        "train/centre_2": rng.standard_normal((CLASSES, 2, FEATURES)).astype(np.float32),
        "test/feature": rng.standard_normal((TEST, FEATURES)).astype(np.float16),
        "test/label": rng.integers(0, CLASSES, TEST).astype(np.int32),
    }
    for name, array in arrays.items():
        draft.write_array(name, array)
    return arrays


def commit(
    draft: Draft,
    *,
    dataset: str = "toy",
    backbone: BackboneCard | None = None,
    fingerprint: str = "f" * 64,
    role: str = "full",
    options: dict[str, object] | None = None,
    leaves: list[str] | None = None,
    test_samples: int = TEST,
    replace: bool = False,
) -> PublishResult:
    """Publish a draft with plausible cards."""
    ids = [f"n{i}" for i in range(CLASSES)]
    return publish_draft(
        draft,
        backbone or backbone_card(),
        DatasetCard(
            name=dataset,
            class_ids=ids,
            class_names=ids,
            train_samples=TRAIN,
            test_samples=test_samples,
            fingerprint=fingerprint,
            leaves=leaves or [fingerprint],
        ),
        ExtractionCard(
            options={"seed": 0} if options is None else options,
            role=role,  # type: ignore[arg-type]
            versions={},
            device="cpu",
            threads=1,
            seconds=1.0,
            images_per_second=20.0,
        ),
        CLASSIFIER,
        replace=replace,
    )


def put(store: Store, seed: int = 0, **words: object) -> Summary:
    """Publish a small entry, as :func:`commit` does, and return its summary."""
    draft = Draft(store)
    fill(draft, seed)
    return commit(draft, **words).summary  # type: ignore[arg-type]


def publish_many(store: Store, summary: Summary, entries: int) -> None:
    """Publish commits like that of an entry, of other data; their runs do not exist."""
    whole = store.read_commit(make_commit_path(summary))
    for number in range(entries):
        fingerprint, run = f"{number:064x}", f"{number:032x}"
        digest = compute_entry_digest(whole.arrays, summary.backbone_hash, fingerprint, summary.options)
        own = summary.model_copy(update={"fingerprint": fingerprint, "entry_digest": digest})
        create_commit(store, own.key, 1, whole.model_copy(update={"run": run, "summary": own}))


def grow_old(path: Path, days: float = 8) -> None:
    """Set the times of everything in a folder back."""
    then = time.time() - days * 86400
    for file in [*path.rglob("*"), path]:
        os.utime(file, (then, then))

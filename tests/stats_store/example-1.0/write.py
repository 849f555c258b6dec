"""How the example store beside this file was written: once, by version 0.1.0, which made schema 1.0.

It is never written again: every later version has to read these very bytes. What they mean is in
expected.json, with digests of plain little-endian values that owe nothing to this project.

    python tests/stats_store/example-1.0/write.py FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from sfm.backbones.card import BackboneCard, Preprocessing
from sfm.pipeline.block_moments import compute_moments
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, Summary
from sfm.stats_store.entry_history import read_commit_statuses, remove_entry
from sfm.stats_store.entry_merge import merge_entries
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import Store, open_or_create_store

WIDTH, PIXELS = 8, 4
BACKBONE = BackboneCard(
    spec="lite0",
    model="tf_efficientnet_lite0",
    rule="pre-logits",
    weights="3f" * 32,
    preprocessing=Preprocessing(
        input_size=PIXELS, resize=PIXELS, resampling="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
    features=WIDTH,
)


def put(
    store: Store,
    name: str,
    class_ids: list[str],
    seed: int,
    *,
    role: str = "full",
    held_out: bool = True,
    everything: bool = False,
    replace: bool = False,
) -> Summary:
    """Publish an entry of random features."""
    rng = np.random.default_rng(seed)
    classes = len(class_ids)
    labels = np.repeat(np.arange(classes, dtype=np.int32), 6)
    features = rng.standard_normal((len(labels), WIDTH)).astype(np.float32) + labels[:, None]
    moments = compute_moments(features, labels, classes)
    draft = Draft(store)
    draft.write_array("train/count", moments.count)
    draft.write_array("train/mean", moments.mean)
    draft.write_array("train/scatter_diagonal", moments.scatter_diagonal)
    draft.write_array("train/within_scatter", moments.within_scatter)
    centre = np.full((classes, 5, WIDTH), np.nan, dtype=np.float32)
    centre[:, :2] = features.reshape(classes, 2, 3, WIDTH).mean(axis=2)
    draft.write_array("train/centre_5", centre)
    draft.write_array("train/centre_count_5", np.tile(np.array([3, 3, 0, 0, 0]), (classes, 1)))
    draft.write_array("classifier/weight", rng.standard_normal((classes, WIDTH)).astype(np.float32))
    draft.write_array("classifier/bias", rng.standard_normal(classes).astype(np.float32))
    if held_out:
        draft.write_array("test/feature", features[::2].astype(np.float16))
        draft.write_array("test/label", labels[::2])
    if everything:
        draft.write_array("train/feature", features)
        draft.write_array("train/label", labels)
        draft.write_array(
            "exemplar/image", rng.integers(0, 256, (classes, 2, PIXELS, PIXELS, 3), dtype=np.uint8)
        )
        draft.write_array("exemplar/role", np.tile(np.array([1, 0], dtype=np.uint8), (classes, 1)))
        draft.write_array("exemplar/sample", np.arange(classes * 2).reshape(classes, 2))
    fingerprint = hashlib.sha256(f"{name} {role}".encode()).hexdigest()
    return publish_draft(
        draft,
        BACKBONE,
        DatasetCard(
            name=name,
            class_ids=class_ids,
            class_names=[i.capitalize() for i in class_ids],
            train_samples=len(labels),
            test_samples=len(labels[::2]),
            fingerprint=fingerprint,
            leaves=[fingerprint],
            licence="CC0-1.0",
            source=f"folder:{name}",
        ),
        ExtractionCard(
            options={"origin": "extracted", "role": role, "seed": 0, "precision": "float32", "views": 1},
            role=role,  # type: ignore[arg-type]
            versions={"sfm-distill": "0.1.0"},
            device="cpu",
            threads=2,
            seconds=1.5,
            images_per_second=16.0,
            listing=hashlib.sha256(name.encode()).hexdigest(),
        ),
        ClassifierCard(
            solver="none", l2=0.01, iterations=3, converged=True, held_out_top1=0.75, held_out_top5=None
        ),
        replace=replace,
    ).summary


def expected(store: Store) -> dict[str, object]:
    """Say what is in the store."""
    entries = []
    for summary in store.list_summaries():
        entry = store.open_entry(summary)
        arrays = {name: entry.read_array(name) for name in entry.list_array_names()}
        entries.append(
            {
                "summary": summary.model_dump(mode="json"),
                "backbone": entry.backbone.model_dump(mode="json"),
                "dataset": entry.dataset.model_dump(mode="json"),
                "extraction": entry.extraction.model_dump(mode="json"),
                "classifier": entry.classifier.model_dump(mode="json"),
                "arrays": {
                    name: {
                        "dtype": array.dtype.newbyteorder("<").str,
                        "shape": list(array.shape),
                        "sha256": hashlib.sha256(
                            np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
                        ).hexdigest(),
                    }
                    for name, array in arrays.items()
                },
            }
        )
    history = [[g.path, g.state] for g in read_commit_statuses(store)]
    return {"entries": entries, "history": sorted(history)}


def main(folder: Path) -> None:
    """Write the store and what is expected of it."""
    store = open_or_create_store(str(folder / "store"))
    north = put(store, "north", ["finch", "robin", "wren"], 1, everything=True)
    south = put(store, "south", ["parrot", "robin"], 2)
    put(store, "north", ["finch", "robin", "wren"], 3, role="tuning")
    put(store, "private", ["finch", "heron"], 4, held_out=False)
    put(store, "revised", ["finch", "heron"], 5)
    put(store, "revised", ["finch", "heron"], 6, replace=True)
    remove_entry(store, put(store, "withdrawn", ["finch", "heron"], 7))
    merge_entries(store, [store.open_entry(north), store.open_entry(south)], "north-and-south")
    (folder / "expected.json").write_text(json.dumps(expected(store), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

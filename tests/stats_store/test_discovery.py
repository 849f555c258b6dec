"""Finding out what a store holds, without loading it."""

import time

import pytest
from toy_entries import (
    publish_fake_commits,
    publish_random_entry,
    publish_with_placeholder_cards,
    write_random_arrays,
)

from sfm import store_tables
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries


@pytest.mark.parametrize("entries", [50, pytest.param(1000, marks=pytest.mark.torture)])
def test_listing_reads_only_commits(tmp_path, entries):
    store = open_or_create_store(str(tmp_path))
    publish_fake_commits(store, publish_random_entry(store), entries - 1)
    began = time.perf_counter()
    assert len(open_store(str(tmp_path)).list_summaries()) == entries
    seconds = time.perf_counter() - began
    print(f"\ntorture: `ls` of {entries} entries in a folder: {seconds:.2f} s")


def test_entry_document_contains_cards_classes_and_array_sizes(fashion_store):
    store = open_store(fashion_store)
    (summary,) = [s for s in store.list_summaries() if (s.backbone, s.role) == ("lite0", "full")]
    entry = store.open_entry(summary)
    document = store_tables.make_entry_document(entry)
    assert document["dataset"]["licence"] == "MIT"
    assert document["dataset"]["source"] == "builtin:fashion-mnist-6k"
    assert document["backbone"]["hash"] == summary.backbone_hash
    assert document["classifier"]["held_out_top1"] == summary.held_out_top1
    assert [(c["name"], c["train_samples"], c["test_samples"]) for c in document["classes"]][:2] == [
        ("T-shirt/top", 40, 40),
        ("Trouser", 40, 40),
    ]
    mean = document["arrays"]["train/mean"]
    assert (mean["shape"], mean["dtype"], mean["bytes"]) == ([10, 1280], "float64", 10 * 1280 * 8)


def test_reported_sizes_match_the_files_on_disk(tmp_path):
    store = open_or_create_store(str(tmp_path))
    entry = store.open_entry(publish_random_entry(store))
    document = store_tables.make_entry_document(entry)
    folder = tmp_path / "runs" / document["run"]
    on_disk = {
        name: sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
        for name in document["arrays"]
    }
    assert {name: a["stored_bytes"] for name, a in document["arrays"].items()} == on_disk
    assert document["stored_bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert document["bytes"] == sum(entry.open_array(name).nbytes for name in entry.list_array_names())
    assert document["compression_ratio"] == pytest.approx(document["bytes"] / sum(on_disk.values()))


def test_entry_without_held_out_features_can_be_opened_shown_verified_and_copied(tmp_path):
    store = open_or_create_store(str(tmp_path / "s"))
    draft = Draft(store)
    draft.write_array("train/count", write_random_arrays(Draft(store))["train/count"])
    summary = publish_with_placeholder_cards(draft).summary
    entry = store.open_entry(summary)
    assert entry.list_array_names() == ["train/count"]
    document = store_tables.make_entry_document(entry)
    assert {c["test_samples"] for c in document["classes"]} == {None}
    assert [v.is_sound for v in verify_entries(store)] == [True]
    assert copy_entries(store, open_or_create_store(str(tmp_path / "t")), [summary])[0].outcome == "copied"

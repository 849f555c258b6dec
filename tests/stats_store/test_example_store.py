"""A store of schema 1.0, written once: every version reads it, and what later minor versions make of it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_entries import publish_random_entry

from sfm import store_tables
from sfm.errors import InputError
from sfm.stats_store.commits import encode_commit_with_digest
from sfm.stats_store.digests import compute_entry_digest, compute_sha256
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import read_commit_statuses
from sfm.stats_store.entry_selection import select_only_summary
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

EXAMPLE = Path(__file__).parent / "example-1.0"
EXPECTED = json.loads((EXAMPLE / "expected.json").read_text())
IDS = [f"{e['summary']['dataset']}-{e['summary']['role']}" for e in EXPECTED["entries"]]


@pytest.fixture(scope="module")
def example_store() -> Store:
    """The example store; nobody writes to it."""
    return open_store(str(EXAMPLE / "store"))


@pytest.fixture
def writable_store_path(tmp_path) -> Path:
    """A copy of the example store that may be changed."""
    shutil.copytree(EXAMPLE / "store", tmp_path / "store")
    return tmp_path / "store"


def test_the_example_was_written_with_schema_1_0():
    root = json.loads((EXAMPLE / "store" / "zarr.json").read_text())
    commits = [json.loads(p.read_text())["commit"] for p in (EXAMPLE / "store" / "index").rglob("*.json")]
    written = [root["attributes"]["schema"], *(commit["schema"] for commit in commits)]
    assert len(written) > 8
    assert all(schema == {"major": 1, "minor": 0, "requires": []} for schema in written)


def test_every_entry_of_the_example_is_listed(example_store):
    listed = [s.model_dump(mode="json") for s in example_store.list_summaries()]
    for found, expected in zip(listed, EXPECTED["entries"], strict=True):
        assert found | expected["summary"] == found


@pytest.mark.parametrize("expected", EXPECTED["entries"], ids=IDS)
def test_example_arrays_and_cards_match_the_recorded_values(example_store, expected):
    (summary,) = [
        s for s in example_store.list_summaries() if s.entry_digest == expected["summary"]["entry_digest"]
    ]
    entry = example_store.open_entry(summary)
    assert entry.list_array_names() == sorted(expected["arrays"])
    for name, written in expected["arrays"].items():
        array = entry.read_array(name)
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
        assert (little.dtype.str, list(array.shape)) == (written["dtype"], written["shape"])
        assert hashlib.sha256(little.tobytes()).hexdigest() == written["sha256"]
    for card in ("backbone", "dataset", "extraction", "classifier"):
        found = getattr(entry, card).model_dump(mode="json")
        assert found | expected[card] == found


def test_example_store_is_sound(example_store):
    verdicts = verify_entries(example_store)
    assert len(verdicts) == len(EXPECTED["entries"])
    assert [v.problems for v in verdicts] == [[]] * len(verdicts)


def test_example_store_history_has_every_commit_state(example_store):
    assert sorted([g.path, g.state] for g in read_commit_statuses(example_store)) == EXPECTED["history"]
    assert {g.state for g in read_commit_statuses(example_store)} == {
        "current",
        "replaced",
        "removed",
        "tombstone",
    }


def test_example_store_covers_every_array_origin_and_role(example_store):
    from sfm.stats_store.schema import DIMENSIONS, strip_sub_class_suffix

    names = {strip_sub_class_suffix(name) for expected in EXPECTED["entries"] for name in expected["arrays"]}
    assert names == set(DIMENSIONS)
    assert {e["extraction"]["options"]["origin"] for e in EXPECTED["entries"]} == {"extracted", "merged"}
    assert {s.role for s in example_store.list_summaries()} == {"full", "tuning"}


def test_entry_can_be_published_to_a_schema_1_0_store(writable_store_path):
    summary = publish_random_entry(open_or_create_store(str(writable_store_path)))
    assert summary in open_store(str(writable_store_path)).list_summaries()


def change_commit(path: Path, change) -> None:
    """Change the content of a commit, as a later version would have written it."""
    inner = json.loads(path.read_text())["commit"]
    change(inner)
    path.write_bytes(encode_commit_with_digest(inner))


def write_newer_minor_version(writable_store_path: Path) -> str:
    """Rewrite one entry as version 1.9 might have: more arrays, more in cards and commit; returns its run."""
    store = open_store(str(writable_store_path))
    summary = select_only_summary(store.list_summaries(), dataset="south")
    run = store.open_entry(summary).commit.run
    folder = writable_store_path / "runs" / run
    group = json.loads((folder / "zarr.json").read_text())
    group["attributes"]["dataset"]["collected"] = "2031"
    group["attributes"]["provenance"] = {"signed": True}
    news = {
        "zarr.json": json.dumps(group).encode(),
        "train/skewness/zarr.json": b'{"node_type": "array", "codecs": [{"name": "of 2031"}]}',
        "train/skewness/c/0/0": bytes(range(200)),
    }
    for name, data in news.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    def change(inner: dict[str, Any]) -> None:
        inner["schema"]["minor"] = 9
        inner["signature"] = "of a later version"
        inner["summary"]["quality"] = 0.5
        inner["arrays"]["train/skewness"] = "0" * 64
        key = (summary.backbone_hash, summary.fingerprint, summary.options)
        inner["summary"]["entry_digest"] = compute_entry_digest(inner["arrays"], *key)
        for name, data in news.items():
            inner["objects"][name] = {"size": len(data), "sha256": compute_sha256(data)}

    change_commit(writable_store_path / "index" / summary.key / "00000001.json", change)
    root = json.loads((writable_store_path / "zarr.json").read_text())
    root["attributes"]["schema"]["minor"] = 9
    root["attributes"]["theme"] = "dark"
    (writable_store_path / "zarr.json").write_text(json.dumps(root))
    return run


def test_newer_minor_version_is_read_and_unknown_content_is_ignored(writable_store_path):
    write_newer_minor_version(writable_store_path)
    store = open_store(str(writable_store_path))
    entry = store.open_entry(select_only_summary(store.list_summaries(), dataset="south"))
    (expected,) = [e for e in EXPECTED["entries"] if e["summary"]["dataset"] == "south"]
    assert set(entry.list_array_names()) == {*expected["arrays"], "train/skewness"}
    assert list(entry.read_array("train/count")) == [6, 6]
    assert entry.dataset.name == "south"
    document = store_tables.make_entry_document(entry)
    assert document["arrays"]["train/skewness"] == {
        "shape": None,
        "dtype": None,
        "bytes": None,
        "stored_bytes": 255,
        "compression_ratio": None,
    }


def test_verify_detects_damage_in_unknown_arrays_of_a_newer_minor_version(writable_store_path):
    run = write_newer_minor_version(writable_store_path)
    assert all(v.is_sound for v in verify_entries(open_store(str(writable_store_path))))
    (writable_store_path / "runs" / run / "train" / "skewness" / "c" / "0" / "0").write_bytes(bytes(200))
    assert [p for v in verify_entries(open_store(str(writable_store_path))) for p in v.problems] == [
        f"damaged object runs/{run}/train/skewness/c/0/0: its SHA-256 is not the published one"
    ]


def test_copy_preserves_every_file_of_a_newer_minor_version(writable_store_path, tmp_path):
    run = write_newer_minor_version(writable_store_path)
    store, target = open_store(str(writable_store_path)), open_or_create_store(str(tmp_path / "target"))
    summary = select_only_summary(store.list_summaries(), dataset="south")
    assert [c.outcome for c in copy_entries(store, target, [summary])] == ["copied"]
    for folder in (f"runs/{run}", f"index/{summary.key}"):
        files = [
            p.relative_to(writable_store_path)
            for p in (writable_store_path / folder).rglob("*")
            if p.is_file()
        ]
        copied = [p.relative_to(tmp_path / "target") for p in (tmp_path / "target" / folder).rglob("*")]
        assert sorted(files) == sorted(p for p in copied if (tmp_path / "target" / p).is_file())
        assert all(
            (writable_store_path / p).read_bytes() == (tmp_path / "target" / p).read_bytes() for p in files
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"major": 2}, "schema 2.0.*upgrade"), ({"requires": ["encryption"]}, "requires encryption.*upgrade")],
)
def test_store_with_an_unsupported_schema_is_refused_with_an_upgrade_hint(
    writable_store_path, change, message
):
    root = json.loads((writable_store_path / "zarr.json").read_text())
    root["attributes"]["schema"] |= change
    (writable_store_path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(InputError, match=message):
        open_store(str(writable_store_path))


@pytest.mark.parametrize("change", [{"major": 2}, {"requires": ["encryption"]}])
def test_entry_with_an_unsupported_schema_is_skipped_with_a_warning(writable_store_path, change, caplog):
    store = open_store(str(writable_store_path))
    summary = select_only_summary(store.list_summaries(), dataset="south")
    path = writable_store_path / "index" / summary.key / "00000001.json"
    change_commit(path, lambda inner: inner["schema"].update(change))
    assert len(store.list_summaries()) == len(EXPECTED["entries"]) - 1
    assert "upgrade sfm-distill" in caplog.text
    with pytest.raises(InputError, match="upgrade sfm-distill"):
        store.open_entry(summary)

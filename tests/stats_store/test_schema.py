"""What this version reads, what it refuses, and how arrays are laid out."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from forged_entries import rewrite_commit
from toy_entries import make_backbone_card, publish_with_placeholder_cards, write_random_arrays

from sfm.errors import DamageError, InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.digests import BLOCK_ROWS, compute_array_digest
from sfm.stats_store.publication import Draft
from sfm.stats_store.schema import (
    DIMENSIONS,
    MAX_CHUNK_BYTES,
    UpgradeNeededError,
    choose_chunk_shape,
    is_array_in_schema,
    make_dimension_names,
)
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries
from sfm.stats_store.verified_objects import make_object_record


@pytest.fixture(scope="module")
def original_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two datasets."""
    store = open_or_create_store(str(tmp_path_factory.mktemp("original")))
    for seed, name in ((1, "old"), (2, "new")):
        draft = Draft(store)
        write_random_arrays(draft, seed)
        publish_with_placeholder_cards(draft, dataset=name, fingerprint=f"{seed:064x}")
    return Path(store.url)


@pytest.fixture
def store(original_store: Path, tmp_path: Path) -> Store:
    """A copy of that store, to be changed."""
    return open_store(str(shutil.copytree(original_store, tmp_path / "store")))


def find_summary(store: Store, name: str) -> Summary:
    return next(s for s in store.list_summaries() if s.dataset == name)


def rewrite_root(store: Store, **schema: object) -> None:
    path = Path(store.url) / "zarr.json"
    root = json.loads(path.read_bytes())
    root["attributes"]["schema"].update(schema)
    path.write_text(json.dumps(root))


@pytest.mark.parametrize("major", [0, 2, 10])
def test_store_of_another_major_version_is_refused_with_an_upgrade_hint(store: Store, major: int) -> None:
    rewrite_root(store, major=major)
    with pytest.raises(
        UpgradeNeededError, match=rf"has schema {major}\.0; this version .* 1\.x: upgrade sfm-distill"
    ):
        open_store(store.url)


def test_store_with_unknown_requirements_is_refused_with_an_upgrade_hint(store: Store) -> None:
    rewrite_root(store, requires=["encryption", "shards"])
    with pytest.raises(
        UpgradeNeededError, match=r"requires encryption, shards, unknown .* upgrade sfm-distill"
    ):
        open_store(store.url)


def test_store_of_another_major_version_cannot_be_opened_for_writing(store: Store) -> None:
    rewrite_root(store, major=2)
    with pytest.raises(UpgradeNeededError, match="upgrade sfm-distill"):
        open_or_create_store(store.url)


@pytest.mark.parametrize("schema", [{"major": 2}, {"requires": ["deltas"]}])
def test_entry_of_a_newer_schema_is_refused_by_name_and_hides_no_other(
    store: Store, schema: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    new = find_summary(store, "new")
    rewrite_commit(store, new, lambda content: content["schema"].update(schema))
    entries, reasons = store.list_summaries_and_problems()
    assert [s.dataset for s in entries] == ["old"]
    assert len(reasons) == 1
    assert re.match(r"the entry of new \(index/.*\) (has schema 2\.0|requires deltas).*upgrade", reasons[0])
    assert store.list_summaries() == entries
    assert reasons[0] in caplog.text
    with pytest.raises(UpgradeNeededError, match=r"the entry of new .* upgrade sfm-distill"):
        store.open_entry(new)
    assert [(v.summary is None, len(v.problems)) for v in verify_entries(store) if not v.is_sound] == [
        (True, 1)
    ]


def test_only_non_centre_crop_entries_are_hidden_from_versions_without_crop_mode(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_backbone_card()
    squash = card.preprocessing.model_copy(update={"crop_mode": "squash"})
    draft = Draft(store)
    write_random_arrays(draft, 3)
    publish_with_placeholder_cards(
        draft, dataset="squashed", backbone=card.model_copy(update={"preprocessing": squash})
    )
    summary = find_summary(store, "squashed")
    assert store.open_entry(summary).backbone.preprocessing == squash
    assert all(v.is_sound for v in verify_entries(store))
    monkeypatch.setattr("sfm.stats_store.schema.KNOWN_REQUIREMENTS", frozenset())
    entries, reasons = store.list_summaries_and_problems()
    assert {s.dataset for s in entries} == {"old", "new"}
    assert re.match(r"the entry of squashed .* requires crop_mode, unknown .*upgrade", reasons[0])


def test_commit_of_unknown_kind_is_damage_unless_its_schema_is_newer(store: Store) -> None:
    new = find_summary(store, "new")
    rewrite_commit(store, new, lambda content: content.update(kind="alias"))
    with pytest.raises(DamageError, match="kind: Input should be 'entry' or 'tombstone'"):
        store.open_entry(new)
    rewrite_commit(store, new, lambda content: content["schema"].update(minor=7))
    with pytest.raises(UpgradeNeededError, match=r"it is of schema 1\.7: upgrade sfm-distill"):
        store.open_entry(new)


def test_newer_minor_version_is_readable_except_for_unknown_arrays(store: Store) -> None:
    new = find_summary(store, "new")
    before = {
        name: compute_array_digest(store.open_entry(new).read_array(name))
        for name in store.open_entry(new).list_array_names()
    }
    run = Path(store.url) / "runs" / store.open_entry(new).commit.run
    group = json.loads((run / "zarr.json").read_bytes())
    group["attributes"]["quality"] = {"rating": 5}
    group["attributes"]["dataset"]["steward"] = "someone"
    (run / "zarr.json").write_text(json.dumps(group))
    values = np.arange(12.0).reshape(4, 3)
    zarr.create_array(run, name="train/skewness", data=values, chunks=(4, 3))
    added = {
        path: make_object_record((run / path).read_bytes()).model_dump()
        for path in ("zarr.json", "train/skewness/zarr.json", "train/skewness/c/0/0")
    }

    def later(content: dict[str, Any]) -> None:
        content["schema"]["minor"] = 7
        content["signature"] = "of a later version"
        content["summary"]["stars"] = 5
        content["objects"].update(added)
        content["arrays"]["train/skewness"] = compute_array_digest(values)

    rewrite_commit(store, new, later)
    new = find_summary(store, "new")
    rewrite_root(store, minor=7)
    entry = open_store(store.url).open_entry(find_summary(store, "new"))
    assert {
        name: compute_array_digest(entry.read_array(name))
        for name in entry.list_array_names()
        if is_array_in_schema(name)
    } == before
    assert not is_array_in_schema("train/skewness")
    with pytest.raises(InputError, match=r"train/skewness is of a kind .* upgrade sfm-distill"):
        entry.read_array("train/skewness")


def test_invalid_root_metadata_is_refused_suggesting_the_extract_command(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}", b'{"attributes": {"schema": {"major": "x"}}}', b'{"attributes": {}}'):
        (tmp_path / "zarr.json").write_bytes(content)
        with pytest.raises(InputError, match=r"is not a store: .* create one with `sfm extract`"):
            open_store(str(tmp_path))


def test_creating_a_store_in_a_non_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sea")
    with pytest.raises(InputError, match="is not a store"):
        open_or_create_store(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("name", DIMENSIONS)
def test_arrays_are_chunked_only_along_the_first_named_dimension(name: str) -> None:
    axes = make_dimension_names(name)
    shape = (100_000, *(7 for _ in axes[1:]))
    chunks = choose_chunk_shape(name, shape, np.dtype(np.float64))
    assert len(chunks) == len(axes)
    assert chunks[1:] == shape[1:]
    if axes[0] == "sample":
        assert chunks[0] == BLOCK_ROWS
    else:
        assert chunks[0] == 1 or 8 * np.prod(chunks) <= MAX_CHUNK_BYTES


def test_arrays_are_stored_with_dimension_names_blosc_and_crc32c(store: Store) -> None:
    run = Path(store.url) / "runs" / store.open_entry(find_summary(store, "old")).commit.run
    for file in run.glob("*/*/zarr.json"):
        metadata = json.loads(file.read_bytes())
        name = file.parent.relative_to(run).as_posix()
        assert tuple(metadata["dimension_names"]) == make_dimension_names(name)
        assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "blosc", "crc32c"]
        assert metadata["codecs"][0]["configuration"]["endian"] == "little"
        expected = "NaN" if metadata["data_type"].startswith("float") else -1
        assert metadata["fill_value"] == expected

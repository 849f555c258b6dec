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
from toy_entries import make_backbone_card, publish_random_draft, write_random_arrays

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
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two datasets."""
    store = open_or_create_store(str(tmp_path_factory.mktemp("original")))
    for seed, name in ((1, "old"), (2, "new")):
        draft = Draft(store)
        write_random_arrays(draft, seed)
        publish_random_draft(draft, dataset=name, fingerprint=f"{seed:064x}")
    return Path(store.url)


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Store:
    """A copy of that store, to be changed."""
    return open_store(str(shutil.copytree(original, tmp_path / "store")))


def summary_of(store: Store, name: str) -> Summary:
    return next(s for s in store.list_summaries() if s.dataset == name)


def rewrite_root(store: Store, **schema: object) -> None:
    path = Path(store.url) / "zarr.json"
    root = json.loads(path.read_bytes())
    root["attributes"]["schema"].update(schema)
    path.write_text(json.dumps(root))


@pytest.mark.parametrize("major", [0, 2, 10])
def test_a_store_of_another_major_version_is_refused_with_what_to_do(store: Store, major: int) -> None:
    rewrite_root(store, major=major)
    with pytest.raises(
        UpgradeNeededError, match=rf"has schema {major}\.0; this version .* 1\.x: upgrade sfm-distill"
    ):
        open_store(store.url)


def test_a_store_that_requires_something_unknown_is_refused_with_what_to_do(store: Store) -> None:
    rewrite_root(store, requires=["encryption", "shards"])
    with pytest.raises(
        UpgradeNeededError, match=r"requires encryption, shards, unknown .* upgrade sfm-distill"
    ):
        open_store(store.url)


def test_a_writer_refuses_such_a_store_too(store: Store) -> None:
    rewrite_root(store, major=2)
    with pytest.raises(UpgradeNeededError, match="upgrade sfm-distill"):
        open_or_create_store(store.url)


@pytest.mark.parametrize("schema", [{"major": 2}, {"requires": ["deltas"]}])
def test_one_entry_of_a_later_schema_is_refused_by_name_and_hides_no_other(
    store: Store, schema: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    new = summary_of(store, "new")
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


def test_only_an_entry_of_another_crop_than_the_centre_is_hidden_from_versions_that_know_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_backbone_card()
    squash = card.preprocessing.model_copy(update={"crop_mode": "squash"})
    draft = Draft(store)
    write_random_arrays(draft, 3)
    publish_random_draft(
        draft, dataset="squashed", backbone=card.model_copy(update={"preprocessing": squash})
    )
    summary = summary_of(store, "squashed")
    assert store.open_entry(summary).backbone.preprocessing == squash
    assert all(v.is_sound for v in verify_entries(store))
    monkeypatch.setattr("sfm.stats_store.schema.KNOWN_REQUIREMENTS", frozenset())
    entries, reasons = store.list_summaries_and_problems()
    assert {s.dataset for s in entries} == {"old", "new"}
    assert re.match(r"the entry of squashed .* requires crop_mode, unknown .*upgrade", reasons[0])


def test_a_commit_of_an_unknown_kind_is_of_a_later_version_only_if_it_says_so(store: Store) -> None:
    new = summary_of(store, "new")
    rewrite_commit(store, new, lambda content: content.update(kind="alias"))
    with pytest.raises(DamageError, match="kind: Input should be 'entry' or 'tombstone'"):
        store.open_entry(new)
    rewrite_commit(store, new, lambda content: content["schema"].update(minor=7))
    with pytest.raises(UpgradeNeededError, match=r"it is of schema 1\.7: upgrade sfm-distill"):
        store.open_entry(new)


def test_a_newer_minor_version_is_read_but_for_arrays_that_it_does_not_know(store: Store) -> None:
    new = summary_of(store, "new")
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
    new = summary_of(store, "new")
    rewrite_root(store, minor=7)
    entry = open_store(store.url).open_entry(summary_of(store, "new"))
    assert {
        name: compute_array_digest(entry.read_array(name))
        for name in entry.list_array_names()
        if is_array_in_schema(name)
    } == before
    assert not is_array_in_schema("train/skewness")
    with pytest.raises(InputError, match=r"train/skewness is of a kind .* upgrade sfm-distill"):
        entry.read_array("train/skewness")


def test_what_is_no_store_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}", b'{"attributes": {"schema": {"major": "x"}}}', b'{"attributes": {}}'):
        (tmp_path / "zarr.json").write_bytes(content)
        with pytest.raises(InputError, match=r"is not a store: .* create one with `sfm extract`"):
            open_store(str(tmp_path))


def test_a_folder_with_other_things_in_it_does_not_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sea")
    with pytest.raises(InputError, match="is not a store"):
        open_or_create_store(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("name", DIMENSIONS)
def test_every_array_names_its_dimensions_and_is_chunked_along_the_first_alone(name: str) -> None:
    axes = make_dimension_names(name)
    shape = (100_000, *(7 for _ in axes[1:]))
    chunks = choose_chunk_shape(name, shape, np.dtype(np.float64))
    assert len(chunks) == len(axes)
    assert chunks[1:] == shape[1:]
    if axes[0] == "sample":
        assert chunks[0] == BLOCK_ROWS
    else:
        assert chunks[0] == 1 or 8 * np.prod(chunks) <= MAX_CHUNK_BYTES


def test_every_array_is_stored_so_that_a_plain_reader_can_check_it(store: Store) -> None:
    run = Path(store.url) / "runs" / store.open_entry(summary_of(store, "old")).commit.run
    for file in run.glob("*/*/zarr.json"):
        metadata = json.loads(file.read_bytes())
        name = file.parent.relative_to(run).as_posix()
        assert tuple(metadata["dimension_names"]) == make_dimension_names(name)
        assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "blosc", "crc32c"]
        assert metadata["codecs"][0]["configuration"]["endian"] == "little"
        expected = "NaN" if metadata["data_type"].startswith("float") else -1
        assert metadata["fill_value"] == expected

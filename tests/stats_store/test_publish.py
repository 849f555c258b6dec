"""Writing a run and making it visible: all or nothing."""

from pathlib import Path

import numpy as np
import pytest
from obstore.store import MemoryStore
from toy_entries import backbone_card, commit, fill

from sfm.errors import InputError
from sfm.stats_store.digests import BLOCK_ROWS, compute_array_digest
from sfm.stats_store.objects import create_object, list_objects
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, create_store, open_store
from sfm.stats_store.verification import verify_entries


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(str(tmp_path / "store"))


def test_what_is_read_is_what_was_written(store: Store) -> None:
    draft = Draft(store)
    written = fill(draft)
    entry = store.open_entry(commit(draft).summary)
    assert entry.list_arrays() == sorted(written)
    for name, array in written.items():
        read = entry.read_array(name)
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)
        assert np.array_equal(entry.read_array(name, slice(1, 3)), array[1:3])
        assert entry.commit.arrays[name] == compute_array_digest(array)


def test_nothing_is_visible_before_the_commit(store: Store) -> None:
    draft = Draft(store)
    fill(draft)
    assert store.list_summaries() == []
    assert verify_entries(store) == []
    commit(draft)
    assert len(store.list_summaries()) == 1


def test_a_discarded_draft_leaves_nothing(store: Store) -> None:
    before = {item["path"] for item in list_objects(store.objects)}
    draft = Draft(store)
    fill(draft)
    draft.discard()
    assert {item["path"] for item in list_objects(store.objects)} == before
    assert not (Path(store.url) / "runs" / draft.run).exists()


def test_the_same_key_again_is_a_no_op_that_says_so(store: Store) -> None:
    first, second = Draft(store), Draft(store)
    fill(first, 1)
    fill(second, 2)
    summary = commit(first).summary
    again = commit(second)
    assert (again.outcome, again.summary) == ("already there", summary)
    assert [p.name for p in (Path(store.url) / "runs").iterdir() if p.is_dir()] == [first.run]


def test_another_backbone_dataset_or_option_is_another_entry(store: Store) -> None:
    variants: list[dict[str, object]] = [
        {},
        {"backbone": backbone_card(weights="v")},
        {"fingerprint": "e" * 64},
        {"options": {"seed": 1}},
    ]
    for variant in variants:
        draft = Draft(store)
        fill(draft)
        assert commit(draft, **variant).outcome == "published"  # type: ignore[arg-type]
    summaries = store.list_summaries()
    assert len({s.key for s in summaries}) == len({s.entry_digest for s in summaries}) == 4


def test_replacing_commits_the_next_generation_and_keeps_the_run_it_replaced(store: Store) -> None:
    runs = []
    for seed in (1, 2, 3):
        draft = Draft(store)
        fill(draft, seed)
        runs.append(draft.run)
        assert commit(draft, replace=True).summary.generation == seed
    (summary,) = store.list_summaries()
    assert summary.generation == 3
    assert store.open_entry(summary).commit.run == runs[-1]
    assert {p.name for p in (Path(store.url) / "runs").iterdir() if p.is_dir()} == set(runs)


def test_the_same_content_has_the_same_entry_digest_in_every_store(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        draft = Draft(create_store(str(tmp_path / name)))
        fill(draft)
        digests.add(commit(draft).summary.entry_digest)
    assert len(digests) == 1


def test_an_array_written_block_by_block_is_the_same_as_one_written_whole(store: Store) -> None:
    array = np.random.default_rng(0).standard_normal((2 * BLOCK_ROWS + 5, 3)).astype(np.float32)
    whole, blocks = Draft(store), Draft(store)
    whole.write_array("test/feature", array)
    parts = (array[i : i + BLOCK_ROWS] for i in range(0, len(array), BLOCK_ROWS))
    blocks.write_array_blocks("test/feature", parts, array.shape, np.float32)
    assert whole.array_digests == blocks.array_digests
    assert {r.sha256 for r in whole.records.values()} == {r.sha256 for r in blocks.records.values()}


def test_blocks_that_do_not_make_up_the_announced_array_are_refused(store: Store) -> None:
    short = np.zeros((7, 2), np.float32)
    with pytest.raises(ValueError, match="7 rows given, 8 announced"):
        Draft(store).write_array_blocks("test/feature", [short], (8, 2), np.float32)
    with pytest.raises(ValueError, match=f"only the last block may be shorter than {BLOCK_ROWS} rows"):
        Draft(store).write_array_blocks("test/feature", [short, short], (14, 2), np.float32)


def test_a_store_can_live_in_memory(tmp_path: Path) -> None:
    objects = MemoryStore()
    draft = Draft(create_store(objects))
    written = fill(draft)
    summary = commit(draft).summary
    store = open_store(objects)
    assert np.array_equal(store.open_entry(summary).read_array("train/mean"), written["train/mean"])
    assert [v.problems for v in verify_entries(store)] == [[]]
    with pytest.raises(InputError, match="is not a store"):
        open_store(MemoryStore())


def test_an_object_that_is_being_written_is_listed_nowhere(store: Store) -> None:
    folder = Path(store.url) / "index"
    folder.mkdir(exist_ok=True)
    (folder / "00000001.json#123456789012345678").write_bytes(b"half")
    assert all("#" not in item["path"] for item in list_objects(store.objects))
    create_object(store.objects, "index/00000001.json", b"whole")
    assert (folder / "00000001.json").read_bytes() == b"whole"


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as error:
            create_store(str(place))
        assert str(place) in str(error.value)
        assert "\n" not in str(error.value)

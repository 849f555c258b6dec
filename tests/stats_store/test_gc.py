"""Garbage collection: what no reader can see goes, what a reader or a writer needs stays."""

import datetime
import fcntl
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
import pytest
from forged_entries import rewrite_commit
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import booleans, integers, sampled_from
from obstore.store import MemoryStore
from toy_entries import (
    CLASSES,
    age_files,
    make_backbone_card,
    publish_random_entry,
    publish_with_placeholder_cards,
    write_random_arrays,
)

from sfm.errors import DamageError, InputError
from sfm.pipeline.staging import open_staging_and_delete_on_success
from sfm.stats_store.commits import encode_commit_with_digest, make_commit_path
from sfm.stats_store.entry_history import read_commit_statuses, remove_entry
from sfm.stats_store.garbage_collection import collect_garbage, parse_duration
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store
from sfm.stats_store.verification import verify_entries

NOTHING = datetime.timedelta(0)


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path) -> Store:
    """An empty store, on a disk and on S3."""
    return open_or_create_store(
        str(tmp_path / "s") if request.param == "disk" else request.getfixturevalue("s3_url")
    )


def list_run_ids(store: Store) -> set[str]:
    """Ids of the runs that have any object."""
    paths = [item["path"] for batch in obstore.list(store.objects, prefix="runs") for item in batch]
    return {path.split("/")[1] for path in paths} - {"zarr.json"}


def abandon_staging(folder: Path, key: str) -> None:
    """Begin an extraction that does not end."""
    with open_staging_and_delete_on_success(folder, key) as staging:
        (staging.root / "rows.npy").write_bytes(bytes(100))
        raise RuntimeError("killed")


def test_gc_deletes_a_replaced_run_after_the_minimum_age(store):
    first = publish_random_entry(store, 0)
    second = publish_random_entry(store, 1, replace=True)
    assert collect_garbage(store).deleted == []
    assert store.open_entry(first).read_array("train/count").sum() > 0
    (garbage,) = collect_garbage(store, min_age=NOTHING).deleted
    assert garbage.reason == "replaced"
    assert len(list_run_ids(store)) == 1
    assert store.list_summaries() == [second]
    assert [(g.generation, g.state) for g in read_commit_statuses(store)] == [(2, "current")]
    with pytest.raises(DamageError, match="missing commit"):
        store.open_entry(first)


def test_gc_deletes_every_generation_of_a_removed_entry_and_keeps_the_tombstone(store):
    publish_random_entry(store, 0)
    remove_entry(store, publish_random_entry(store, 1, replace=True))
    kept = publish_random_entry(store, 2, backbone=make_backbone_card("lite1"))
    done = collect_garbage(store, delete_replaced_now=True)
    assert {g.reason for g in done.deleted} == {"removed"}
    assert len(done.deleted) == 2
    assert store.list_summaries() == [kept]
    assert list_run_ids(store) == {store.read_commit(f"index/{kept.key}/00000001.json").run}
    assert [(g.generation, g.state) for g in read_commit_statuses(store)].count((3, "tombstone")) == 1
    assert collect_garbage(store, delete_replaced_now=True).deleted == []
    left = [item["path"] for batch in obstore.list(store.objects, prefix="index") for item in batch]
    assert sorted(path.rpartition("/")[2] for path in left) == [
        *("00000001.json", "00000001.published"),
        *("00000003.json", "00000003.published"),
    ]


def test_gc_keeps_an_unpublished_run_that_a_forged_commit_references(
    store: Store,
) -> None:
    draft = Draft(store)
    arrays = write_random_arrays(draft)
    old = publish_random_entry(store, 1, dataset="x", fingerprint="e" * 64)
    publish_random_entry(store, 2, dataset="x", fingerprint="e" * 64, replace=True)
    content = json.loads(bytes(obstore.get(store.objects, make_commit_path(old)).bytes()))["commit"]
    content["run"] = draft.run_id
    obstore.put(store.objects, make_commit_path(old), encode_commit_with_digest(content))
    done = collect_garbage(store, delete_replaced_now=True)
    assert done.deleted == []
    assert (f"runs/{draft.run_id}", "never committed") in [(g.path, g.reason) for g in done.retained]
    summary = publish_with_placeholder_cards(draft).summary
    np.testing.assert_array_equal(store.open_entry(summary).read_array("train/mean"), arrays["train/mean"])


def test_gc_measures_the_age_of_a_run_by_its_newest_object(tmp_path):
    store = open_or_create_store(str(tmp_path))
    draft = Draft(store)
    draft.write_array("train/count", np.arange(4))
    age_files(tmp_path)
    draft.write_array("classifier/bias", np.zeros(4, dtype=np.float32))
    assert collect_garbage(store).deleted == []
    age_files(tmp_path)
    assert [g.reason for g in collect_garbage(store).deleted] == ["never committed"]


def test_gc_keeps_a_recently_replaced_entry_with_old_files(tmp_path):
    store = open_or_create_store(str(tmp_path))
    publish_random_entry(store, 0)
    age_files(tmp_path)
    publish_random_entry(store, 1, replace=True)
    assert collect_garbage(store).deleted == []


def test_gc_dry_run_reports_garbage_and_deletes_nothing(store):
    publish_random_entry(store, 0)
    publish_random_entry(store, 1, replace=True)
    Draft(store).write_array("train/count", np.arange(3))
    before = [item for batch in obstore.list(store.objects) for item in batch]
    would = collect_garbage(store, min_age=NOTHING, dry_run=True)
    assert [item for batch in obstore.list(store.objects) for item in batch] == before
    done = collect_garbage(store, min_age=NOTHING)
    assert {g.path for g in would.deleted} == {g.path for g in done.deleted}
    assert len(done.deleted) == 2
    assert sum(g.size_bytes for g in done.deleted) == sum(
        item["size"] for item in before if item["path"].startswith(tuple(g.path for g in done.deleted))
    )


def test_gc_keeps_every_run_of_a_key_with_an_unreadable_newest_commit(tmp_path):
    store = open_or_create_store(str(tmp_path))
    first = publish_random_entry(store, 0)
    publish_random_entry(store, 1, replace=True)
    others = [
        publish_random_entry(store, n, backbone=make_backbone_card("lite1"), replace=True) for n in (2, 3)
    ]
    Draft(store).write_array("train/count", np.arange(3))
    before = list_run_ids(store)
    gone = store.read_commit(f"index/{others[0].key}/00000001.json").run
    obstore.put(store.objects, f"index/{first.key}/00000002.json", b"{}")
    done = collect_garbage(store, min_age=NOTHING, delete_replaced_now=True)
    assert [g.path for g in done.deleted] == [f"runs/{gone}"]
    assert list_run_ids(store) == before - {gone}
    assert done.notes == [f"damaged commit index/{first.key}/00000002.json: not readable as a commit"]


def test_gc_keeps_the_run_of_a_damaged_commit_despite_a_forged_reference(
    tmp_path,
):
    store = open_or_create_store(str(tmp_path))
    victim = publish_random_entry(store, 0)
    run = store.read_commit(f"index/{victim.key}/00000001.json").run
    stranger = publish_random_entry(store, 1, dataset="x", fingerprint="e" * 64)
    rewrite_commit(store, stranger, lambda content: content.update(run=run))
    publish_random_entry(store, 2, dataset="x", fingerprint="e" * 64, replace=True)
    assert (
        collect_garbage(store, min_age=NOTHING, delete_replaced_now=True, dry_run=True).deleted[0].reason
        == "never committed"
    )
    path = tmp_path / "index" / victim.key / "00000001.json"
    whole = path.read_bytes()
    path.write_bytes(b"{}")
    assert collect_garbage(store, min_age=NOTHING, delete_replaced_now=True).deleted == []
    path.write_bytes(whole)
    assert [v.problems for v in verify_entries(store, [victim])] == [[]]


def test_gc_deletes_a_replaced_run_with_an_unreadable_older_commit(tmp_path):
    store = open_or_create_store(str(tmp_path))
    first = publish_random_entry(store, 0)
    second = publish_random_entry(store, 1, replace=True)
    obstore.put(store.objects, f"index/{first.key}/00000001.json", b"{}")
    assert [g.state for g in read_commit_statuses(store)] == ["unreadable", "current"]
    collect_garbage(store, min_age=NOTHING)
    assert len(list_run_ids(store)) == 1
    assert [v.summary for v in verify_entries(store, [second]) if v.is_sound] == [second]


def test_gc_completes_an_interrupted_collection(tmp_path):
    store = open_or_create_store(str(tmp_path))
    first = publish_random_entry(store, 0)
    run = store.read_commit(f"index/{first.key}/00000001.json").run
    remove_entry(store, first)
    shutil.rmtree(tmp_path / "runs" / run / "train")
    (garbage,) = collect_garbage(store, delete_replaced_now=True).deleted
    assert garbage.path == f"runs/{run}"
    assert not (tmp_path / "runs" / run).exists()
    assert [g.state for g in read_commit_statuses(store)] == ["tombstone"]


def test_gc_deletes_partial_runs_and_temporary_files_of_killed_writers(tmp_path):
    store = open_or_create_store(str(tmp_path))
    kept = publish_random_entry(store, 0)
    half, empty = tmp_path / "runs" / f"{1:032x}", tmp_path / "runs" / f"{2:032x}"
    (half / "train").mkdir(parents=True)
    (half / "train" / "zarr.json#1").write_bytes(b"{")
    empty.mkdir()
    (tmp_path / "index" / kept.key / "00000002.json#1").write_bytes(b"{")
    age_files(tmp_path)
    done = collect_garbage(store)
    assert sorted(g.reason for g in done.deleted) == [
        "never committed",
        "never committed",
        "unfinished write",
    ]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted(
        [*list_run_ids(store), "zarr.json"]
    )
    assert not list((tmp_path / "index").rglob("*#*"))
    assert [v.is_sound for v in verify_entries(store)] == [True]


def test_gc_deletes_abandoned_staging_and_keeps_locked_staging(tmp_path):
    store = open_or_create_store(str(tmp_path))
    with pytest.raises(RuntimeError, match="killed"):
        abandon_staging(tmp_path / "staging", "old")
    with open_staging_and_delete_on_success(tmp_path / "staging", "busy") as staging:
        (staging.root / "rows.npy").write_bytes(bytes(100))
        assert collect_garbage(store).deleted == []
        age_files(tmp_path / "staging")
        would = collect_garbage(store, dry_run=True)
        assert [g.path for g in would.deleted] == ["staging/old"]
        assert (tmp_path / "staging" / "old").exists()
        done = collect_garbage(store, min_age=NOTHING)
        assert [(g.path, g.size_bytes) for g in done.deleted] == [("staging/old", 100)]
        assert [g.path for g in done.retained] == ["staging/busy"]
        assert sorted(p.name for p in (tmp_path / "staging").iterdir()) == ["busy", "busy.lock"]
        with (tmp_path / "staging" / "busy.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_concurrent_gc_deletes_all_garbage_without_errors(tmp_path):
    store = open_or_create_store(str(tmp_path))
    publish_random_entry(store, 0)
    kept = publish_random_entry(store, 1, replace=True)
    for number in range(5):
        Draft(store).write_array("train/count", np.arange(3))
        (tmp_path / "staging" / str(number)).mkdir(parents=True)
        (tmp_path / "staging" / f"{number}.lock").touch()
    age_files(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(lambda _: collect_garbage(store, min_age=NOTHING, delete_replaced_now=True), range(4))
        )
    assert [each.notes for each in done] == [[]] * 4
    assert len(list_run_ids(store)) == 1
    assert list((tmp_path / "staging").iterdir()) == []
    assert [v.summary for v in verify_entries(store)] == [kept]


def test_continuous_gc_deletes_no_run_of_concurrent_writers(tmp_path):
    store = open_or_create_store(str(tmp_path))
    rounds = 12

    def write(spec: str) -> None:
        for seed in range(rounds):
            publish_random_entry(store, seed, backbone=make_backbone_card(spec), replace=True)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, spec) for spec in ("lite0", "lite1")]
        while not all(w.done() for w in writers):
            collect_garbage(store, delete_replaced_now=True)
        for writer in writers:
            writer.result()
    collect_garbage(store, delete_replaced_now=True)
    assert [s.generation for s in store.list_summaries()] == [rounds, rounds]
    assert [v.problems for v in verify_entries(store)] == [[], []]
    assert len(list_run_ids(store)) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600)],
)
def test_parse_duration_accepts_a_number_with_a_unit(text, seconds):
    assert parse_duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 d", "1.5h", "7days", "99999999w"])
def test_parse_duration_refuses_invalid_text(text):
    with pytest.raises(InputError, match="is not a duration"):
        parse_duration(text)


class StoreStateMachine(RuleBasedStateMachine):
    """Publishing, replacing, removing and collecting in any order: readers see what was published last."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store("memory", MemoryStore())
        self.seen: dict[str, int] = {}

    @rule(spec=sampled_from(["a", "b"]), seed=integers(0, 3), replace=booleans())
    def publish(self, spec: str, seed: int, replace: bool) -> None:
        """Publish content that `seed` stands for under the key that `spec` stands for."""
        draft = Draft(self.store)
        draft.write_array("classifier/bias", np.full(CLASSES, seed, dtype=np.float32))
        publish_with_placeholder_cards(
            draft, backbone=make_backbone_card(weights_text=spec), dataset=spec, replace=replace
        )
        if replace or spec not in self.seen:
            self.seen[spec] = seed

    @rule(spec=sampled_from(["a", "b"]))
    def remove_entry(self, spec: str) -> None:
        """Remove an entry, if there is one."""
        for summary in self.store.list_summaries():
            if summary.dataset == spec:
                remove_entry(self.store, summary)
                del self.seen[spec]

    @rule()
    def abandon(self) -> None:
        """Leave a run without a commit."""
        Draft(self.store).write_array("train/count", np.arange(3))

    @rule(older_than=sampled_from([NOTHING, datetime.timedelta(days=7)]), now=booleans())
    def collect_garbage(self, older_than: datetime.timedelta, now: bool) -> None:
        """Collect; nothing but what is seen remains if age does not count."""
        collect_garbage(self.store, min_age=older_than, delete_replaced_now=now)
        if older_than == NOTHING:
            assert len(list_run_ids(self.store)) == len(self.seen)

    @invariant()
    def readers_see_the_last_published_content(self) -> None:
        """Every visible entry reads as published."""
        found = {
            s.dataset: self.store.open_entry(s).read_array("classifier/bias")[0]
            for s in self.store.list_summaries()
        }
        assert found == self.seen


StoreStateMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=12)
TestStoreStateMachine = StoreStateMachine.TestCase

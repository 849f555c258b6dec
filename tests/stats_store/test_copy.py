"""Copying between stores: the same bytes arrive, once, or the copy says why not."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import obstore
import pytest
from forged_entries import rewrite_commit
from toy_entries import age_files, make_backbone_card, publish_random_entry

from sfm.stats_store.cards import Summary
from sfm.stats_store.commits import encode_commit_with_digest, make_commit_path
from sfm.stats_store.digests import compute_entry_digest, compute_sha256
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import read_commit_statuses, remove_entry
from sfm.stats_store.entry_selection import filter_summaries_or_raise
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.objects import list_objects
from sfm.stats_store.store import Store, open_or_create_store
from sfm.stats_store.verification import verify_entries


@pytest.fixture
def disk_store(tmp_path) -> Store:
    """A store on a disk with three entries."""
    store = open_or_create_store(str(tmp_path / "disk"))
    publish_random_entry(store, 0)
    publish_random_entry(store, 1, backbone=make_backbone_card("lite1"))
    publish_random_entry(store, 2, dataset="other", fingerprint="a" * 64)
    return store


def content(store: Store) -> dict[str, bytes]:
    """All objects of all runs and the index."""
    paths = [item["path"] for prefix in ("runs", "index") for item in list_objects(store.objects, prefix)]
    return {
        path: bytes(obstore.get(store.objects, path).bytes()) for path in paths if path != "runs/zarr.json"
    }


def list_outcomes(done) -> list[str]:
    return [c.outcome for c in done]


def test_copy_to_s3_and_back_preserves_every_byte(disk_store, s3_url, tmp_path):
    there = open_or_create_store(s3_url)
    assert list_outcomes(copy_entries(disk_store, there, disk_store.list_summaries())) == ["copied"] * 3
    assert content(there) == content(disk_store)
    back = open_or_create_store(str(tmp_path / "back"))
    assert list_outcomes(copy_entries(there, back, there.list_summaries())) == ["copied"] * 3
    assert content(back) == content(disk_store)
    assert back.list_summaries() == there.list_summaries() == disk_store.list_summaries()
    assert all(v.is_sound for v in verify_entries(back))


def test_repeated_copy_writes_nothing(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    copy_entries(disk_store, target, disk_store.list_summaries())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*")}
    assert (
        list_outcomes(copy_entries(disk_store, target, disk_store.list_summaries())) == ["already there"] * 3
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*")} == before


def test_copy_writes_only_the_selected_entries(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    copy_entries(
        disk_store,
        target,
        filter_summaries_or_raise(disk_store.list_summaries(), dataset="toy", backbone_spec="lite1"),
    )
    assert [(s.dataset, s.backbone) for s in target.list_summaries()] == [("toy", "lite1")]


def leave_partial_copy(source: Store, target: Store, run: str, chunks: int = 3) -> list[Path]:
    """Put some objects of a run into another store, as a copy that was killed does; returns them."""
    folder = Path(source.url) / "runs" / run
    paths = sorted(p.relative_to(source.url) for p in folder.rglob("c/**/*") if p.is_file())[:chunks]
    for path in paths:
        (Path(target.url) / path).parent.mkdir(parents=True)
        shutil.copy(Path(source.url) / path, Path(target.url) / path)
    return [Path(target.url) / path for path in paths]


def test_interrupted_copy_resumes_with_the_missing_objects(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    (chosen,) = filter_summaries_or_raise(disk_store.list_summaries(), dataset="other")
    commit = disk_store.read_commit(f"index/{chosen.key}/00000001.json")
    leave_partial_copy(disk_store, target, commit.run)
    (done,) = copy_entries(disk_store, target, [chosen])
    assert (done.outcome, done.existing_object_count, done.written_object_count) == (
        "copied",
        3,
        len(commit.objects) - 3,
    )
    assert target.read_commit(f"index/{chosen.key}/00000001.json") == commit
    assert [v.is_sound for v in verify_entries(target)] == [True]


@pytest.mark.parametrize("fault", ["other bytes", "an object of another entry", "too old to be safe from gc"])
def test_unusable_partial_copy_is_ignored_and_another_run_is_written(disk_store, tmp_path, fault):
    target = open_or_create_store(str(tmp_path / "t"))
    (chosen,) = filter_summaries_or_raise(disk_store.list_summaries(), dataset="other")
    commit = disk_store.read_commit(f"index/{chosen.key}/00000001.json")
    left = leave_partial_copy(disk_store, target, commit.run)
    if fault == "other bytes":
        left[1].write_bytes(left[1].read_bytes()[:-1] + b"?")
    elif fault == "an object of another entry":
        left[1].with_name("99").write_bytes(b"x")
    else:
        age_files(tmp_path / "t", days=5)
    before = {path: path.read_bytes() for path in (tmp_path / "t" / "runs").rglob("*") if path.is_file()}
    (done,) = copy_entries(disk_store, target, [chosen])
    assert (done.outcome, done.existing_object_count) == ("copied", 0)
    assert {path: path.read_bytes() for path in before} == before
    now = target.read_commit(f"index/{chosen.key}/00000001.json")
    assert now.run != commit.run
    assert now.model_copy(update={"run": commit.run}) == commit
    assert [v.is_sound for v in verify_entries(target)] == [True]
    collect_garbage(target, min_age=timedelta(0))
    assert [v.is_sound for v in verify_entries(target)] == [True]


def test_copy_of_a_reused_run_id_does_not_change_the_existing_entry(disk_store, tmp_path):
    untrusted = open_or_create_store(str(tmp_path / "untrusted"))
    evil = publish_random_entry(untrusted, 5, dataset="free-stats", fingerprint="b" * 64)
    victim = disk_store.read_commit(f"index/{disk_store.list_summaries()[0].key}/00000001.json").run
    before = content(disk_store)
    set_run_id(untrusted, evil, victim)
    assert [v.is_sound for v in verify_entries(untrusted)] == [True]
    (done,) = copy_entries(untrusted, disk_store, untrusted.list_summaries())
    assert (done.outcome, done.existing_object_count) == ("copied", 0)
    assert {path: data for path, data in content(disk_store).items() if path in before} == before
    assert not [
        path for path in content(disk_store) if path.startswith(f"runs/{victim}/") and path not in before
    ]
    assert [v.is_sound for v in verify_entries(disk_store)] == [True] * 4


def test_copy_does_not_write_to_a_committed_run_whose_objects_were_lost(disk_store, tmp_path):
    untrusted = open_or_create_store(str(tmp_path / "untrusted"))
    evil = publish_random_entry(untrusted, 5, dataset="free-stats", fingerprint="b" * 64)
    victim = disk_store.read_commit(f"index/{disk_store.list_summaries()[0].key}/00000001.json").run
    shutil.rmtree(tmp_path / "disk" / "runs" / victim)
    set_run_id(untrusted, evil, victim)
    assert list_outcomes(copy_entries(untrusted, disk_store, untrusted.list_summaries())) == ["copied"]
    assert not (tmp_path / "disk" / "runs" / victim).exists()


def test_concurrent_copies_of_entries_with_the_same_run_id_do_not_mix(tmp_path):
    untrusted = open_or_create_store(str(tmp_path / "untrusted"))
    first = publish_random_entry(untrusted, 5, dataset="a", fingerprint="a" * 64)
    second = publish_random_entry(
        open_or_create_store(str(tmp_path / "other")), 6, dataset="b", fingerprint="b" * 64
    )
    other = open_or_create_store(str(tmp_path / "other"))
    run = untrusted.read_commit(f"index/{first.key}/00000001.json").run
    set_run_id(other, second, run)
    target = open_or_create_store(str(tmp_path / "t"))
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda s: copy_entries(s, target, s.list_summaries()), (untrusted, other)))
    assert [list_outcomes(each) for each in done] == [["copied"]] * 2
    assert [v.problems for v in verify_entries(target)] == [[], []]
    assert len({target.read_commit(f"index/{s.key}/00000001.json").run for s in (first, second)}) == 2


@pytest.mark.parametrize("fault", ["values", "cards"])
def test_copy_does_not_publish_an_entry_that_fails_verification(disk_store, tmp_path, fault):
    (chosen,) = filter_summaries_or_raise(disk_store.list_summaries(), dataset="other")
    run = Path(disk_store.url) / "runs" / disk_store.read_commit(make_commit_path(chosen)).run

    def change(content) -> None:
        if fault == "values":
            content["arrays"]["train/mean"] = "0" * 64
        else:
            cards = (run / "zarr.json").read_bytes().replace(b'"seed": 0', b'"seed": 1')
            (run / "zarr.json").write_bytes(cards)
            content["objects"]["zarr.json"]["sha256"] = compute_sha256(cards)

    rewrite_commit(disk_store, chosen, change)
    (chosen,) = filter_summaries_or_raise(disk_store.list_summaries(), dataset="other")
    (verdict,) = verify_entries(disk_store, [chosen])
    assert not verdict.is_sound
    target = open_or_create_store(str(tmp_path / "t"))
    (done,) = copy_entries(disk_store, target, [chosen])
    assert done.outcome == "damaged"
    assert done.detail.startswith(verdict.problems[0])
    assert target.list_summaries() == []
    assert (fault == "values") == any(path.startswith("runs/") for path in content(target))


def set_run_id(store: Store, summary: Summary, run: str) -> None:
    """Give an entry another run id, as whoever wrote it could."""
    folder = Path(store.url) / "runs"
    (folder / store.read_commit(make_commit_path(summary)).run).rename(folder / run)
    rewrite_commit(store, summary, lambda content: content.update(run=run))


def test_copy_reports_a_damaged_object_and_copies_the_other_entries(disk_store, tmp_path):
    chosen = disk_store.list_summaries()
    run = disk_store.read_commit(f"index/{chosen[1].key}/00000001.json").run
    victim = tmp_path / "disk" / "runs" / run / "train" / "mean" / "c" / "0" / "0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    target = open_or_create_store(str(tmp_path / "t"))
    done = copy_entries(disk_store, target, chosen)
    assert list_outcomes(done) == ["copied", "damaged", "copied"]
    assert f"runs/{run}/train/mean/c/0/0" in done[1].detail
    assert target.list_summaries() == [chosen[0], chosen[2]]


def test_copy_replaces_a_different_target_entry_only_with_replace(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    publish_random_entry(target, 7)
    (chosen,) = filter_summaries_or_raise(disk_store.list_summaries(), dataset="toy", backbone_spec="lite0")
    mine = target.list_summaries()
    assert list_outcomes(copy_entries(disk_store, target, [chosen])) == ["differs in the target"]
    assert target.list_summaries() == mine
    assert list_outcomes(copy_entries(disk_store, target, [chosen], replace=True)) == ["copied"]
    (now,) = target.list_summaries()
    assert now.generation == 2
    assert now.model_copy(update={"generation": 1}) == chosen
    assert [v.is_sound for v in verify_entries(target)] == [True]


def test_copy_restores_a_removed_entry_only_with_replace(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    (chosen,) = filter_summaries_or_raise(disk_store.list_summaries(), dataset="other")
    copy_entries(disk_store, target, [chosen])
    remove_entry(target, target.list_summaries()[0])
    collect_garbage(target, delete_replaced_now=True)
    assert list_outcomes(copy_entries(disk_store, target, [chosen])) == ["removed there"]
    assert target.list_summaries() == []
    assert list_outcomes(copy_entries(disk_store, target, [chosen], replace=True)) == ["copied"]
    statuses = read_commit_statuses(target)
    assert [(s.generation, s.state) for s in statuses] == [(2, "tombstone"), (3, "current")]
    assert [v.is_sound for v in verify_entries(target)] == [True]


def test_copy_from_a_replica_repairs_a_damaged_entry_without_overwriting_objects(disk_store, tmp_path):
    replica = open_or_create_store(str(tmp_path / "replica"))
    copy_entries(disk_store, replica, disk_store.list_summaries())
    victims = sorted(p for p in (tmp_path / "disk" / "runs").rglob("c/**/*") if p.is_file())
    victims[0].unlink()
    victims[1].write_bytes(b"")
    before = content(disk_store)
    (damaged,) = [v.summary for v in verify_entries(disk_store) if not v.is_sound]
    assert set(list_outcomes(copy_entries(replica, disk_store, replica.list_summaries()))) == {
        "already there"
    }
    done = copy_entries(replica, disk_store, replica.list_summaries(), replace=True)
    assert {c.summary.key: c.outcome for c in done if c.written_object_count} == {damaged.key: "repaired"}
    assert sorted(list_outcomes(done)) == ["already there", "already there", "repaired"]
    assert {path: data for path, data in content(disk_store).items() if path in before} == before
    assert [v.problems for v in verify_entries(disk_store, disk_store.list_summaries())] == [[], [], []]
    assert [s.generation for s in disk_store.list_summaries() if s.key == damaged.key] == [2]
    collect_garbage(disk_store, delete_replaced_now=True)
    assert [v.problems for v in verify_entries(disk_store)] == [[], [], []]
    assert len(list((tmp_path / "disk" / "runs").iterdir())) == 4


def test_copy_from_a_replica_supersedes_a_damaged_commit(disk_store, tmp_path):
    replica = open_or_create_store(str(tmp_path / "replica"))
    copy_entries(disk_store, replica, disk_store.list_summaries())
    (chosen,) = filter_summaries_or_raise(replica.list_summaries(), dataset="other")
    (tmp_path / "disk" / "index" / chosen.key / "00000001.json").write_bytes(b"{")
    assert len(disk_store.list_summaries()) == 2
    assert list_outcomes(copy_entries(replica, disk_store, [chosen])) == ["damaged"]
    assert list_outcomes(copy_entries(replica, disk_store, [chosen], replace=True)) == ["copied"]
    assert len(disk_store.list_summaries()) == 3


def test_copy_preserves_unknown_content_of_a_newer_minor_version(tmp_path):
    source = open_or_create_store(str(tmp_path / "later"))
    summary = publish_random_entry(source, 0)
    path = f"index/{summary.key}/00000001.json"
    run = source.read_commit(path).run
    news = {"train/skewness/zarr.json": b'{"made": "later"}', "train/skewness/c/0": bytes(range(99))}
    inner = json.loads(bytes(obstore.get(source.objects, path).bytes()))["commit"]
    inner["schema"] = {"major": 1, "minor": 7, "requires": []}
    inner["signature"] = {"by": "a later version"}
    inner["summary"]["quality"] = 0.5
    inner["arrays"]["train/skewness"] = "0" * 64
    key = (summary.backbone_hash, summary.fingerprint, summary.options)
    inner["summary"]["entry_digest"] = compute_entry_digest(inner["arrays"], *key)
    for name, data in news.items():
        obstore.put(source.objects, f"runs/{run}/{name}", data)
        inner["objects"][name] = {"size": len(data), "sha256": compute_sha256(data)}
    obstore.put(source.objects, path, encode_commit_with_digest(inner))
    plain, busy = open_or_create_store(str(tmp_path / "a")), open_or_create_store(str(tmp_path / "b"))
    publish_random_entry(busy, 9)
    (chosen,) = source.list_summaries()
    assert list_outcomes(copy_entries(source, plain, [chosen])) == ["copied"]
    assert content(plain) == content(source)
    assert list_outcomes(copy_entries(source, busy, [chosen], replace=True)) == ["copied"]
    envelope = json.loads((tmp_path / "b" / "index" / summary.key / "00000002.json").read_bytes())
    assert envelope["commit"]["summary"].pop("generation") == 2
    inner["summary"].pop("generation")
    assert envelope["commit"] == inner
    entry = busy.open_entry(busy.list_summaries()[0])
    assert (tmp_path / "b" / "runs" / run / "train" / "skewness" / "c" / "0").read_bytes() == bytes(range(99))
    np.testing.assert_array_equal(
        entry.read_array("train/count"), source.open_entry(chosen).read_array("train/count")
    )


def test_concurrent_copies_of_the_same_entries_both_succeed(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(lambda _: copy_entries(disk_store, target, disk_store.list_summaries()), range(2))
        )
    assert {o for each in done for o in list_outcomes(each)} <= {"copied", "already there"}
    assert [g.generation for g in read_commit_statuses(target)] == [1, 1, 1]
    assert [v.is_sound for v in verify_entries(target)] == [True] * 3


def test_copy_skips_a_key_without_a_free_generation_and_copies_the_others(disk_store, tmp_path):
    target = open_or_create_store(str(tmp_path / "t"))
    key = disk_store.list_summaries()[0].key
    obstore.put(target.objects, f"index/{key}/99999999.published", b"")
    done = copy_entries(disk_store, target, disk_store.list_summaries(), replace=True)
    assert list_outcomes(done) == ["differs in the target", "copied", "copied"]
    assert "delete 99999999.json and 99999999.published there" in done[0].detail
    (reason,) = target.list_summaries_and_problems()[1]
    assert "delete 99999999.published there" in reason

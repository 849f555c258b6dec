"""Copying between stores: the same bytes arrive, once, or the copy says why not."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import obstore
import pytest
from toy_entries import backbone_card, grow_old, put

from sfm.stats_store.collect import collect
from sfm.stats_store.copying import copy
from sfm.stats_store.digest import canonical, entry_digest, sha256
from sfm.stats_store.history import generations, remove
from sfm.stats_store.location import list_objects
from sfm.stats_store.select import every
from sfm.stats_store.store import Store, create_store
from sfm.stats_store.verify import verify


@pytest.fixture
def disk(tmp_path) -> Store:
    """A store on a disk with three entries."""
    store = create_store(str(tmp_path / "disk"))
    put(store, 0)
    put(store, 1, backbone=backbone_card("lite1"))
    put(store, 2, dataset="other", fingerprint="a" * 64)
    return store


def content(store: Store) -> dict[str, bytes]:
    """All objects of all runs and the index."""
    paths = [item["path"] for prefix in ("runs", "index") for item in list_objects(store.objects, prefix)]
    return {
        path: bytes(obstore.get(store.objects, path).bytes()) for path in paths if path != "runs/zarr.json"
    }


def outcomes(done) -> list[str]:
    return [c.outcome for c in done]


def test_entries_copied_to_s3_and_back_are_the_same_bytes(disk, s3_url, tmp_path):
    there = create_store(s3_url)
    assert outcomes(copy(disk, there, disk.summaries())) == ["copied"] * 3
    assert content(there) == content(disk)
    back = create_store(str(tmp_path / "back"))
    assert outcomes(copy(there, back, there.summaries())) == ["copied"] * 3
    assert content(back) == content(disk)
    assert back.summaries() == there.summaries() == disk.summaries()
    assert all(v.sound for v in verify(back))


def test_a_second_copy_writes_nothing(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    copy(disk, target, disk.summaries())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*")}
    assert outcomes(copy(disk, target, disk.summaries())) == ["already there"] * 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*")} == before


def test_only_what_was_asked_for_is_copied(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    copy(disk, target, every(disk.summaries(), dataset="toy", backbone="lite1"))
    assert [(s.dataset, s.backbone) for s in target.summaries()] == [("toy", "lite1")]


def test_a_copy_that_was_interrupted_goes_on_with_the_objects_that_are_missing_or_wrong(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    (chosen,) = every(disk.summaries(), dataset="other")
    run = disk.commit(f"index/{chosen.key}/00000001.json").run
    files = [p for p in (tmp_path / "disk" / "runs" / run).rglob("*") if p.is_file()]
    chunks = sorted(p.relative_to(tmp_path / "disk") for p in files if p.name != "zarr.json")
    for number, chunk in enumerate(chunks[:3]):
        half = tmp_path / "t" / chunk
        half.parent.mkdir(parents=True)
        data = (tmp_path / "disk" / chunk).read_bytes()
        half.write_bytes(data[:-1] + b"?" if number == 2 else data)
    (done,) = copy(disk, target, [chosen])
    assert (done.outcome, done.found, done.written) == ("copied", 2, len(files) - 2)
    assert [v.sound for v in verify(target)] == [True]


def test_a_resumed_copy_is_safe_from_garbage_collection(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    copy(disk, target, disk.summaries())
    shutil.rmtree(tmp_path / "t" / "index")
    grow_old(tmp_path / "t")
    assert len(collect(target, dry_run=True).deleted) == 3
    (done,) = copy(disk, target, disk.summaries()[:1])
    assert (done.outcome, done.written) == ("copied", 1)
    assert len(collect(target).deleted) == 2
    assert [v.sound for v in verify(target)] == [True]


def test_a_damaged_object_is_not_copied_and_named_and_the_other_entries_are(disk, tmp_path):
    chosen = disk.summaries()
    run = disk.commit(f"index/{chosen[1].key}/00000001.json").run
    victim = tmp_path / "disk" / "runs" / run / "train" / "mean" / "c" / "0" / "0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    target = create_store(str(tmp_path / "t"))
    done = copy(disk, target, chosen)
    assert outcomes(done) == ["copied", "damaged", "copied"]
    assert f"runs/{run}/train/mean/c/0/0" in done[1].detail
    assert target.summaries() == [chosen[0], chosen[2]]


def test_what_the_target_holds_under_the_key_stays_unless_it_is_to_be_replaced(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    put(target, 7)
    (chosen,) = every(disk.summaries(), dataset="toy", backbone="lite0")
    mine = target.summaries()
    assert outcomes(copy(disk, target, [chosen])) == ["differs in the target"]
    assert target.summaries() == mine
    assert outcomes(copy(disk, target, [chosen], replace=True)) == ["copied"]
    (now,) = target.summaries()
    assert now.generation == 2
    assert now.model_copy(update={"generation": 1}) == chosen
    assert [v.sound for v in verify(target)] == [True]


def test_a_copy_does_not_undo_a_takedown_unless_told_to(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    (chosen,) = every(disk.summaries(), dataset="other")
    copy(disk, target, [chosen])
    remove(target, target.summaries()[0])
    collect(target, now=True)
    assert outcomes(copy(disk, target, [chosen])) == ["removed there"]
    assert target.summaries() == []
    assert outcomes(copy(disk, target, [chosen], replace=True)) == ["copied"]
    assert [(g.number, g.state) for g in generations(target)] == [(2, "tombstone"), (3, "current")]
    assert [v.sound for v in verify(target)] == [True]


def test_a_replica_repairs_damaged_objects_in_place(disk, tmp_path):
    replica = create_store(str(tmp_path / "replica"))
    copy(disk, replica, disk.summaries())
    before = content(disk)
    victims = sorted(p for p in (tmp_path / "disk" / "runs").rglob("c/**/*") if p.is_file())
    victims[0].unlink()
    victims[-1].write_bytes(b"")
    assert sum(not v.sound for v in verify(disk)) >= 1
    assert set(outcomes(copy(replica, disk, replica.summaries()))) == {"already there"}
    done = copy(replica, disk, replica.summaries(), replace=True)
    assert sum(c.written for c in done) == 2
    assert "repaired" in outcomes(done)
    assert content(disk) == before


def test_a_replica_stands_in_for_a_damaged_commit(disk, tmp_path):
    replica = create_store(str(tmp_path / "replica"))
    copy(disk, replica, disk.summaries())
    (chosen,) = every(replica.summaries(), dataset="other")
    (tmp_path / "disk" / "index" / chosen.key / "00000001.json").write_bytes(b"{")
    assert len(disk.summaries()) == 2
    assert outcomes(copy(replica, disk, [chosen])) == ["damaged"]
    assert outcomes(copy(replica, disk, [chosen], replace=True)) == ["copied"]
    assert len(disk.summaries()) == 3


def test_an_entry_of_a_later_minor_version_is_copied_whole(tmp_path):
    source = create_store(str(tmp_path / "later"))
    summary = put(source, 0)
    path = f"index/{summary.key}/00000001.json"
    run = source.commit(path).run
    news = {"train/skewness/zarr.json": b'{"made": "later"}', "train/skewness/c/0": bytes(range(99))}
    inner = json.loads(bytes(obstore.get(source.objects, path).bytes()))["commit"]
    inner["schema"] = {"major": 1, "minor": 7, "requires": []}
    inner["signature"] = {"by": "a later version"}
    inner["summary"]["quality"] = 0.5
    inner["arrays"]["train/skewness"] = "0" * 64
    key = (summary.backbone_hash, summary.fingerprint, summary.options)
    inner["summary"]["entry_digest"] = entry_digest(inner["arrays"], *key)
    for name, data in news.items():
        obstore.put(source.objects, f"runs/{run}/{name}", data)
        inner["objects"][name] = {"size": len(data), "sha256": sha256(data)}
    obstore.put(
        source.objects, path, json.dumps({"commit": inner, "sha256": sha256(canonical(inner))}).encode()
    )
    plain, busy = create_store(str(tmp_path / "a")), create_store(str(tmp_path / "b"))
    put(busy, 9)
    (chosen,) = source.summaries()
    assert outcomes(copy(source, plain, [chosen])) == ["copied"]
    assert content(plain) == content(source)
    assert outcomes(copy(source, busy, [chosen], replace=True)) == ["copied"]
    envelope = json.loads((tmp_path / "b" / "index" / summary.key / "00000002.json").read_bytes())
    assert envelope["commit"]["summary"].pop("generation") == 2
    inner["summary"].pop("generation")
    assert envelope["commit"] == inner
    entry = busy.open(busy.summaries()[0])
    assert (tmp_path / "b" / "runs" / run / "train" / "skewness" / "c" / "0").read_bytes() == bytes(range(99))
    np.testing.assert_array_equal(entry.read("train/count"), source.open(chosen).read("train/count"))


def test_two_copies_of_one_entry_at_once_both_arrive(disk, tmp_path):
    target = create_store(str(tmp_path / "t"))
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: copy(disk, target, disk.summaries()), range(2)))
    assert {o for each in done for o in outcomes(each)} <= {"copied", "already there"}
    assert [g.number for g in generations(target)] == [1, 1, 1]
    assert [v.sound for v in verify(target)] == [True] * 3

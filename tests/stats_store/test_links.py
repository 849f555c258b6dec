"""Links in a store, of whoever may write to it: readers follow them, gc leaves what is behind."""

import os
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import MemoryStore, ObjectStore
from toy_entries import age_files, make_backbone_card, publish_random_entry

from sfm.errors import InputError
from sfm.stats_store.digests import compute_sha256
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.folder_walk import walk_store_paths
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.location import connect_object_store
from sfm.stats_store.objects import delete_run
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

NOTHING = timedelta(0)
RUN = "a" * 32


def snapshot_files(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder: bytes of files, None of folders."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def template_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two current entries, one that was replaced, and a run never committed; all old."""
    folder = tmp_path_factory.mktemp("template")
    store = open_or_create_store(str(folder))
    publish_random_entry(store, 0)
    publish_random_entry(store, 1, replace=True)
    publish_random_entry(store, 2, backbone=make_backbone_card("lite1"))
    Draft(store, run_id=RUN).write_array("train/count", np.arange(3))
    (folder / "staging" / "old").mkdir(parents=True)
    (folder / "staging" / "old" / "rows.npy").write_bytes(b"x")
    age_files(folder)
    return folder


@pytest.fixture
def store(template_store: Path, tmp_path: Path) -> Store:
    """A store of one's own like the template."""
    return open_store(str(shutil.copytree(template_store, tmp_path / "store")))


@pytest.fixture
def outside_folder(tmp_path: Path) -> Path:
    """A folder of somebody who has no part in it, old, with names as they are in a store."""
    folder = tmp_path / "elsewhere"
    for name in ("thesis/chapter1.tex", f"{RUN}/notes.txt", "index/a#1", "00000002.json#1", "old/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    age_files(folder)
    return folder


@pytest.mark.parametrize(
    "path", ["staging", "staging/x", "staging/old.lock", "runs/x", f"runs/{RUN}", "index/x", "index/x#1"]
)
def test_gc_reports_a_link_in_a_store_and_deletes_nothing_behind_it(
    store: Store, outside_folder: Path, path: str
) -> None:
    link = Path(store.url) / path
    if link.is_dir():
        shutil.rmtree(link)
    link.symlink_to(outside_folder)
    before = snapshot_files(outside_folder)
    done = collect_garbage(store, min_age=NOTHING, delete_replaced_now=True)
    assert snapshot_files(outside_folder) == before
    assert f"{path} is a symbolic link: nothing behind it is deleted" in done.notes
    assert link.is_symlink()
    assert [g.reason for g in done.deleted if g.reason == "replaced"] == ["replaced"]
    assert [v.problems for v in verify_entries(store, store.list_summaries())] == [[], []]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("top", ["runs", "index"])
def test_gc_deletes_nothing_behind_links_of_a_store_on_several_disks(
    store: Store, tmp_path: Path, top: str, depth: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for number, folder in enumerate(sorted(Path(store.url).glob("/".join([top, *["*"] * (depth - 1)])))):
        if folder.is_dir():
            shutil.move(folder, disk / str(number))
            folder.symlink_to(disk / str(number))
    before, runs = snapshot_files(disk), snapshot_files(Path(store.url) / "runs")
    done = collect_garbage(store, min_age=NOTHING, delete_replaced_now=True)
    if top == "index" or depth < 3:
        assert snapshot_files(disk) == before
        assert any(f"{top}" in note and "is a symbolic link" in note for note in done.notes)
        assert [g.path for g in done.deleted] == ["staging/old"]
        assert snapshot_files(Path(store.url) / "runs") == runs
    else:
        # Inside a run links are parts of it: they go with it, and what is behind them stays.
        assert snapshot_files(disk) == before
        assert {g.reason for g in done.deleted} == {"replaced", "never committed", "abandoned staging"}
    assert [v.problems for v in verify_entries(store, store.list_summaries())] == [[], []]


def test_gc_keeps_every_run_while_the_index_is_a_dangling_link(store: Store, tmp_path: Path) -> None:
    index = Path(store.url) / "index"
    index.rename(tmp_path / "disk")
    index.symlink_to(tmp_path / "not mounted")
    runs = snapshot_files(Path(store.url) / "runs")
    assert open_store(store.url).list_summaries() == []
    collect_garbage(store, min_age=NOTHING, delete_replaced_now=True)
    assert snapshot_files(Path(store.url) / "runs") == runs


def test_gc_unlinks_links_in_an_abandoned_run_without_following_them(
    store: Store, outside_folder: Path
) -> None:
    run = Path(store.url) / "runs" / RUN
    (run / "deep").symlink_to(outside_folder)
    (run / "train" / "count" / "file").symlink_to(outside_folder / "thesis" / "chapter1.tex")
    (run / "nowhere").symlink_to("nowhere")
    before = snapshot_files(outside_folder)
    done = collect_garbage(store, min_age=NOTHING)
    assert f"runs/{RUN}" in {g.path for g in done.deleted}
    assert not run.exists()
    assert snapshot_files(outside_folder) == before


@pytest.mark.parametrize("place", [f"runs/{RUN}", "staging/old"])
def test_gc_does_not_follow_a_folder_swapped_for_a_link_concurrently(
    store: Store, outside_folder: Path, place: str
) -> None:
    folder, done, before = Path(store.url) / place, threading.Event(), snapshot_files(outside_folder)
    swapped = 0

    def swap() -> None:
        nonlocal swapped
        while not done.is_set():
            with suppress(OSError):
                (folder / "thesis").mkdir(parents=True, exist_ok=True)
                (folder / "thesis" / "chapter1.tex").write_text("bait")
                folder.rename(folder.with_name("aside"))
                folder.symlink_to(outside_folder)
                swapped += 1
                folder.unlink()
            shutil.rmtree(folder.with_name("aside"), ignore_errors=True)

    swapping = threading.Thread(target=swap)
    swapping.start()
    deleted, end = 0, time.monotonic() + 30
    try:
        while (deleted < 8 or swapped < 40) and time.monotonic() < end:
            with suppress(InputError):
                deleted += place in {g.path for g in collect_garbage(store, min_age=NOTHING).deleted}
    finally:
        done.set()
        swapping.join()
    assert snapshot_files(outside_folder) == before
    assert deleted
    assert swapped


@pytest.mark.parametrize("run", ["", "/", "..", "../runs", f"{RUN}/train", f"{RUN}/", "A" * 32, RUN[1:]])
def test_delete_run_refuses_an_invalid_run_id(run: str) -> None:
    objects = MemoryStore()
    obstore.put(objects, f"runs/{RUN}/zarr.json", b"x")
    with pytest.raises(ValueError, match="is not the id of a run"):
        delete_run(objects, run)
    assert obstore.list(objects).collect()


@pytest.mark.parametrize("where", ["disk", "s3", "memory"])
def test_delete_run_keeps_runs_with_the_same_prefix(
    tmp_path: Path, request: pytest.FixtureRequest, where: str
) -> None:
    objects: ObjectStore = MemoryStore()
    if where != "memory":
        objects = connect_object_store(
            str(tmp_path) if where == "disk" else request.getfixturevalue("s3_url")
        )
    for name in (f"{RUN}/zarr.json", f"{RUN}/train/zarr.json", f"{RUN}0/zarr.json", "zarr.json"):
        obstore.put(objects, f"runs/{name}", b"x")
    delete_run(objects, RUN)
    left = [item["path"] for batch in obstore.list(objects) for item in batch]
    assert sorted(left) == [f"runs/{RUN}0/zarr.json", "runs/zarr.json"]


def test_gc_keeps_folders_not_named_like_a_run(store: Store) -> None:
    mine = Path(store.url) / "runs" / "my notes" / "a.txt"
    mine.parent.mkdir()
    mine.write_text("x")
    age_files(mine.parent)
    assert len(collect_garbage(store, min_age=NOTHING, delete_replaced_now=True).deleted) == 3
    assert mine.read_text() == "x"


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
@pytest.mark.parametrize("path", ["index", "index/HASH", "index/HASH/FINGERPRINT"])
def test_publish_reports_an_index_folder_that_is_a_file_or_a_link(
    tmp_path: Path, outside_folder: Path, path: str, kind: str
) -> None:
    store = open_or_create_store(str(tmp_path / "store"))
    card = make_backbone_card()
    folder = Path(store.url) / path.replace("HASH", card.hash).replace("FINGERPRINT", "f" * 64)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        folder.write_bytes(b"")
    else:
        folder.symlink_to(outside_folder if kind == "link" else "nowhere")
    before = snapshot_files(outside_folder)
    if path == "index" and kind == "link":
        publish_random_entry(store)  # somebody keeps their index on another disk
        return
    with pytest.raises(
        InputError, match=rf"cannot write below {folder}: it is a (file|symbolic link)"
    ) as error:
        publish_random_entry(store)
    assert "\n" not in str(error.value)
    assert snapshot_files(outside_folder) == before


@pytest.mark.parametrize("where", ["index", "runs", f"runs/{'b' * 32}", "staging/x"])
def test_deeply_nested_folders_are_reported_and_do_not_block_gc(store: Store, where: str) -> None:
    root = Path(store.url)
    (root / where).mkdir(parents=True, exist_ok=True)
    here = os.open(root / where, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        assert len(store.list_summaries()) == 2
        done = collect_garbage(store, min_age=NOTHING, delete_replaced_now=True)
        assert any(f"{where}{'' if where == 'staging/x' else '/a/a/a'}" in note for note in done.notes)
        # Where not all is listed, what has no commit may be somebody's.
        uncommitted = {"never committed"} if where == "staging/x" else set()
        reasons = {g.reason for g in done.deleted if g.path.startswith("runs/")}
        assert reasons == {"replaced"} | uncommitted
        assert [v.problems for v in verify_entries(store)] == [[], []]
    finally:
        subprocess.run(["rm", "-rf", str(root / where)], check=True)


def test_listing_follows_at_most_1000_links(store: Store, tmp_path: Path) -> None:
    names = [compute_sha256(str(n).encode()) for n in range(60)]
    levels = [Path(store.url) / "index", tmp_path / "second", tmp_path / "third", tmp_path / "fourth"]
    for folder, behind in pairwise(levels):
        behind.mkdir()
        for name in names:
            (folder / name).symlink_to(behind)
    began = time.perf_counter()
    entries, reasons = store.list_summaries_and_problems()
    assert (len(entries), len(reasons)) == (2, 1)
    assert "behind more than 1000 links" in reasons[0]
    assert time.perf_counter() - began < 5


def test_index_listing_skips_unrelated_folders(store: Store, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (Path(store.url) / "index" / "x").symlink_to(tmp_path / "large")
    (Path(store.url) / "index" / "y").mkdir(mode=0)
    seen = []
    found = walk_store_paths(
        Path(store.url), "index", seen.append, should_enter_folder=lambda p: seen.append(p) or "x" not in p
    )
    assert all("index/x/" not in file.path for file in found)
    assert store.list_summaries_and_problems()[1] == []


def test_gc_deletes_no_run_if_the_index_is_a_file(store: Store) -> None:
    index = Path(store.url) / "index"
    index.rename(index.with_name("kept"))
    index.write_text("")
    assert store.list_summaries_and_problems() == ([], [f"cannot read {index}: it is a file, not a folder"])
    assert collect_garbage(store, min_age=NOTHING).deleted[0].path == "staging/old"
    assert len(list((Path(store.url) / "runs").iterdir())) == 5


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_gc_keeps_staging_whose_lock_is_not_a_regular_file(store: Store, kind: str) -> None:
    lock = Path(store.url) / "staging" / "old.lock"
    lock.mkdir() if kind == "folder" else os.mkfifo(lock)
    age_files(Path(store.url))
    done = collect_garbage(store)
    assert {g.reason for g in done.deleted} == {"replaced", "never committed"}
    assert (Path(store.url) / "staging" / "old").exists()


@pytest.mark.parametrize("at", ["run", "inside", "file"])
def test_copy_to_an_occupied_run_path_succeeds_and_follows_no_link(
    store: Store, outside_folder: Path, tmp_path: Path, at: str
) -> None:
    (summary, *_) = store.list_summaries()
    target = open_or_create_store(str(tmp_path / "target"))
    place = tmp_path / "target" / "runs" / store.read_entry_commit(summary).run
    if at == "file":
        place.write_text("mine")
    elif at == "run":
        place.symlink_to(outside_folder)
    else:
        place.mkdir()
        (place / "train").symlink_to(outside_folder)
    before = snapshot_files(outside_folder)
    assert [c.outcome for c in copy_entries(store, target, [summary])] == ["copied"]
    assert snapshot_files(outside_folder) == before
    assert [v.problems for v in verify_entries(target)] == [[]]

"""Disks as people have them: clutter, strange paths, no hard links, full, read-only, no home."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore
from toy_entries import publish_random_entry

from sfm.errors import InputError
from sfm.paths import expand_home, get_cache_folder, list_without_hidden_and_system_files
from sfm.stats_store import local_files, system_errors
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.location import explain_store_error, parse_local_path
from sfm.stats_store.objects import ObjectExistsError, create_object, create_object_unless_identical
from sfm.stats_store.store import open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries


@pytest.mark.parametrize(
    "name", [".DS_Store", "._x", ".gitkeep", "lost+found/", "Thumbs.db", "Desktop.ini", "empty/"]
)
def test_store_can_be_created_in_a_folder_with_system_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"x")
    publish_random_entry(open_or_create_store(str(tmp_path)))
    assert (tmp_path / name).exists()
    assert [v.is_sound for v in verify_entries(open_store(str(tmp_path)))] == [True]


def test_creating_a_store_next_to_other_files_suggests_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="it holds other files: give an empty folder"):
        open_or_create_store(str(tmp_path))
    assert list_without_hidden_and_system_files(tmp_path) == [tmp_path / "thesis.tex"]


@pytest.mark.parametrize("name", ["a b", "50%", "a%20b", "a#b", "a?b", "ä", "[x", "-", "a\\b"])
def test_special_characters_in_a_store_path_are_taken_literally(tmp_path: Path, name: str) -> None:
    publish_random_entry(open_or_create_store(str(tmp_path / name)))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [v.is_sound for v in verify_entries(open_store(str(tmp_path / name)))] == [True]


@pytest.mark.parametrize("url", ["file:///x/a#b", "file:///x/a?b", "file:///x/a#", "file://team/x"])
def test_file_url_with_host_query_or_fragment_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="write"):
        parse_local_path(url)


def test_file_url_is_percent_decoded() -> None:
    assert (
        parse_local_path("file:///x/a%23b%20c")
        == parse_local_path("file://localhost/x/a%23b%20c")
        == Path("/x/a#b c")
    )


def test_store_with_linked_root_and_linked_runs_folder_verifies(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    publish_random_entry(open_or_create_store(str(tmp_path / "link")))
    (tmp_path / "real" / "runs").rename(tmp_path / "big")
    (tmp_path / "real" / "runs").symlink_to(tmp_path / "big")
    (tmp_path / "real" / "index" / "round").symlink_to(tmp_path / "real")
    assert [v.is_sound for v in verify_entries(open_or_create_store(str(tmp_path / "link")))] == [True]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file", "it is a file"),
        ("file/store", "a part of the path is a file"),
        ("x" * 300, "too long"),
        ("\0", "null"),
    ],
)
def test_store_path_that_cannot_be_a_folder_gives_a_one_line_error(
    tmp_path: Path, path: str, reason: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for visit in (open_or_create_store, open_store):
        with pytest.raises(InputError, match=reason) as error:
            visit(str(tmp_path / path))
        assert "\n" not in str(error.value)


def fail_system_call(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a call of the system fail as it does on file systems that have no such thing."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_commit_creation_is_exclusive_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_system_call("link", number, monkeypatch)
    fail_system_call("fsync", errno.EINVAL, monkeypatch)
    store = open_or_create_store(str(tmp_path))
    summary = publish_random_entry(store)
    with pytest.raises(AlreadyExistsError):
        create_object(store.objects, f"index/{summary.key}/00000001.json", b"other")
    assert [v.is_sound for v in verify_entries(store)] == [True]
    assert not list(tmp_path.rglob("*#*"))


def test_file_system_without_exclusive_creation_is_refused_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_system_call("link", errno.EPERM, monkeypatch)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "neither")

    monkeypatch.setattr(local_files, "rename_exclusively", fail)
    with pytest.raises(InputError, match=r"neither hard links nor exclusive renames.*use another disk"):
        open_or_create_store(str(tmp_path / "store"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_failed_write_leaves_no_partial_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store, whole = open_or_create_store(str(tmp_path)), local_files.create_file_exclusively
    failing = left = 0

    def write(root: Path, path: str, data: bytes, **words: bool) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number), str(root / path))
        whole(root, path, data, **words)

    monkeypatch.setattr("sfm.stats_store.objects.create_file_exclusively", write)
    while True:
        left = failing
        try:
            publish_random_entry(store)
            break
        except InputError:
            assert len(store.list_summaries()) in (0, 1)
            failing += 5
    assert failing > 5
    assert [v.is_sound for v in verify_entries(store)] == [True]


def snapshot_files(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Return number, time of change and content of every file."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_store_operations_never_modify_existing_files(tmp_path: Path) -> None:
    store, replica = (
        open_or_create_store(str(tmp_path / "store")),
        open_or_create_store(str(tmp_path / "replica")),
    )
    steps: list[Callable[[], object]] = [
        lambda: publish_random_entry(store, 0),
        lambda: publish_random_entry(store, 0),
        lambda: publish_random_entry(store, 1, replace=True),
        lambda: copy_entries(store, replica, store.list_summaries()),
        lambda: copy_entries(store, replica, store.list_summaries(), replace=True),
        lambda: next((tmp_path / "store" / "runs").rglob("c/0")).write_bytes(b"damage"),
        lambda: copy_entries(replica, store, replica.list_summaries(), replace=True),
        lambda: remove_entry(store, store.list_summaries()[0]),
        lambda: copy_entries(replica, store, replica.list_summaries(), replace=True),
        lambda: open_or_create_store(store.url),
    ]
    before = snapshot_files(tmp_path)
    for number, step in enumerate(steps):
        step()
        after = snapshot_files(tmp_path)
        changed = [path for path in before if path in after and before[path] != after[path]]
        assert len(changed) == (number == 5), (number, changed)
        before = after
    assert len(store.list_summaries()) == 1


@pytest.mark.parametrize("there", ["file", "folder", "link", "dangling link"])
def test_create_object_never_overwrites_an_existing_path(tmp_path: Path, there: str) -> None:
    objects = LocalStore(tmp_path)
    target, mine = tmp_path / "a" / "b", tmp_path / "mine"
    target.parent.mkdir()
    mine.write_bytes(b"mine")
    if there == "folder":
        target.mkdir()
    elif there == "file":
        target.write_bytes(b"mine")
    else:
        target.symlink_to(mine if there == "link" else tmp_path / "nowhere")
    with pytest.raises(AlreadyExistsError):
        create_object(objects, "a/b", b"other")
    if there in ("file", "link"):
        assert not create_object_unless_identical(objects, "a/b", b"mine")
        with pytest.raises(ObjectExistsError, match="a/b exists already with other content"):
            create_object_unless_identical(objects, "a/b", b"other")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "mine"]
    assert mine.read_bytes() == b"mine"


def test_store_on_a_read_only_file_system_is_readable_and_not_writable(tmp_path: Path) -> None:
    publish_random_entry(open_or_create_store(str(tmp_path / "store")))
    mount = ["mount", "--bind", "-o", "ro", str(tmp_path / "store"), str(tmp_path / "store")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        assert [v.is_sound for v in verify_entries(open_store(str(tmp_path / "store")))] == [True]
        with pytest.raises(InputError, match="the file system is read-only"):
            open_or_create_store(str(tmp_path / "store"))
    finally:
        subprocess.run(["umount", str(tmp_path / "store")], check=True)


def test_unknown_home_folder_is_refused_and_xdg_cache_home_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"for ~nobody-of-this-name .*: give a full path"):
        expand_home("~nobody-of-this-name/store")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert get_cache_folder() == Path("/somewhere")


def test_errno_in_an_obstore_message_is_explained() -> None:
    error = RuntimeError("Generic LocalFileSystem error: Unable to open file /x/y: Disk quota (os error 122)")
    assert system_errors.get_error_path(error) == Path("/x/y")
    if errno.EDQUOT == 122:
        assert (
            explain_store_error(error, "/x")
            == f"cannot use /x: {system_errors.ERRNO_EXPLANATIONS[errno.EDQUOT]}"
        )

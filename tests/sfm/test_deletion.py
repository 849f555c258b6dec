"""Deletion below a root: what lies elsewhere stays, however it is linked."""

import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sfm.deletion import DeletionThroughLinkError, delete_without_following_links


@pytest.fixture
def outside_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "c" / "thesis.tex").write_text("years of work")
    return folder


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("linked", ["a", "a/b", "a/b/c"])
def test_deletion_refuses_a_link_at_any_level(tmp_path: Path, outside_folder: Path, linked: str) -> None:
    root = tmp_path / "root"
    (root / linked).parent.mkdir(parents=True)
    target = outside_folder.joinpath(*linked.split("/")[1:])
    (root / linked).symlink_to(target)
    with pytest.raises(DeletionThroughLinkError, match="symbolic link"):
        delete_without_following_links(root, "a/b/c")
    assert list_files(outside_folder) == ["b/c/thesis.tex"]


def test_deletion_unlinks_links_without_following_them(tmp_path: Path, outside_folder: Path) -> None:
    (tmp_path / "root" / "a" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "a" / "deep" / "folder").symlink_to(outside_folder)
    (tmp_path / "root" / "a" / "file").symlink_to(outside_folder / "b" / "c" / "thesis.tex")
    delete_without_following_links(tmp_path / "root", "a")
    assert not (tmp_path / "root" / "a").exists()
    assert list_files(outside_folder) == ["b/c/thesis.tex"]


def test_deletion_accepts_a_linked_root(tmp_path: Path, outside_folder: Path) -> None:
    (tmp_path / "root").symlink_to(outside_folder)
    delete_without_following_links(tmp_path / "root", "b/c")
    assert list_files(outside_folder) == []


@pytest.mark.parametrize("path", ["", ".", "..", "a/../../elsewhere", "/etc"])
def test_deletion_refuses_a_path_outside_the_root(tmp_path: Path, outside_folder: Path, path: str) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="does not lie below"):
        delete_without_following_links(tmp_path / "root", path)
    assert (tmp_path / "root" / "a").is_dir()
    assert list_files(outside_folder) == ["b/c/thesis.tex"]


@pytest.mark.parametrize("path", ["gone", "gone/deeper", "file"])
def test_deletion_ignores_missing_paths(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    delete_without_following_links(tmp_path, path)
    assert not (tmp_path / path).exists()
    delete_without_following_links(tmp_path, path)
    delete_without_following_links(tmp_path / "no root", path)


def test_deletion_does_not_follow_a_folder_swapped_for_a_link_concurrently(
    tmp_path: Path, outside_folder: Path
) -> None:
    root, done = tmp_path / "root", threading.Event()
    (root / "a").mkdir(parents=True)

    def swap_folder_for_link() -> None:
        folder, aside = root / "a" / "b", root / "aside"
        while not done.is_set():
            with suppress(OSError):
                (folder / "c").mkdir(parents=True, exist_ok=True)
                folder.rename(aside)
                folder.symlink_to(outside_folder / "b")
                folder.unlink()
            shutil.rmtree(aside, ignore_errors=True)

    swapping = threading.Thread(target=swap_folder_for_link)
    swapping.start()
    outcomes: set[str] = set()
    tried, end = 0, time.monotonic() + 60
    try:
        while (tried < 3000 or outcomes != {"deleted", "refused"}) and time.monotonic() < end:
            tried += 1
            try:
                delete_without_following_links(root, "a/b/c")
                outcomes.add("deleted")
            except DeletionThroughLinkError:
                outcomes.add("refused")
    finally:
        done.set()
        swapping.join()
    assert outcomes == {"deleted", "refused"}
    assert list_files(outside_folder) == ["b/c/thesis.tex"]

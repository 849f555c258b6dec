"""Files are replaced whole, in folders where others may have put links in their place."""

import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from sfm.atomic import atomic_folder, atomic_write, delete_path_if_exists, make_folder_refusing_link
from sfm.errors import InputError


@pytest.fixture
def outside_file(tmp_path: Path) -> Path:
    """A file of somebody who has no part in it."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "thesis.tex"
    file.write_text("mine")
    return file


@pytest.mark.parametrize("name", ["result.json", ".result.json.partial"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_atomic_write_replaces_a_link_without_following_it(
    tmp_path: Path, outside_file: Path, name: str, link: object
) -> None:
    link(outside_file, tmp_path / name)  # type: ignore[operator]
    atomic_write(tmp_path / "result.json", b"new")
    assert outside_file.read_text() == "mine"
    assert (tmp_path / "result.json").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "result.json"]


def test_failed_atomic_write_leaves_the_target_unchanged(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        atomic_write(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_atomic_write_beyond_the_file_size_limit_keeps_the_old_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "result.json", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            atomic_write(tmp_path / "result.json", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "result.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_linked_folder_is_neither_written_to_nor_deleted(tmp_path: Path, outside_file: Path) -> None:
    (tmp_path / "link").symlink_to(outside_file.parent)
    with pytest.raises(InputError, match="link is a symbolic link, behind which nothing is written"):
        make_folder_refusing_link(tmp_path / "link")
    delete_path_if_exists(tmp_path / "link")
    delete_path_if_exists(tmp_path / "link")
    assert not os.path.lexists(tmp_path / "link")
    assert outside_file.read_text() == "mine"
    make_folder_refusing_link(tmp_path / "link")
    make_folder_refusing_link(tmp_path / "link")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_atomic_folder_replaces_a_file_folder_or_link(
    tmp_path: Path, outside_file: Path, make: object
) -> None:
    make(tmp_path / "images")  # type: ignore[operator]
    with atomic_folder(tmp_path / "images", replace=True) as folder:
        (folder / "0.png").write_bytes(b"new")
    assert (tmp_path / "images" / "0.png").read_bytes() == b"new"
    assert outside_file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "images"]


@pytest.mark.parametrize("replace", [True, False])
def test_failed_atomic_folder_leaves_the_target_unchanged(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "images").mkdir()
    if replace:
        (tmp_path / "images" / "0.png").write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    with suppress(KeyboardInterrupt), atomic_folder(tmp_path / "images", replace=replace) as folder:
        (folder / "0.png").write_bytes(b"half")
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == before
    assert not replace or (tmp_path / "images" / "0.png").read_bytes() == b"old"


def test_atomic_folder_replaces_a_non_empty_folder_only_with_replace(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"old")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "images", replace=False):
        raise AssertionError("nothing may be written")
    assert (tmp_path / "images" / "0.png").read_bytes() == b"old"

"""Files are replaced whole, in folders where others may have put links in their place."""

import os
import resource
from pathlib import Path

import pytest

from sfm.atomic import make_folder, remove, write_file
from sfm.errors import InputError


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A file of somebody who has no part in it."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "thesis.tex"
    file.write_text("mine")
    return file


@pytest.mark.parametrize("name", ["result.json", ".result.json.partial"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_of_the_name_is_replaced_and_not_written_through(
    tmp_path: Path, thesis: Path, name: str, link: object
) -> None:
    link(thesis, tmp_path / name)  # type: ignore[operator]
    write_file(tmp_path / "result.json", b"new")
    assert thesis.read_text() == "mine"
    assert (tmp_path / "result.json").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "result.json"]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_what_does_not_fit_leaves_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "result.json", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_file(tmp_path / "result.json", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "result.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_behind_a_link_is_not_used_and_not_deleted(tmp_path: Path, thesis: Path) -> None:
    (tmp_path / "link").symlink_to(thesis.parent)
    with pytest.raises(InputError, match="link is a symbolic link, behind which nothing is written"):
        make_folder(tmp_path / "link")
    remove(tmp_path / "link")
    remove(tmp_path / "link")
    assert not os.path.lexists(tmp_path / "link")
    assert thesis.read_text() == "mine"
    make_folder(tmp_path / "link")
    make_folder(tmp_path / "link")

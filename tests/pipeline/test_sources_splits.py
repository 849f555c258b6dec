"""Files of a folder or bucket: which split they are of, which are of none, and how many datasets they are."""

from pathlib import Path

import obstore
import pytest
from s3_server import open_bucket

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import DataFile
from sfm.pipeline.sources.split_files import find_split_files

SUFFIXES = (".tar",)


def write_files(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return str(root)


def get_relative_paths(root: str, files: list[DataFile]) -> list[str]:
    return [file.url.removeprefix(f"{root}/") for file in files]


@pytest.mark.parametrize("word", ["test", "testing", "Eval", "held-out", "val", "VALID", "validation", "dev"])
def test_held_out_files_are_matched_by_the_split_words_of_datasets(tmp_path, word):
    root = write_files(tmp_path, "train-0.tar", f"{word}-0.tar")
    found = find_split_files(root, SUFFIXES)
    assert get_relative_paths(root, found.test) == [f"{word}-0.tar"]
    assert found.inventory.notes == ()


def test_files_of_unknown_splits_are_named_in_the_error_and_can_be_chosen(tmp_path):
    root = write_files(tmp_path, "train-0.tar", "trainextra-0.tar", "val-0.tar")
    with pytest.raises(InputError, match=r"no known split: trainextra-0.tar; .*\?train=NAME&test=NAME"):
        find_split_files(root, SUFFIXES)
    found = find_split_files(root, SUFFIXES, train_split_name="trainextra", test_split_name_or_pattern="val")
    assert get_relative_paths(root, found.train) == ["trainextra-0.tar"]
    assert found.inventory.unused_by_kind == {"of train": 1}
    with pytest.raises(InputError, match=r"no file in .* is of a split trainmore: there are train-0.tar"):
        find_split_files(root, SUFFIXES, train_split_name="trainmore", test_split_name_or_pattern="val")


def test_test_takes_precedence_over_val_and_the_choice_is_reported(tmp_path):
    root = write_files(
        tmp_path, "train-0.tar", "test-0.tar", "validation-0.tar", "validation-1.tar", "README.md"
    )
    found = find_split_files(root, SUFFIXES)
    assert get_relative_paths(root, found.test) == ["test-0.tar"]
    assert found.inventory.unused_by_kind == {"of val": 2, ".md": 1}
    assert (
        "held out is test, not val (validation-0.tar, validation-1.tar); ?test=val"
        in found.inventory.notes[0]
    )
    for name in ("val", "validation"):
        chosen = find_split_files(root, SUFFIXES, test_split_name_or_pattern=name)
        assert get_relative_paths(root, chosen.test) == ["validation-0.tar", "validation-1.tar"]
        assert chosen.inventory.unused_by_kind == {"of test": 1, ".md": 1}


@pytest.mark.parametrize("names", [("train-0.tar", "train-1.tar"), ("0.tar", "1.tar")])
def test_training_files_alone_leave_no_held_out_split(tmp_path, names):
    root = write_files(tmp_path, *names)
    found = find_split_files(root, SUFFIXES)
    assert (get_relative_paths(root, found.train), found.test) == (list(names), [])
    assert "PATTERN?test=PATTERN" in found.inventory.no_held_out_reason


def test_held_out_files_alone_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no training file in .*found: val-0.tar"):
        find_split_files(write_files(tmp_path, "val-0.tar"), SUFFIXES)


@pytest.mark.parametrize(
    "names",
    [
        ("full/train-0.tar", "full/val-0.tar", "noisy/train-0.tar", "noisy/val-0.tar"),
        ("full/train-00000-of-00002.tar", "noisy/train-00000-of-00001.tar", "val-0.tar"),
        ("full/train/0.tar", "full/test/0.tar", "noisy/train/0.tar", "noisy/test/0.tar"),
        ("full/train-a.tar", "full/val-a.tar", "noisy/train-b.tar", "noisy/val-b.tar"),
    ],
)
def test_a_folder_of_several_datasets_is_refused_and_the_folders_are_listed(tmp_path, names):
    root = write_files(tmp_path, *names)
    with pytest.raises(
        InputError, match=rf"several datasets, in full, noisy: choose one, such as {root}/full"
    ):
        find_split_files(root, SUFFIXES)


@pytest.mark.parametrize(
    "names",
    [
        ("a/train-0.tar", "b/train-1.tar", "val-0.tar"),
        ("train/part=0/0.tar", "train/part=1/0.tar", "val/part=0/0.tar"),
        ("data/train-0.tar", "data/val-0.tar"),
    ],
)
def test_a_dataset_spread_over_folders_is_one_dataset(tmp_path, names):
    root = write_files(tmp_path, *names)
    found = find_split_files(root, SUFFIXES)
    assert len(found.train) + len(found.test) == len(names)


def test_symlinked_folders_are_followed_and_dangling_symlinks_are_named_in_the_error(tmp_path):
    write_files(tmp_path / "disk2", "train-1.tar")
    root = write_files(tmp_path / "set", "train-0.tar", "val-0.tar")
    (tmp_path / "set" / "b").symlink_to("../disk2")
    assert get_relative_paths(root, find_split_files(root, SUFFIXES).train) == [
        "b/train-1.tar",
        "train-0.tar",
    ]
    (tmp_path / "set" / "notes.txt").symlink_to("gone.txt")
    assert find_split_files(root, SUFFIXES).inventory.unused_by_kind == {"links that lead nowhere": 1}
    (tmp_path / "set" / "part.v2").symlink_to("../disk3")
    with pytest.raises(InputError, match=r"part.v2 is a link to ../disk3, which is not there"):
        find_split_files(root, SUFFIXES)
    (tmp_path / "set" / "part.v2").unlink()
    (tmp_path / "set" / "train-2.tar").symlink_to("gone.tar")
    for place in (root, f"{root}/*.tar", f"{root}/{{train-2,val-0}}.tar"):
        with pytest.raises(InputError, match=r"train-2.tar is a link to gone.tar, which is not there"):
            find_split_files(place, SUFFIXES)


def test_a_bucket_is_listed_like_a_folder(s3_url):
    for name in ("train-0.tar", "dev-0.tar", "about.json", ".cache/train-1.tar"):
        obstore.put(open_bucket(s3_url), name, b"x")
    found = find_split_files(s3_url, SUFFIXES)
    assert (get_relative_paths(s3_url, found.train), get_relative_paths(s3_url, found.test)) == (
        ["train-0.tar"],
        ["dev-0.tar"],
    )
    assert found.inventory.unused_by_kind == {".json": 1, "hidden": 1}


def test_split_names_are_accepted_only_for_folders(tmp_path):
    root = write_files(tmp_path, "train-0.tar", "val-0.tar")
    with pytest.raises(InputError, match=r"names files: \?train= chooses among those of a folder"):
        find_split_files(f"{root}/train-*.tar", SUFFIXES, train_split_name="train")
    with pytest.raises(InputError, match=r"is a folder: \?test= takes the name of a split in it"):
        find_split_files(root, SUFFIXES, test_split_name_or_pattern="val-*.tar")

"""Folders as people keep them: nested, linked, with other files in them, and with splits by many names."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from sfm.errors import InputError
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.sources.folder import open_folder_source
from sfm.testing import SourceTests


def list_sample_paths(source: Source, split: str = "train") -> list[str]:
    rows = np.arange(len(source.splits[split].labels))
    return [sample.location for sample in source.splits[split].iter_samples(rows)]


class TestFolderSource(SourceTests):
    @pytest.fixture
    def spec(self, image_folder):
        return f"folder:{image_folder}"

    @pytest.fixture
    def expected_samples(self, image_folder):
        return {
            split: [(file.parent.name, file.read_bytes()) for file in image_folder.glob(f"{split}/*/*.png")]
            for split in ("train", "test")
        }

    @pytest.fixture
    def damaged_spec_and_file_name(self, image_folder):
        (image_folder / "train" / "bag" / "003.png").unlink()
        (image_folder / "train" / "bag" / "003.png").symlink_to("gone")
        return f"folder:{image_folder}", "train/bag/003.png"


def test_nested_and_linked_folders_are_read_in_the_order_of_image_folder(tmp_path, image_folder):
    bag = image_folder / "train" / "bag"
    for number, nested in enumerate(("z/late", "batch2", "batch2/inner")):
        (bag / nested).mkdir(parents=True, exist_ok=True)
        (bag / f"{number:03d}.png").rename(bag / nested / "a.png")
    elsewhere = tmp_path / "disk2"
    elsewhere.mkdir()
    (image_folder / "train" / "boot" / "005.png").rename(elsewhere / "5.png")
    (image_folder / "train" / "boot" / "more").symlink_to(elsewhere)
    source = open_source(f"folder:{image_folder}")
    assert len(source.train.labels) == 36
    assert list_sample_paths(source) == [path for path, _ in ImageFolder(str(image_folder / "train")).samples]
    assert source.inventory.unused_by_kind == {}


def test_a_symlink_to_a_parent_folder_is_followed_once(image_folder):
    (image_folder / "train" / "bag" / "again").symlink_to(image_folder / "train" / "bag")
    source = open_source(f"folder:{image_folder}")
    assert len(source.train.labels) == 36
    assert source.inventory.unused_by_kind == {"links to a folder that holds them": 1}


@pytest.mark.parametrize(
    "place",
    ["train/bag/003.png", "train/bag/batch2", "train/hat", "train/cls.v1", "test/St. Bernard", "val.v1"],
)
def test_a_dangling_symlink_stops_the_run_and_is_named_in_the_error(image_folder, place):
    (image_folder / place).unlink(missing_ok=True)
    (image_folder / place).symlink_to("../.git/annex/objects/x")
    with pytest.raises(
        InputError, match=rf"{place} is a link to .*annex/objects/x, which is not there: .*dvc"
    ):
        open_source(f"folder:{image_folder}")


def test_dangling_symlinks_outside_class_folders_are_counted_as_unused(image_folder):
    for place in ("LICENSE.txt", "tour.mp4", "train/labels.csv", "train/loose.png"):
        (image_folder / place).symlink_to("../.git/annex/objects/x")
    source = open_source(f"folder:{image_folder}")
    assert source.inventory.unused_by_kind == {
        ".txt": 1,
        ".mp4": 1,
        ".csv": 1,
        "images outside of class folders": 1,
    }


def test_a_symlink_to_itself_counts_as_dangling(image_folder):
    (image_folder / "train" / "bag" / "round").symlink_to("round")
    with pytest.raises(InputError, match=r"bag/round is a link to round, which is not there"):
        open_source(f"folder:{image_folder}")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_an_unreadable_folder_is_named_in_the_error(image_folder):
    (image_folder / "train" / "bag" / "private").mkdir(mode=0)
    with pytest.raises(InputError, match=r"cannot read the folder .*bag/private: Permission denied"):
        open_source(f"folder:{image_folder}")


def test_files_that_are_not_images_are_counted_by_kind(image_folder):
    files = {
        "train/bag/notes.txt": b"about",
        "train/bag/Thumbs.db": b"\xd0\xcf",
        "train/boot/more/SHA256SUMS": b"00 x",
        "train/boot/labels.csv": b"a,b",
        "train/boot/.DS_Store": b"",
        "train/boot/@eaDir/001.png/thumb.jpg": b"\xff\xd8",
        "train/loose.png": b"x",
        "README.md": b"about",
        "annotations/boxes.json": b"{}",
    }
    for name, content in files.items():
        (image_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (image_folder / name).write_bytes(content)
    source = open_source(f"folder:{image_folder}")
    assert (len(source.train.labels), len(source.test.labels)) == (36, 24)
    assert source.inventory.unused_by_kind == {
        ".txt": 1,
        ".db": 1,
        ".csv": 1,
        ".md": 1,
        "without extension": 1,
        "hidden": 1,
        "in @eaDir/": 1,
        "in annotations/": 1,
        "images outside of class folders": 1,
    }


@pytest.mark.parametrize("name", ["000", "000.17", "000.png.orig", "000.JFIF"])
def test_an_image_is_recognised_under_any_file_name(image_folder, name):
    (image_folder / "train" / "bag" / "000.png").rename(image_folder / "train" / "bag" / name)
    assert len(open_source(f"folder:{image_folder}").train.labels) == 36


@pytest.mark.parametrize("name", ["broken.jpg", "photo.heic"])
def test_a_file_with_an_image_suffix_is_listed_as_an_image(image_folder, name):
    (image_folder / "train" / "bag" / name).write_bytes(b"?")
    assert any(path.endswith(name) for path in list_sample_paths(open_source(f"folder:{image_folder}")))


def test_a_class_without_images_is_named_with_its_file_kinds(image_folder):
    for file in (image_folder / "train" / "bag").iterdir():
        file.rename(file.with_suffix(".npy"))
    with pytest.raises(InputError, match=r"train/bag holds no image, only 12 \.npy"):
        open_source(f"folder:{image_folder}")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("train", "validation"),
        ("TRAIN", "valid"),
        ("train", "held-out"),
        ("train", "Dev"),
    ],
)
def test_split_folders_are_matched_by_known_words_ignoring_case(image_folder, train, test):
    (image_folder / "train").rename(image_folder / train)
    (image_folder / "test").rename(image_folder / test)
    source = open_source(f"folder:{image_folder}")
    assert (len(source.train.labels), len(source.test.labels)) == (36, 24)
    assert source.inventory.notes == ()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val2017"),
        ("train", "test_set"),
        ("train", "Test-Images"),
        ("train", "valid data"),
        ("train2017", "val2017"),
        ("seg_train", "test"),
    ],
)
def test_split_folders_are_matched_by_words_in_their_names(image_folder, train, test):
    """As those of shards and tables are."""
    (image_folder / "train").rename(image_folder / train)
    (image_folder / "test").rename(image_folder / test)
    (image_folder / "test_masks" / "masks").mkdir(parents=True)
    source = open_source(f"folder:{image_folder}")
    assert (len(source.train.labels), len(source.test.labels)) == (36, 24)
    assert (source.inventory.notes, source.inventory.unused_by_kind) == ((), {})


def test_an_exact_split_name_takes_precedence_over_a_name_that_contains_it(image_folder):
    shutil.copytree(image_folder / "test", image_folder / "test_set")
    (image_folder / "test").rename(image_folder / "val")
    source = open_source(f"folder:{image_folder}")
    assert all("/val/" in path for path in list_sample_paths(source, "test"))
    assert source.inventory.unused_by_kind == {"in test_set/": 24}


@pytest.mark.parametrize("name", ["train", "test", "Val", "dev"])
def test_a_class_may_have_the_name_of_a_split(image_folder, name):
    root = image_folder / "train"
    (root / "boot").rename(root / name)
    source = open_source(f"folder:{root}", require_held_out=False)
    assert source.class_ids == sorted(("bag", name, "trouser"))
    assert len(source.train.labels) == 36
    assert f"{name}/ is taken for a class, not for a split" in source.inventory.notes[0]
    with pytest.raises(InputError, match=r"holds .*trouser/.*--hold-out 0\.1"):
        open_source(f"folder:{root}")


def test_classes_with_a_split_word_in_their_names_stay_classes(image_folder):
    root = image_folder / "train"
    for class_id, name in (("bag", "bullet train"), ("boot", "test tube"), ("trouser", "trouser")):
        (root / class_id / "batch1").mkdir()
        (root / class_id / "000.png").rename(root / class_id / "batch1" / "000.png")
        (root / class_id).rename(root / name)
    source = open_source(f"folder:{root}", require_held_out=False)
    assert source.class_ids == ["bullet train", "test tube", "trouser"]


@pytest.mark.parametrize(
    "others", [{"test": "1.png"}, {"test": "1.png", "more": "1.png"}, {"boxes": "1.json"}]
)
def test_flat_split_folders_are_not_taken_for_classes(tmp_path, image_folder, others):
    for folder, name in ({"train": "1.png"} | others).items():
        (tmp_path / "flat" / folder).mkdir(parents=True)
        shutil.copy(image_folder / "test" / "bag" / "000.png", tmp_path / "flat" / folder / name)
    with pytest.raises(InputError, match=r"train holds no class folders, only 1 \.png"):
        open_source(f"folder:{tmp_path}/flat", require_held_out=False)


def move_test_to_unlabelled(root: Path) -> None:
    """Hold out ``val``, and make ``test`` a folder of images without classes."""
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    shutil.copy(root / "val" / "bag" / "000.png", root / "test" / "1.png")


def move_test_to_unlabelled_subfolder(root: Path) -> None:
    """Do the same with the images in a folder below ``test``."""
    move_test_to_unlabelled(root)
    (root / "test" / "images").mkdir()
    (root / "test" / "1.png").rename(root / "test" / "images" / "1.png")


@pytest.mark.parametrize("layout", [move_test_to_unlabelled, move_test_to_unlabelled_subfolder])
def test_a_test_folder_without_classes_is_skipped_for_val(image_folder, layout):
    layout(image_folder)
    source = open_source(f"folder:{image_folder}")
    assert all("/val/" in path for path in list_sample_paths(source, "test"))
    assert source.inventory.unused_by_kind == {"in test/": 1}
    assert source.inventory.notes == ("test/ is not used: it holds no folder of a training class",)


def test_the_choice_between_two_held_out_folders_is_reported_and_can_be_changed(image_folder):
    shutil.copytree(image_folder / "test", image_folder / "val")
    source = open_source(f"folder:{image_folder}")
    assert all("/test/" in path for path in list_sample_paths(source, "test"))
    assert source.inventory.notes == ("held out is test/, not val/; ?test=val chooses it",)
    assert source.inventory.unused_by_kind == {"in val/": 24}
    chosen = open_source(f"folder:{image_folder}?test=val")
    assert all("/val/" in path for path in list_sample_paths(chosen, "test"))
    assert chosen.name == "garments"
    shutil.rmtree(image_folder / "test" / "boot")
    assert all("/val/" in path for path in list_sample_paths(open_source(f"folder:{image_folder}"), "test"))


def test_split_folders_can_be_chosen_by_name(image_folder):
    (image_folder / "train").rename(image_folder / "seg_train")
    (image_folder / "test").rename(image_folder / "seg_test")
    source = open_source(f"folder:{image_folder}?train=seg_train&test=seg_test")
    assert (len(source.train.labels), len(source.test.labels)) == (36, 24)
    with pytest.raises(InputError, match=r"no folder seg_tests in .*; it holds seg_test/, seg_train/"):
        open_source(f"folder:{image_folder}?train=seg_train&test=seg_tests")


def test_a_class_subset_may_omit_classes_that_a_split_lacks(tmp_path, image_folder):
    shutil.rmtree(image_folder / "test" / "boot")
    (tmp_path / "two.txt").write_text("bag\ntrouser\n")
    source = open_source(f"folder:{image_folder}?classes={tmp_path}/two.txt")
    assert source.class_ids == ["bag", "trouser"]
    assert source.inventory.unused_by_kind == {"images of other classes": 12}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda root: shutil.rmtree(root / "test"),
            r"no held-out folder .*it holds train/: .*--hold-out 0\.1",
        ),
        (
            lambda root: (root / "test").rename(root / "quiz"),
            r"no held-out folder .*; it holds quiz/, train/: choose one with \?test=NAME; .*--hold-out 0\.1",
        ),
        (
            lambda root: shutil.copytree(root / "train", root / "Training"),
            r"holds Training/, train/: choose one with \?train=NAME",
        ),
        (
            lambda root: (
                [shutil.rmtree(root / "train" / name) for name in ("bag", "boot", "trouser")]
                and (root / "train" / "1.jpg").write_bytes(b"?")
            ),
            r"train holds no class folders, only 1 \.jpg",
        ),
    ],
)
def test_an_unusable_folder_layout_is_described_in_the_error(
    image_folder, spoil: Callable[[Path], object], complaint
):
    spoil(image_folder)
    with pytest.raises(InputError, match=complaint):
        open_source(f"folder:{image_folder}")


def test_class_folders_without_splits_require_hold_out(image_folder):
    with pytest.raises(InputError, match=r"must hold train/ and test/ .*holds bag/, boot/.*--hold-out 0\.1"):
        open_source(f"folder:{image_folder / 'train'}")
    source = open_source(f"folder:{image_folder / 'train'}", require_held_out=False)
    assert len(source.train.labels) == 36
    assert source.test.shards == ()


def test_the_listing_digest_of_a_flat_folder_is_unchanged(image_folder):
    """So that a repeat of an old extraction reads nothing."""
    from sfm.pipeline.sources.source import compute_digest

    lines = []
    for class_id in ("bag", "boot", "trouser"):
        for file in sorted((image_folder / "train" / class_id).iterdir()):
            status = file.stat()
            lines.append(f"{class_id}/{file.name} {status.st_size} {status.st_mtime_ns}")
    expected = compute_digest(str((image_folder / "train").resolve()), "\n".join(lines))
    assert open_folder_source(str(image_folder)).train.listing_digest == expected

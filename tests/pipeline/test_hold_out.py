"""``--hold-out`` takes the same share of every class from any order and kind of source."""

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from sfm.errors import InputError
from sfm.pipeline.dry_run import estimate_extraction
from sfm.pipeline.entry_rows import make_entry_options
from sfm.pipeline.extract import ExtractionResult, extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.hold_out import count_held_out_per_class, make_held_out_mask, make_hold_out_keys
from sfm.stats_store.store import open_store


def make_config(store: Path, source: str, **changes: object) -> ExtractConfig:
    values: dict[str, object] = {
        "source": source,
        "store": str(store),
        "backbone": ["lite0"],
        "image_size": 32,
        "sub_classes": (2,),
        "hold_out": 0.25,
    }
    return ExtractConfig(**(values | changes))


def make_digests(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)


def write_shards(folder: Path, root: Path) -> str:
    """The images of a folder of class folders as tar shards, in another order, of training images alone."""
    root.mkdir()
    files = sorted(folder.glob("*/*.png"), key=lambda file: file.name)
    for part in range(3):
        with tarfile.open(root / f"images-{part}.tar", "w") as archive:
            for number, file in enumerate(files[part::3]):
                for kind, data in (("png", file.read_bytes()), ("txt", file.parent.name.encode())):
                    info = tarfile.TarInfo(f"{number}.{kind}")
                    info.size = len(data)
                    archive.addfile(info, BytesIO(data))
    return f"wds:{root}"


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(10, 0.1, 1), (12, 0.25, 3), (2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2)]
)
def test_each_class_has_at_least_one_sample_on_both_sides_of_a_hold_out(count, fraction, held):
    assert count_held_out_per_class(np.array([count]), fraction).tolist() == [held]
    labels = np.zeros(count, dtype=np.int32)
    assert (
        make_held_out_mask(labels, make_hold_out_keys(make_digests(count), 0), ["a"], fraction).sum() == held
    )


def test_held_out_samples_depend_only_on_images_and_seed():
    labels = np.repeat(np.arange(3), [40, 20, 9]).astype(np.int32)
    labels[5] = -1
    found = make_digests(len(labels))
    held = make_held_out_mask(labels, make_hold_out_keys(found, 0), ["a", "b", "c"], 0.2)
    assert np.bincount(labels[held]).tolist() == [8, 4, 2]
    order = np.random.default_rng(1).permutation(len(labels))
    again = make_held_out_mask(labels[order], make_hold_out_keys(found[order], 0), ["a", "b", "c"], 0.2)
    np.testing.assert_array_equal(again, held[order])
    other = make_held_out_mask(labels, make_hold_out_keys(found, 1), ["a", "b", "c"], 0.2)
    assert (other != held).any()


def test_copies_of_an_image_are_in_the_same_split():
    """Or else what is held out would have been trained on."""
    found = np.repeat(make_digests(10), 4, axis=0)
    held = make_held_out_mask(np.zeros(40, dtype=np.int32), make_hold_out_keys(found, 0), ["a"], 0.1)
    assert held.reshape(10, 4).all(axis=1).sum() == held.sum() // 4 == 1
    same = np.repeat(make_digests(1), 4, axis=0)
    assert make_held_out_mask(np.zeros(4, dtype=np.int32), make_hold_out_keys(same, 0), ["a"], 0.5).sum() == 2


@pytest.mark.parametrize(
    ("copies", "fraction", "held"),
    [
        ([80, *[1] * 20], 0.1, [1] * 10),
        ([1, 1, 8], 0.3, [1, 1]),
        ([1, 4, 1, 4], 0.3, [1, 1]),
        ([6, 4], 0.1, [4]),
        ([3, 97], 0.1, [3]),
    ],
)
def test_copies_do_not_change_the_held_out_share_where_possible(copies, fraction, held):
    """Sizes of groups of copies, the one with the lowest key first."""
    keys = np.repeat(np.arange(len(copies)), copies).astype(np.uint64)
    order = np.random.default_rng(0).permutation(len(keys))
    found = make_held_out_mask(np.zeros(len(keys), dtype=np.int32), keys[order], ["a"], fraction)
    chosen, sizes = np.unique(keys[order][found], return_counts=True)
    assert sizes.tolist() == held == [copies[key] for key in chosen]


def summarize(done: ExtractionResult, number: int = 0) -> tuple[str, str, int, int]:
    s = done.published[number].summary
    return s.fingerprint, s.options, s.train_samples, s.test_samples


def test_folders_and_shards_of_the_same_images_publish_under_one_key(tmp_path, image_folder):
    folder = image_folder / "train"
    ours = extract(make_config(tmp_path / "a", f"folder:{folder}", tune_fraction=0.5, exemplars=2))
    theirs = extract(make_config(tmp_path / "b", write_shards(folder, tmp_path / "shards")))
    whole = summarize(ours)
    assert whole[0] == summarize(theirs)[0]
    assert whole[2:] == summarize(theirs)[2:] == (27, 9)
    entry = open_store(str(tmp_path / "a")).open_entry(ours.published[0].summary)
    assert entry.extraction.options["hold_out"] == 0.25
    assert entry.read_array("train/count").tolist() == [9, 9, 9]
    assert np.bincount(entry.read_array("test/label")).tolist() == [3, 3, 3]
    # What is chosen on the tuning entry is chosen without a look at what is held out.
    assert summarize(ours, 1)[2:] == (15, 12)
    assert (ours.files.found, ours.files.used) == (theirs.files.found, theirs.files.used) == (36, 36)
    again = extract(make_config(tmp_path / "a", f"folder:{folder}", tune_fraction=0.5, exemplars=2))
    assert again.pass_summary.images_read == 0


def test_entry_options_without_hold_out_are_unchanged(tmp_path):
    assert "hold_out" not in make_entry_options(make_config(tmp_path, "x:y", hold_out=None), "full", {})


def test_a_train_folder_without_a_test_folder_can_be_split(tmp_path, image_folder):
    (image_folder / "test").rename(image_folder / "unsorted")
    done = extract(make_config(tmp_path / "s", f"folder:{image_folder}"))
    assert summarize(done)[2:] == (27, 9)
    assert done.files.unused == {"in unsorted/": 24}


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_a_dry_run_counts_held_out_samples(tmp_path, image_folder, kind):
    folder = image_folder / "train"
    source = f"folder:{folder}" if kind == "folder" else write_shards(folder, tmp_path / "shards")
    planned = estimate_extraction(make_config(tmp_path / "s", source))
    assert planned.samples == {"train": 27, "test": 9}
    assert planned.files == {"found": 36, "used": 36, "unused": {}}


def test_idx_files_without_a_test_split_can_be_split(tmp_path):
    embedded = Path(extract.__code__.co_filename).parent / "data" / "fashion_mnist_6k"
    for file in embedded.glob("train-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"holds no t10k-images-idx3-ubyte; .*--hold-out 0\.1"):
        estimate_extraction(make_config(tmp_path / "s", f"idx:{tmp_path}", hold_out=None))
    planned = estimate_extraction(make_config(tmp_path / "s", f"idx:{tmp_path}", hold_out=0.1))
    assert planned.samples == {"train": 4500, "test": 500}


@pytest.mark.parametrize(
    ("source", "changes", "complaint"),
    [
        (
            "folder:{root}",
            {},
            r"has a held-out split: leave out --hold-out to use it, or name only the training",
        ),
        ("builtin:fashion-mnist-6k", {}, "has a held-out split"),
        (
            "folder:{root}/train",
            {"limit_per_class": 1},
            "class bag has one training image; --hold-out needs two",
        ),
        ("folder:{root}/train", {"min_count": 10}, r"fewer than 10 training images: bag \(9\)"),
        ("folder:{root}/train", {"hold_out": None}, r"--hold-out 0\.1"),
    ],
)
def test_an_impossible_hold_out_is_refused_before_anything_is_read(
    tmp_path, image_folder, source, changes, complaint
):
    with pytest.raises(InputError, match=complaint):
        extract(make_config(tmp_path / "s", source.format(root=image_folder), **changes))
    assert not (tmp_path / "s" / "index").exists()

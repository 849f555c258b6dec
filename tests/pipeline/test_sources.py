"""Sources: folders and idx files as they are found on disks, and what is wrong with them."""

import gzip
import itertools
import runpy
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfm.errors import InputError
from sfm.pipeline.selection import list_first_positions_per_class
from sfm.pipeline.sources import Sample, Split, open_source
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.prefetch import FILES_PER_TASK, prefetch_samples
from sfm.pipeline.sources.sample import SampleFile
from sfm.pipeline.sources.source import make_file_split
from sfm.testing import SourceTests


def read_one_sample(split: Split, i: int) -> Sample:
    """Return one sample of a split whose labels are known."""
    return next(split.read(np.array([i])))


TOY_IMAGES = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)


def write_idx_folder(
    root: Path, *, zipped: bool = False, labels: tuple[int, ...] = (0, 1, 2, 0, 1, 2)
) -> Path:
    root.mkdir(exist_ok=True)
    for split in ("train", "t10k"):
        files = {
            f"{split}-images-idx3-ubyte": struct.pack(">4I", 0x803, *TOY_IMAGES.shape) + TOY_IMAGES.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(labels)) + bytes(labels),
        }
        for name, data in files.items():
            if zipped:
                (root / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (root / name).write_bytes(data)
    return root


class TestIdxSource(SourceTests):
    @pytest.fixture
    def spec(self, tmp_path):
        return f"idx:{write_idx_folder(tmp_path / 'digits')}"

    @pytest.fixture
    def expected_samples(self):
        samples = [(str(i % 3), TOY_IMAGES[i].tobytes()) for i in range(6)]
        return {"train": samples, "test": samples}

    @pytest.fixture
    def damaged_spec_and_file_name(self, tmp_path):
        root = write_idx_folder(tmp_path / "damaged", zipped=True)
        truncated = root / "t10k-images-idx3-ubyte.gz"
        truncated.write_bytes(truncated.read_bytes()[:-12])
        return f"idx:{root}", truncated.name


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_with_and_without_gzip(tmp_path, zipped):
    source = open_source(f"idx:{write_idx_folder(tmp_path / 'digits', zipped=zipped)}")
    assert source.name == "digits"
    assert source.class_ids == ["0", "1", "2"]
    for i in (5, 0, 3):
        np.testing.assert_array_equal(
            np.asarray(source.decode(read_one_sample(source.train, i).data)), TOY_IMAGES[i]
        )


def test_labels_above_nine_sort_as_numbers(tmp_path):
    source = open_source(f"idx:{write_idx_folder(tmp_path / 'd', labels=(2, 10, 2, 10, 2, 10))}")
    assert source.class_ids == ["02", "10"]
    assert source.train.labels.tolist() == [0, 1] * 3


def test_classes_txt_names_the_classes_of_idx_files(tmp_path):
    root = write_idx_folder(tmp_path / "d")
    (root / "classes.txt").write_text("zero\none\ntwo\n")
    assert open_source(f"idx:{root}").class_names == ["zero", "one", "two"]
    # As other class lists: a byte order mark, comments, and what is no end of a line.
    text = "\ufeff# digits\r\nze\u2028ro\r\n\r\none\tEins\r\ntwo\x0b2"
    (root / "classes.txt").write_text(text, encoding="utf-8", newline="")
    assert open_source(f"idx:{root}").class_names == ["ze\u2028ro", "Eins", "two\x0b2"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda root: (root / "train-images-idx3-ubyte").unlink(), "holds no train-images-idx3-ubyte"),
        (lambda root: (root / "t10k-labels-idx1-ubyte").unlink(), "holds no t10k-labels-idx1-ubyte"),
        (
            lambda root: (
                (root / "train-labels-idx1-ubyte").rename(root / "x")
                and (root / "train-labels-idx1-ubyte").symlink_to("gone")
            ),
            "train-labels-idx1-ubyte is a link to gone, which is not there",
        ),
        (lambda root: (root / "train-labels-idx1-ubyte").write_bytes(b"\0\0"), "header cannot be read"),
        (lambda root: (root / "t10k-images-idx3-ubyte").write_bytes(b"PK\3\4" * 9), "begins with 504b0304"),
        (
            lambda root: (root / "train-labels-idx1-ubyte").write_bytes(
                struct.pack(">2I", 0x801, 9) + b"\1" * 9
            ),
            "6 images of 4x3; expected 9",
        ),
        (
            lambda root: (root / "classes.txt").write_bytes("null\neins\nzwölf\n".encode("latin-1")),
            "classes.txt is not a class list: it is not UTF-8 text",
        ),
        (lambda root: (root / "classes.txt").write_text("zero\n"), "has 1 names, but labels go up to 2"),
    ],
)
def test_invalid_idx_files_are_named_in_the_error(tmp_path, spoil, complaint):
    root = write_idx_folder(tmp_path / "d")
    spoil(root)
    with pytest.raises(InputError, match=complaint):
        open_source(f"idx:{root}")


def test_a_truncated_idx_file_is_named_in_the_error_before_it_is_read(tmp_path):
    root = write_idx_folder(tmp_path / "d")
    file = root / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="images-idx3-ubyte ends after 67 of the 72 bytes"):
        open_source(f"idx:{root}")


def test_a_truncated_gzip_idx_file_is_named_in_the_error_when_it_is_read(tmp_path):
    root = write_idx_folder(tmp_path / "d")
    file = root / "train-images-idx3-ubyte"
    file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()[:-5]))
    file.unlink()
    source = open_source(f"idx:{root}")
    with pytest.raises(InputError, match="ends before image 5 of 6"):
        read_one_sample(source.train, 5)


def test_the_embedded_dataset_is_balanced_and_has_class_names():
    source = open_source("builtin:fashion-mnist-6k")
    assert np.bincount(source.train.labels).tolist() == [500] * 10
    assert np.bincount(source.test.labels).tolist() == [100] * 10
    assert source.class_names[0] == "T-shirt/top"
    assert source.licence == "MIT"


def test_a_folder_of_class_folders_is_read(image_folder):
    source = open_source(f"folder:{image_folder}")
    assert source.class_ids == ["bag", "boot", "trouser"]
    assert np.bincount(source.train.labels).tolist() == [12] * 3
    assert read_one_sample(source.train, 13).location.endswith("train/boot/001.png")


def test_a_val_folder_is_used_as_the_test_split(image_folder):
    (image_folder / "test").rename(image_folder / "val")
    assert len(open_source(f"folder:{image_folder}").test.labels) == 24


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda root: (root / "train" / "empty").mkdir(), "no train images in class empty"),
        (
            lambda root: shutil.rmtree(root / "test" / "boot"),
            r"no test images in class boot; .*\?classes=LIST",
        ),
        (
            lambda root: [(root / s / "empty").mkdir() for s in ("train", "test")],
            "no train images in class empty",
        ),
        (lambda root: (root / "train").rename(root / "images"), r"must hold train/, .* holds images/, test/"),
    ],
)
def test_invalid_folders_are_named_in_the_error(image_folder, spoil, complaint):
    spoil(image_folder)
    with pytest.raises(InputError, match=complaint):
        open_source(f"folder:{image_folder}")


def test_a_dataset_folder_with_one_class_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / split / "cat" / "a.png")
    with pytest.raises(InputError, match="fewer than two classes"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("foldr:/data", "did you mean folder:/data"),
        ("cifar10", "write KIND:PLACE, where KIND is one of folder, wds, parquet, torchvision"),
        ("builtin:mnist", "there is builtin:fashion-mnist-6k"),
        ("folder:/no/such/place", "/no/such/place is not a folder"),
        ("idx:/no/such/place", "/no/such/place is not a folder"),
    ],
)
def test_an_unknown_dataset_error_gives_a_hint(spec, complaint):
    with pytest.raises(InputError, match=complaint):
        open_source(spec)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode_image((tmp_path / "a.jpg").read_bytes()).size == (4, 8)


def test_a_decompression_bomb_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image((tmp_path / "a.png").read_bytes())


def test_a_limit_takes_the_first_positions_of_each_class():
    source = open_source("builtin:fashion-mnist-6k")
    chosen = list_first_positions_per_class(source.train.labels, 3)
    assert (np.diff(chosen) > 0).all()
    for c in range(10):
        own = chosen[source.train.labels[chosen] == c]
        np.testing.assert_array_equal(own, np.flatnonzero(source.train.labels == c)[:3])


def test_the_embedded_subset_is_reproduced_bit_for_bit(tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "draw_idx_subset.py"
    draw_idx_subset = runpy.run_path(str(tool))["draw_idx_subset"]
    root = write_idx_folder(tmp_path / "full")
    for out in ("a", "b"):
        draw_idx_subset(str(root), tmp_path / out, train=2, test=1, seed=3)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = open_source(f"idx:{tmp_path / 'a'}")
    assert np.bincount(again.train.labels).tolist() == [2, 2, 2]
    originals = {TOY_IMAGES[i].tobytes(): [0, 1, 2, 0, 1, 2][i] for i in range(6)}
    assert [originals[read_one_sample(again.train, i).data] for i in range(6)] == again.train.labels.tolist()


def test_files_are_listed_without_being_read_and_then_read_in_order(tmp_path):
    paths = [tmp_path / f"{i}" for i in range(50)]
    for i, path in enumerate(paths):
        path.write_text(str(i))
    labels = np.arange(50, dtype=np.int32) % 2
    split = make_file_split(labels, ["a", "b"], lambda i: str(paths[i]), "listing")
    rows = np.arange(1, 50, 2)
    listed = list(split.iter_samples(rows))
    assert listed == [SampleFile(str(paths[i]), "b") for i in rows]
    found = list(split.read(rows))
    assert found == [Sample(str(i).encode(), "b", str(paths[i])) for i in rows]
    assert list(prefetch_samples(found)) == found
    assert list(prefetch_samples([])) == []


def test_unreadable_files_are_named_in_the_error(tmp_path):
    gone = SampleFile(str(tmp_path / "gone.png"), "bag")
    with pytest.raises(InputError, match=r"gone.png vanished while the dataset was read; run again"):
        gone.read()
    with pytest.raises(InputError, match=f"^cannot read {tmp_path}: Is a directory$"):
        list(prefetch_samples([SampleFile(str(tmp_path), "bag")]))


def test_read_ahead_is_bounded_by_the_thread_count(tmp_path):
    paths = [tmp_path / f"{i}" for i in range(3 * FILES_PER_TASK)]
    for path in paths:
        path.write_bytes(path.name.encode())
    listed = (SampleFile(str(tmp_path / f"{i}"), "a") for i in itertools.count())
    found = prefetch_samples(listed, 3)
    assert [next(found).data for _ in paths] == [path.name.encode() for path in paths]
    found.close()
    assert next(listed).location == str(tmp_path / str((3 + 3) * FILES_PER_TASK))

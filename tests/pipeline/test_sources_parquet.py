"""Parquet datasets as the Hugging Face hub holds them, on a disk and in a bucket."""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import open_bucket
from source_samples import group_samples_by_split

from sfm.errors import InputError
from sfm.pipeline.sources import Sample, Split, open_source
from sfm.pipeline.sources.data_files import digest_file_states, find_files_by_pattern
from sfm.pipeline.sources.parquet import merge_row_groups_into_shard_ranges
from sfm.pipeline.sources.source import compute_digest
from sfm.testing import SourceTests

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASS_NAMES = ["bag", "boot", "trouser"]


def make_hub_metadata(names: Sequence[str] | None) -> dict[str, str]:
    """Return what the datasets library writes into a schema."""
    label = {"_type": "Value", "dtype": "int64"} if names is None else {"_type": "ClassLabel", "names": names}
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


def write_tables(
    root: Path, pictures: Sequence, names: Sequence[str] | None = CLASS_NAMES, rows: int = 10
) -> Path:
    """Write data/train-00000-of-00002.parquet … as the hub does, with small row groups."""
    (root / "data").mkdir(parents=True)
    for split, parts in (("train", 2), ("validation", 1)):
        own = [p for p in pictures if p.split == ("train" if split == "train" else "test")]
        for part in range(parts):
            some = own[part::parts]
            table = pa.table(
                {
                    "image": pa.array([{"bytes": p.data, "path": "x.png"} for p in some], IMAGE_TYPE),
                    "label": pa.array([p.label for p in some], pa.int64()),
                }
            )
            table = table.replace_schema_metadata(make_hub_metadata(names))
            path = root / "data" / f"{split}-{part:05d}-of-{parts:05d}.parquet"
            pq.write_table(table, path, row_group_size=rows)
    return root


def read_samples(split: Split) -> list[Sample]:
    return [sample for shard in split.shards for sample in shard.read(None)]


def read_labelled_images(split: Split) -> list[tuple[str, bytes]]:
    return sorted((sample.class_id, sample.data) for sample in read_samples(split))


class TestParquetSource(SourceTests):
    @pytest.fixture
    def spec(self, tmp_path, pictures):
        return f"parquet:{write_tables(tmp_path / 'garments', pictures)}"

    @pytest.fixture
    def expected_samples(self, pictures):
        return group_samples_by_split(pictures)

    @pytest.fixture
    def damaged_spec_and_file_name(self, tmp_path, pictures):
        root = write_tables(tmp_path / "damaged", pictures)
        truncated = root / "data" / "train-00001-of-00002.parquet"
        truncated.write_bytes(truncated.read_bytes()[:-100])
        return f"parquet:{root}", truncated.name

    def test_a_hub_dataset_has_its_name_and_class_names(self, source):
        assert (source.name, source.class_ids) == ("garments", CLASS_NAMES)


class TestParquetSourceInABucket(SourceTests):
    @pytest.fixture
    def spec(self, tmp_path, pictures, s3_url):
        for file in (write_tables(tmp_path / "garments", pictures) / "data").iterdir():
            obstore.put(open_bucket(s3_url), file.name, file.read_bytes())
        return f"parquet:{s3_url}/*.parquet"

    @pytest.fixture
    def expected_samples(self, pictures):
        return group_samples_by_split(pictures)


def test_a_table_that_vanishes_from_a_bucket_is_named_in_the_error(tmp_path, pictures, s3_url):
    root = write_tables(tmp_path / "garments", pictures)
    for file in (root / "data").iterdir():
        obstore.put(open_bucket(s3_url), file.name, file.read_bytes())
    remote = open_source(f"parquet:{s3_url}/*.parquet")
    assert remote.labels is None
    obstore.delete(open_bucket(s3_url), "train-00000-of-00002.parquet")
    with pytest.raises(InputError, match=r"s3://.*/train-00000-of-00002.parquet vanished while"):
        read_samples(remote.train)


@pytest.mark.parametrize(
    ("rows", "shards"),
    [
        ([10, 10], [range(2)]),
        ([1024, 5], [range(1), range(1, 2)]),
        ([600, 600, 9], [range(2), range(2, 3)]),
        ([], []),
    ],
)
def test_small_row_groups_share_a_shard_and_large_ones_do_not(rows, shards):
    assert merge_row_groups_into_shard_ranges(rows) == shards


def test_repeated_class_names_are_used_for_display_only(tmp_path, pictures):
    root = write_tables(tmp_path / "g", pictures, names=["crane", "boot", "Crane "])
    source = open_source(f"parquet:{root}")
    assert source.class_ids == ["00000", "00001", "00002"]
    assert source.class_names == ["crane", "boot", "Crane "]


def test_a_class_list_names_the_numeric_labels_of_a_table(tmp_path, pictures, class_file):
    root = write_tables(tmp_path / "g", pictures, names=None)
    assert open_source(f"parquet:{root}").class_ids == ["00000", "00001", "00002"]
    named = open_source(f"parquet:{root}?names={class_file}")
    assert named.class_ids == CLASS_NAMES
    assert named.class_names == ["Handbag", "Ankle boot", "trouser"]


def write_splits_of_one_table(
    path: Path, image: pa.Array, label: pa.Array, names: tuple[str, str] = ("image", "label")
) -> str:
    """Write the same table as both splits of a dataset, and return its spec."""
    for split in ("train", "test"):
        pq.write_table(pa.table(dict(zip(names, (image, label), strict=True))), path / f"{split}.parquet")
    return f"parquet:{path}"


def test_plain_bytes_text_labels_and_renamed_columns_are_read(tmp_path):
    spec = write_splits_of_one_table(
        tmp_path, pa.array([b"1", b"2"]), pa.array(["cat", "dog"]), ("pixels", "animal")
    )
    with pytest.raises(
        InputError, match=r"no image column: choose one with \?image=NAME; there are pixels, animal"
    ):
        open_source(spec)
    source = open_source(f"{spec}?image=pixels&label=animal")
    assert read_labelled_images(source.test) == [("cat", b"1"), ("dog", b"2")]
    with pytest.raises(InputError, match="no label column kind"):
        open_source(f"{spec}?image=pixels&label=kind")


@pytest.mark.parametrize(
    ("image", "label", "complaint"),
    [
        (
            pa.array([b"1", None]),
            pa.array([0, 1]),
            r"row 1 of .*train.parquet holds no encoded image: found nothing",
        ),
        (
            pa.array([{"bytes": None, "path": "a.png"}] * 2, IMAGE_TYPE),
            pa.array([0, 1]),
            "found only the path a.png; embed the image files",
        ),
        (pa.array(["a.png", "b.png"]), pa.array([0, 1]), "found str"),
    ],
)
def test_a_row_without_an_image_is_named_in_the_error(tmp_path, image, label, complaint):
    source = open_source(write_splits_of_one_table(tmp_path, image, label))
    with pytest.raises(InputError, match=complaint):
        read_samples(source.train)


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (pa.array([0, -1]), "row 1 of .* has label -1, which marks unlabelled images"),
        (pa.array([0, None], pa.int64()), "row 1 of .* has no usable label: found None"),
        (pa.array([0.5, 1.5]), "no usable label: found 0.5"),
        (pa.array([0, 3]), "label 3, out of range"),
    ],
)
def test_unusable_labels_are_named_in_the_error_before_images_are_read(
    tmp_path, class_file, label, complaint
):
    with pytest.raises(InputError, match=complaint):
        open_source(
            write_splits_of_one_table(tmp_path, pa.array([b"1", b"2"]), label) + f"?names={class_file}"
        )


def test_damage_inside_a_table_is_named_in_the_error_when_it_is_read(tmp_path, pictures):
    root = write_tables(tmp_path / "g", pictures)
    source = open_source(f"parquet:{root}")
    first = sorted((root / "data").iterdir())[0]
    data, status = bytearray(first.read_bytes()), first.stat()
    data[4:400] = b"\xff" * 396
    first.write_bytes(data)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match=r"train-00000-of-00002.parquet is damaged"):
        read_samples(source.train)


def test_files_of_one_dataset_must_have_the_same_columns(tmp_path, pictures):
    root = write_tables(tmp_path / "g", pictures)
    pq.write_table(pa.table({"image": [b"1"]}), root / "data" / "train-00009.parquet")
    with pytest.raises(InputError, match=r"train-00009.parquet has no column label, unlike other files"):
        open_source(f"parquet:{root}")


def test_files_of_one_dataset_must_have_the_same_class_names(tmp_path, pictures):
    root, other = (
        write_tables(tmp_path / "a", pictures),
        write_tables(tmp_path / "b", pictures, CLASS_NAMES[::-1]),
    )
    with pytest.raises(InputError, match=r"validation-00000-of-00001.parquet has other class names than"):
        open_source(f"parquet:{root}/data/train-*.parquet?test={other}/data/validation-*.parquet")


def test_a_missing_pyarrow_error_says_what_to_install(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(InputError, match=r'needs pyarrow, .*pip install "sfm-distill\[parquet\]"'):
        open_source(f"parquet:{tmp_path}")


def make_label_metadata(**label: object) -> bytes:
    """Return metadata of the datasets library with a feature of labels."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", **label}}
    return json.dumps({"info": {"features": features}}).encode()


FOREIGN_METADATA = [
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'{"info": null}',
    b'{"info": {"features": ["image", "label"]}}',
    make_label_metadata(names={"0": "a"}),
    make_label_metadata(num_classes=3),
    make_label_metadata(names=[0, 1, 2]),
]


@pytest.mark.parametrize("metadata", FOREIGN_METADATA)
def test_unreadable_class_metadata_is_reported_and_labels_become_class_ids(
    tmp_path, pictures, class_file, metadata
):
    root = write_tables(tmp_path / "garments", pictures)
    for file in (root / "data").iterdir():
        pq.write_table(pq.read_table(file).replace_schema_metadata({b"huggingface": metadata}), file)
    source = open_source(f"parquet:{root}")
    assert source.class_ids == ["00000", "00001", "00002"]
    (note,) = source.inventory.notes
    assert "names no classes that can be read" in note
    assert "?names=LIST" in note
    named = open_source(f"parquet:{root}?names={class_file}")
    assert (named.class_ids, named.inventory.notes) == (CLASS_NAMES, ())


def test_metadata_of_other_programs_is_ignored(tmp_path, pictures):
    root = write_tables(tmp_path / "garments", pictures)
    for file in (root / "data").iterdir():
        pq.write_table(pq.read_table(file).replace_schema_metadata({b"pandas": b"{"}), file)
    assert open_source(f"parquet:{root}").inventory.notes == ()


def test_two_configurations_in_a_folder_are_refused(tmp_path, pictures):
    for config in ("full", "noisy"):
        write_tables(tmp_path / config, pictures)
    with pytest.raises(
        InputError, match=rf"several datasets, in full/data, noisy/data: .*{tmp_path}/full/data"
    ):
        open_source(f"parquet:{tmp_path}")
    assert open_source(f"parquet:{tmp_path}/full").class_ids == CLASS_NAMES


@pytest.mark.parametrize("unlabelled", ["-1", "none", "no column"])
def test_a_test_split_without_labels_is_skipped_for_validation(tmp_path, pictures, unlabelled):
    root = write_tables(tmp_path / "garments", pictures)
    table = pq.read_table(root / "data" / "validation-00000-of-00001.parquet")
    labels = pa.array([-1 if unlabelled == "-1" else None] * len(table), pa.int64())
    without = table.drop_columns(["label"])
    table = without if unlabelled == "no column" else without.append_column("label", labels)
    pq.write_table(table, root / "data" / "test-00000-of-00001.parquet")
    source = open_source(f"parquet:{root}")
    assert len(source.test.labels) == 36
    assert source.inventory.notes == ("held out is val: test has no labels (test-00000-of-00001.parquet)",)


def test_a_validation_split_without_labels_leaves_no_held_out_split(tmp_path, pictures):
    root = write_tables(tmp_path / "garments", pictures)
    path = root / "data" / "validation-00000-of-00001.parquet"
    table = pq.read_table(path)
    column = pa.array([-1] * len(table), pa.int64())
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", column), path)
    with pytest.raises(InputError, match=r"val has no labels \(validation-.*--hold-out 0\.1"):
        open_source(f"parquet:{root}")
    source = open_source(f"parquet:{root}", require_held_out=False)
    assert (source.test.shards, source.inventory.unused_by_kind) == ((), {"of val": 1})
    assert source.class_ids == CLASS_NAMES


def test_a_duplicate_column_is_named_in_the_error(tmp_path):
    image = pa.array([b"1", b"2"])
    table = pa.Table.from_arrays([image, pa.array([0, 1]), pa.array([0, 1])], ["image", "label", "label"])
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match="has several columns label: rename them"):
        open_source(f"parquet:{tmp_path}")


def write_tables_with_labels(root: Path, labels: pa.Array, pictures: Sequence) -> Path:
    """Write train.parquet and test.parquet with these labels, over and over."""
    root.mkdir()
    images = pa.array([{"bytes": p.data, "path": None} for p in pictures[: len(labels)]], IMAGE_TYPE)
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": labels}), root / f"{split}.parquet")
    return root


def test_labels_that_are_not_utf8_are_named_in_the_error(tmp_path, pictures, monkeypatch):
    labels = pa.array([b"\xe9t\xe9", b"b", b"\xe9t\xe9", b"b"]).view(pa.string())
    root = write_tables_with_labels(tmp_path / "d", labels, pictures)
    complaint = (
        r"(train|test)\.parquet holds text that is not UTF-8: b'\\xe9t\\xe9'; write its labels as UTF-8"
    )
    with pytest.raises(InputError, match=complaint):
        open_source(f"parquet:{root}")
    # On another machine, labels are only read in the pass.
    monkeypatch.setattr("sfm.pipeline.sources.parquet.is_remote_url", lambda url: True)
    with pytest.raises(InputError, match=complaint):
        read_samples(open_source(f"parquet:{root}").train)


@pytest.mark.parametrize(
    ("labels", "meaning"),
    [
        (pa.array([10_000, 10_001] * 2), ""),
        (pa.array(["10000", "10001"] * 2), "text is an id"),
        (pa.array(["7", "8"] * 2), "text is an id"),
    ],
)
def test_only_labels_of_digit_text_change_the_listing_digest(tmp_path, pictures, labels, meaning):
    root = write_tables_with_labels(tmp_path / "d", labels, pictures)
    files = digest_file_states(find_files_by_pattern(str(root / "train.parquet")))
    assert open_source(f"parquet:{root}").train.listing_digest == compute_digest(
        files, "image", "label", meaning
    )

"""The same image files in every kind of container are the same dataset; what is wrong with one is said."""

import json
from collections.abc import Sequence
from pathlib import Path

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from s3_server import open_bucket

from sfm.errors import InputError
from sfm.pipeline.extract import ExtractionResult, extract
from sfm.pipeline.extract_config import ExtractConfig


def filter_split(pictures: Sequence, split: str) -> list:
    return [picture for picture in pictures if picture.split == split]


def write_folder(root: Path, pictures: Sequence) -> str:
    for picture in pictures:
        folder = root / picture.split / picture.class_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{picture.number}.png").write_bytes(picture.data)
    return f"folder:{root}"


def write_shards(root: Path, pictures: Sequence, per_shard: int = 5) -> str:
    root.mkdir(parents=True)
    for split in ("train", "test"):
        with webdataset.ShardWriter(f"{root}/{split}-%03d.tar", maxcount=per_shard, verbose=0) as writer:
            for number, picture in enumerate(filter_split(pictures, split)):
                writer.write({"__key__": f"{number:05d}", "png": picture.data, "txt": picture.class_id})
    return f"wds:{root}"


def write_parquet(root: Path, pictures: Sequence) -> str:
    root.mkdir(parents=True)
    for split in ("train", "test"):
        own, ids = filter_split(pictures, split), sorted({picture.class_id for picture in pictures})
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ids}}
        table = pa.table(
            {
                "image": [{"bytes": picture.data, "path": None} for picture in own],
                "label": [ids.index(picture.class_id) for picture in own],
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=7)
    return f"parquet:{root}"


def upload_folder(root: Path, s3_url: str) -> str:
    for file in root.iterdir():
        obstore.put(open_bucket(s3_url), f"{root.name}/{file.name}", file.read_bytes())
    return f"{s3_url}/{root.name}"


def run_extraction(source: str, store: Path, **options: object) -> ExtractionResult:
    return extract(
        ExtractConfig(source=source, store=str(store), backbone=["lite0"], image_size=32, **options)
    )


@pytest.mark.slow
def test_folders_shards_and_tables_of_the_same_images_have_one_fingerprint(tmp_path, pictures, s3_url):
    write_shards(tmp_path / "shards", pictures)
    write_parquet(tmp_path / "tables", pictures)
    shards, tables = (upload_folder(tmp_path / name, s3_url) for name in ("shards", "tables"))
    sources = [
        write_folder(tmp_path / "folder", pictures),
        f"wds:{shards}",
        f"wds:{shards}/train-{{000..014}}.tar?test=test-{{000..007}}.tar",
        f"parquet:{tmp_path / 'tables'}",
        f"parquet:{tables}",
    ]
    done = [run_extraction(source, tmp_path / f"store-{i}") for i, source in enumerate(sources)]
    summaries = [one.published[0].summary for one in done]
    assert len({summary.fingerprint for summary in summaries}) == 1
    assert {summary.classes for summary in summaries} == {3}
    assert [one.pass_summary.images_read for one in done] == [108] * 5


@pytest.mark.parametrize("container", [write_folder, write_shards, write_parquet])
def test_a_class_subset_has_one_fingerprint_in_every_container(tmp_path, pictures, container):
    listed = tmp_path / "two.txt"
    listed.write_text("trouser\nbag\n")
    some = [picture for picture in pictures if picture.class_id != "boot"]
    part = run_extraction(f"{container(tmp_path / 'all', pictures)}?classes={listed}", tmp_path / "a")
    alone = run_extraction(write_folder(tmp_path / "some", some), tmp_path / "b")
    assert part.published[0].summary.fingerprint == alone.published[0].summary.fingerprint
    assert part.pass_summary.images_read == len(some)


@pytest.mark.parametrize("container", [write_folder, write_shards, write_parquet])
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda p: p.class_id != "boot" or p.split == "train", "boot"),
        (lambda p: p.class_id != "boot" or p.split == "test", "boot"),
        (lambda p: p.class_id == "bag", "fewer than two classes"),
    ],
    ids=["not held out", "held out only", "one class"],
)
def test_splits_with_mismatched_classes_are_refused(tmp_path, pictures, container, spoil, complaint):
    source = container(tmp_path / "data", [picture for picture in pictures if spoil(picture)])
    with pytest.raises(InputError, match=complaint):
        run_extraction(source, tmp_path / "store")


def test_a_broken_image_is_named_in_the_error_in_every_container(tmp_path, pictures):
    class Broken:
        split, class_id, number, data = "train", "bag", 99, b"\xff\xd8\xff not a JPEG"

    for container, location in (
        (write_folder, r"train/bag/99.png"),
        (write_shards, r"00072 in .*/train-014.tar"),
        (write_parquet, r"row 72 of .*/train-00000-of-00001.parquet"),
    ):
        source = container(tmp_path / container.__name__, [*pictures, Broken])
        with pytest.raises(InputError, match=f"cannot decode .*{location}"):
            run_extraction(source, tmp_path / "store")
        left = run_extraction(source, tmp_path / "store", on_error="skip")
        assert left.published[0].summary.train_samples == 72


def test_a_missing_or_truncated_shard_in_a_bucket_is_named_in_the_error(tmp_path, pictures, s3_url):
    write_shards(tmp_path / "shards", pictures)
    place = upload_folder(tmp_path / "shards", s3_url)
    whole = (tmp_path / "shards" / "train-003.tar").read_bytes()
    obstore.put(open_bucket(s3_url), "shards/train-003.tar", whole[:5000])
    with pytest.raises(InputError, match=r"s3://.*/train-003.tar is damaged, truncated"):
        run_extraction(f"wds:{place}", tmp_path / "store")
    obstore.delete(open_bucket(s3_url), "shards/train-003.tar")
    with pytest.raises(InputError, match=r"there is no file s3://.*/train-003.tar"):
        run_extraction(f"wds:{place}/train-{{000..014}}.tar?test=test-*.tar", tmp_path / "store")

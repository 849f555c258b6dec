"""WebDataset shards: written by the webdataset library, streamed back sample by sample."""

import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import obstore
import pytest
import webdataset
from peak_memory import peak_memory
from s3_server import open_bucket
from source_samples import group_samples_by_split

from sfm.errors import InputError
from sfm.pipeline.sources import open_source
from sfm.pipeline.sources.sample import Sample
from sfm.pipeline.sources.source import Shard, Split
from sfm.pipeline.sources.wds import open_wds_source
from sfm.testing import SourceTests


def write_shards(
    root: Path,
    pictures: Sequence,
    label: Callable[[object], dict[str, object]] = lambda picture: {"cls": picture.label},
    per_shard: int = 24,
) -> Path:
    """Write train-000000.tar … and test-000000.tar … as WebDataset's users do."""
    root.mkdir()
    for split in ("train", "test"):
        with webdataset.ShardWriter(f"{root}/{split}-%06d.tar", maxcount=per_shard, verbose=0) as writer:
            for picture in pictures:
                if picture.split == split:
                    key = f"{picture.class_id}_{picture.number:03d}"
                    writer.write({"__key__": key, "png": picture.data, **label(picture)})
    return root


def read_samples(split: Split) -> list[Sample]:
    return [sample for shard in split.shards for sample in shard.read(None)]


class TestWdsSource(SourceTests):
    @pytest.fixture
    def spec(self, tmp_path, pictures, class_file):
        return f"wds:{write_shards(tmp_path / 'garments', pictures)}?names={class_file}"

    @pytest.fixture
    def expected_samples(self, pictures):
        return group_samples_by_split(pictures)

    @pytest.fixture
    def damaged_spec_and_file_name(self, tmp_path, pictures):
        root = write_shards(tmp_path / "damaged", pictures)
        truncated = root / "train-000001.tar"
        truncated.write_bytes(truncated.read_bytes()[:5000])
        return f"wds:{root}", truncated.name


class TestWdsSourceInABucketWithoutNames(SourceTests):
    @pytest.fixture
    def spec(self, tmp_path, pictures, s3_url):
        for file in write_shards(tmp_path / "garments", pictures).iterdir():
            obstore.put(open_bucket(s3_url), file.name, file.read_bytes())
        return f"wds:{s3_url}/train-{{000000..000002}}.tar?test=test-*.tar"

    @pytest.fixture
    def expected_samples(self, pictures):
        samples = group_samples_by_split(pictures)
        ids = {"bag": "00000", "boot": "00001", "trouser": "00002"}
        return {split: [(ids[label], data) for label, data in own] for split, own in samples.items()}


@pytest.mark.parametrize(
    "label",
    [
        lambda picture: {"cls": picture.label},
        lambda picture: {"json": {"label": picture.label, "author": "someone"}},
        lambda picture: {"json": {"author": "someone"}, "txt": str(picture.label)},
        lambda picture: {"cls": picture.label, "txt": "a picture of a garment"},
    ],
    ids=["cls", "json", "txt", "cls and caption"],
)
def test_shards_written_by_the_webdataset_library_are_read_in_order(tmp_path, pictures, class_file, label):
    root = write_shards(tmp_path / "garments", pictures, label)
    source = open_wds_source(f"{root}?names={class_file}")
    assert source.name == "garments"
    assert source.class_ids == ["bag", "boot", "trouser"]
    assert source.class_names == ["Handbag", "Ankle boot", "trouser"]
    assert [len(list(shard.read(None))) for shard in source.train.shards] == [24, 24, 24]
    for split in ("train", "test"):
        expected = [(p.data, p.class_id) for p in pictures if p.split == split]
        assert [(s.data, s.class_id) for s in read_samples(source.splits[split])] == expected


def test_numeric_labels_without_names_are_zero_padded(tmp_path, pictures):
    source = open_wds_source(str(write_shards(tmp_path / "garments", pictures)))
    assert source.class_ids is None
    assert {sample.class_id for sample in read_samples(source.train)} == {"00000", "00001", "00002"}


def test_text_labels_are_class_ids(tmp_path, pictures):
    root = write_shards(tmp_path / "garments", pictures, lambda picture: {"txt": picture.class_id})
    assert {sample.class_id for sample in read_samples(open_wds_source(str(root)).test)} == {
        "bag",
        "boot",
        "trouser",
    }


def make_tar(*members: tuple[str, bytes]) -> bytes:
    """Return a tar archive of some members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


TAR_BYTES = make_tar(*((f"{i}.{kind}", b"7" * 700) for i in range(4) for kind in ("png", "cls")))


def open_train_shard(tmp_path: Path, data: bytes) -> Shard:
    """Return the training shard of a dataset of one shard per split."""
    tmp_path.mkdir(exist_ok=True)
    for name in ("train-0.tar", "test-0.tar"):
        (tmp_path / name).write_bytes(data)
    return open_wds_source(f"{tmp_path}/{{train,test}}-0.tar").train.shards[0]


def test_members_that_are_not_samples_are_skipped(tmp_path):
    data = make_tar(
        ("__meta__.json", b"{}"),
        ("README", b"about"),
        ("a/b.c/x.JPEG", b"image"),
        ("a/b.c/x.cls", b"4\n"),
        ("a/b.c/x.depth.png", b"depth"),
        ("a/b.c/._x.jpg", b"left by a file manager"),
        ("a/b.c/y.cls", b"5"),
        ("a/b.c/y.png", b"other"),
    )
    found = [(s.data, s.class_id, s.location) for s in open_train_shard(tmp_path, data).read(None)]
    location = f"in {tmp_path}/train-0.tar"
    assert found == [(b"image", "00004", f"a/b.c/x {location}"), (b"other", "00005", f"a/b.c/y {location}")]


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("x.png", b"1")], "x in .*train-0.tar has no label"),
        ([("x.cls", b"1")], "x in .*train-0.tar must have one image, found only .cls"),
        ([("x.png", b"1"), ("x.jpg", b"1"), ("x.cls", b"1")], "must have one image, found .png and .jpg"),
        ([("x.png", b"1"), ("x.png", b"2")], "holds x.png twice"),
        ([("x.png", b"1"), ("x.cls", b"-1")], "x in .* has label -1, which marks unlabelled images"),
        ([("x.png", b"1"), ("x.json", b"{")], "x in .* has a label that cannot be read"),
        (
            [("x.png", b"1"), ("x.json", json.dumps({"label": [1]}).encode())],
            "no usable label: found \\[1\\]",
        ),
        ([("x.png", b"1"), ("x.cls", b"\xff")], "x in .* has a label that cannot be read"),
        ([("x.png", b"1"), ("x.cls", b"")], "no usable label: found ''"),
    ],
)
def test_an_unusable_sample_is_named_in_the_error(tmp_path, members, complaint):
    with pytest.raises(InputError, match=complaint):
        list(open_train_shard(tmp_path, make_tar(*members)).read(None))


def read_labelled_images(shard: Shard) -> list[tuple[bytes, str]]:
    return [(sample.data, sample.class_id) for sample in shard.read(None)]


def test_members_without_a_sample_are_counted_by_kind(tmp_path):
    data = make_tar(
        ("__meta__.json", b"{}"),
        ("README", b"about"),
        ("x.png", b"image"),
        ("x.cls", b"4"),
        ("x.json", b"{}"),
        ("x.depth.png", b"depth"),
        ("x.npy", b"array"),
        ("._x.png", b"left by a file manager"),
        ("captions.v2.txt", b"all"),
    )
    shard = open_train_shard(tmp_path, data)
    expected = {
        "about the shard (__*)": 1,
        "without extension": 1,
        ".json": 1,
        ".depth.png": 1,
        ".npy": 1,
        "hidden": 1,
        ".txt": 1,
    }
    for _ in range(2):
        assert read_labelled_images(shard) == [(b"image", "00004")]
        assert dict(shard.unused_by_kind) == expected


def test_names_with_dots_are_split_at_the_last_dot_that_gives_pairs(tmp_path):
    """More of them in a row than are held back."""
    names = [f"a/0_v1.{i}" for i in range(40)] + ["1_plain", "1_v1.7"]
    data = make_tar(
        *((f"{name}.{kind}", f"{i}".encode()) for i, name in enumerate(names) for kind in ("png", "cls"))
    )
    shard = open_train_shard(tmp_path, data)
    assert read_labelled_images(shard) == [(f"{i}".encode(), f"{i:05d}") for i in range(42)]
    assert next(iter(shard.read(None))).location.startswith("a/0_v1.0 in ")
    assert not shard.unused_by_kind


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        (["0.rgb.png", "0.cls"], r"0 in .* must have one image, found \.cls, \.rgb\.png: name the image 0\."),
        (["0_v1.3.png"], r"0_v1\.3\.png in .*train-0\.tar cannot be paired"),
        (["0_v1.3.cls"], r"0_v1\.3\.cls in .*train-0\.tar cannot be paired"),
        (["0_v1.3.png", "0_v1.3.jpg", "0_v1.3.cls"], r"0_v1\.3\.png in .* cannot be paired"),
        (["0.heic", "0.cls"], r"0 in .* must have one image, found \.cls, \.heic"),
        (
            [*(f"0.{i}.{kind}" for i in range(17) for kind in ("png", "cls")), "0.png", "0.cls"],
            "0 in .* cannot tell which belong together",
        ),
    ],
)
def test_an_unpaired_image_or_label_stops_the_run_and_is_named_in_the_error(tmp_path, members, complaint):
    with pytest.raises(InputError, match=complaint):
        read_labelled_images(open_train_shard(tmp_path, make_tar(*((name, b"1") for name in members))))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_place_of_an_image_is_named_in_the_error(tmp_path, kind):
    """As tar writes for a file of two names, or a folder of links."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = kind, "y.png"
        archive.addfile(link)
    with pytest.raises(InputError, match=r"x\.png in .* is a link to y\.png: .*--hard-dereference"):
        read_labelled_images(open_train_shard(tmp_path, file.getvalue()))


def open_compressed_shard(tmp_path: Path, data: bytes, suffix: str = ".tar.gz") -> Shard:
    """Return the training shard of a dataset whose shards have names with a suffix."""
    for name in ("train-0", "val-0"):
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    return open_wds_source(str(tmp_path)).train.shards[0]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar"])
def test_gzip_compressed_shards_are_read(tmp_path, suffix):
    plain = read_labelled_images(open_train_shard(tmp_path / "plain", TAR_BYTES))
    folder = tmp_path / "zipped"
    folder.mkdir()
    assert read_labelled_images(open_compressed_shard(folder, gzip.compress(TAR_BYTES), suffix)) == plain
    # As pigz and split files make them: several streams behind one another.
    halves = gzip.compress(TAR_BYTES[:3000]) + gzip.compress(TAR_BYTES[3000:])
    assert read_labelled_images(open_compressed_shard(folder, halves, suffix)) == plain


def test_gzip_compressed_shards_in_a_bucket_are_read(s3_url):
    for name in ("train-0.tar.gz", "val-0.tar.gz"):
        obstore.put(open_bucket(s3_url), name, gzip.compress(TAR_BYTES))
    assert len(read_labelled_images(open_wds_source(s3_url).train.shards[0])) == 4
    source = open_wds_source(f"{s3_url}/train-0.tar.gz?test=val-0.tar.gz")
    assert (source.name, len(read_labelled_images(source.test.shards[0]))) == ("stats", 4)


GZIP_TAR_BYTES = gzip.compress(TAR_BYTES, mtime=0)


@pytest.mark.parametrize(
    "data",
    [
        GZIP_TAR_BYTES[:5],
        GZIP_TAR_BYTES[: len(GZIP_TAR_BYTES) // 2],
        GZIP_TAR_BYTES[:-4],
        GZIP_TAR_BYTES[:-8] + bytes(8),
        gzip.compress(b"<html>"),
    ],
    ids=["header", "half", "end", "checksum", "no tar"],
)
def test_a_damaged_gzip_shard_is_named_in_the_error(tmp_path, data):
    with pytest.raises(InputError, match=r"train-0\.tar\.gz is damaged, truncated or no tar archive"):
        read_labelled_images(open_compressed_shard(tmp_path, data))


def test_shards_with_unsupported_compression_are_named_in_the_error(tmp_path):
    with pytest.raises(InputError, match=r"train-0\.tar is compressed with xz: unpack it"):
        read_labelled_images(open_train_shard(tmp_path, lzma.compress(TAR_BYTES)))
    (tmp_path / "train-1.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match=r"train-1\.tar\.zst is compressed with something else than gzip"):
        open_wds_source(str(tmp_path))


def test_a_shard_present_with_and_without_gzip_is_refused(tmp_path):
    open_train_shard(tmp_path, TAR_BYTES)
    (tmp_path / "train-0.tar.gz").write_bytes(GZIP_TAR_BYTES)
    with pytest.raises(InputError, match=r"train-0\.tar and .*train-0\.tar\.gz are one shard"):
        open_wds_source(str(tmp_path))


UNLABELLED_MEMBERS = [[("x.png", b"1")], [("x.png", b"1"), ("x.cls", b"-1")], [("img.0.png", b"1")]]


@pytest.mark.parametrize("members", UNLABELLED_MEMBERS)
def test_an_unlabelled_test_split_is_skipped_for_val(tmp_path, members):
    (tmp_path / "test-0.tar").write_bytes(make_tar(*members))
    for name in ("train-0.tar", "val-0.tar"):
        (tmp_path / name).write_bytes(TAR_BYTES)
    source = open_wds_source(str(tmp_path))
    assert source.test.shards[0].location.endswith("val-0.tar")
    assert source.inventory.notes == ("held out is val: test has no labels (test-0.tar)",)
    assert source.inventory.unused_by_kind == {"of test": 1}


@pytest.mark.parametrize("members", UNLABELLED_MEMBERS)
@pytest.mark.parametrize("split", ["test", "val"])
def test_an_unlabelled_split_alone_leaves_no_held_out_split(tmp_path, split, members):
    (tmp_path / "train-0.tar").write_bytes(TAR_BYTES)
    (tmp_path / f"{split}-0.tar").write_bytes(make_tar(*members))
    source = open_source(f"wds:{tmp_path}", require_held_out=False)
    assert source.test.shards == ()
    assert source.inventory.notes == (f"{split} is not used: it has no labels ({split}-0.tar)",)
    assert source.inventory.unused_by_kind == {f"of {split}": 1}
    with pytest.raises(InputError, match=rf"{split} has no labels \({split}-0.tar\); .*--hold-out 0\.1"):
        open_source(f"wds:{tmp_path}")


def test_a_test_split_is_skipped_only_if_it_has_no_labels(tmp_path):
    """Not if it is damaged, its first shard alone has none, or it was chosen."""
    (tmp_path / "train-0.tar").write_bytes(TAR_BYTES)
    (tmp_path / "test-0.tar").write_bytes(make_tar(("x.png", b"1")))
    assert len(open_wds_source(f"{tmp_path}?test=test").test.shards) == 1
    (tmp_path / "test-1.tar").write_bytes(TAR_BYTES)
    assert len(open_wds_source(str(tmp_path)).test.shards) == 2
    (tmp_path / "test-0.tar").write_bytes(TAR_BYTES[:600])
    assert len(open_wds_source(str(tmp_path)).test.shards) == 2


@pytest.mark.parametrize(
    ("label", "complaint"),
    [("3", "label 3, out of range: .*garments.txt names 3"), ("boots", "did you mean boot")],
)
def test_a_label_missing_from_the_class_list_is_refused(tmp_path, class_file, label, complaint):
    data = make_tar(("x.png", b"1"), ("x.cls", label.encode()))
    for name in ("train-0.tar", "test-0.tar"):
        (tmp_path / name).write_bytes(data)
    source = open_wds_source(f"{tmp_path}?names={class_file}")
    with pytest.raises(InputError, match=complaint):
        read_samples(source.train)


@pytest.mark.parametrize("end", [0, 100, 512, 1000, 1536, 2048, 12_288])
def test_a_truncated_shard_is_named_in_the_error_wherever_it_ends(tmp_path, end):
    with pytest.raises(InputError, match=r"train-0.tar is damaged, truncated or no tar archive"):
        list(open_train_shard(tmp_path, TAR_BYTES[:end]).read(None))


@pytest.mark.parametrize("place", [0, 1536, 4608])
def test_a_damaged_header_is_not_taken_for_the_end_of_the_shard(tmp_path, place):
    spoilt = TAR_BYTES[:place] + b"\x55" * 512 + TAR_BYTES[place + 512 :]
    with pytest.raises(InputError, match=r"train-0.tar is damaged"):
        list(open_train_shard(tmp_path, spoilt).read(None))


def test_an_html_page_in_place_of_a_shard_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tar archive"):
        list(open_train_shard(tmp_path, b"<html>" * 1000).read(None))


def test_shards_that_vanish_from_a_bucket_are_named_in_the_error(tmp_path, pictures, s3_url):
    root = write_shards(tmp_path / "garments", pictures)
    for file in root.iterdir():
        obstore.put(open_bucket(s3_url), file.name, file.read_bytes())
    remote = open_wds_source(f"{s3_url}/train-{{000000..000002}}.tar?test=test-*.tar")
    assert remote.name == "stats"
    obstore.delete(open_bucket(s3_url), "train-000001.tar")
    with pytest.raises(InputError, match=r"there is no file s3://.*/train-000001.tar"):
        open_wds_source(f"{s3_url}/train-{{000000..000002}}.tar?test=test-*.tar")
    with pytest.raises(InputError, match=r"s3://.*/train-000001.tar vanished while the dataset was read"):
        read_samples(remote.train)


def test_shards_are_streamed_in_bounded_memory(tmp_path, s3_url):
    """Reading the first sample of a shard of 256 MB takes neither its memory nor its disk space."""
    big = 256 << 20
    data = make_tar(("a.png", b"1"), ("a.cls", b"1"), ("b.bin", bytes(big)), ("c.png", b"2"), ("c.cls", b"1"))
    for name in ("train-0.tar", "test-0.tar"):
        obstore.put(open_bucket(s3_url), name, data if name[1] == "r" else data[:10_240])
    del data
    shard = open_wds_source(s3_url).train.shards[0]
    with peak_memory() as growth:
        assert [sample.data for sample in shard.read(None)] == [b"1", b"2"]
    assert growth[0] < big // 4


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("?tests=x", "has no option tests: did you mean test="),
        ("?shuffle=3", "has no option shuffle: there are train, test, names, classes, background, white"),
        ("?names=garmints.txt", "no class list garmints.txt"),
        ("?names=imagenet1k", "did you mean imagenet-1k"),
        ("?test=", "has no value"),
        ("?test=a&test=b", "test is given twice"),
    ],
)
def test_an_unknown_option_error_gives_a_hint(tmp_path, query, complaint):
    with pytest.raises(InputError, match=complaint):
        open_wds_source(f"{tmp_path}{query}")

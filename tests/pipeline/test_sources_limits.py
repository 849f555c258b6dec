"""What is larger than any dataset holds is refused before memory is taken for it."""

import gzip
import io
import os
import re
import struct
import subprocess
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peak_memory import peak_memory
from PIL import Image

from sfm.errors import InputError
from sfm.pipeline.decoding import DecodingOptions, decode_batch
from sfm.pipeline.sources import limits, open_source, tar_members
from sfm.pipeline.sources import sample as sample_module
from sfm.pipeline.sources.data_files import find_files_by_pattern
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.sources.wds import iter_shard_samples

MIB = 2**20
TAR_END = bytes(1024)
LONG_NAME = "x" * 1001


def make_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def make_tar_member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def make_sparse_tar_member(name: str, size: int) -> bytes:
    """Return a sparse member of one block that claims to have `size` bytes."""
    header = bytearray(make_tar_member(name, bytes(512), tarfile.GNUTYPE_SPARSE)[:512])
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def make_tar_header(name: str, size: int) -> bytes:
    """Return the header of a member of `size` bytes, without content."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def make_pax_tar_member(name: str, **headers: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = 512, headers
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(512)


def read_shard(path: Path, content: bytes) -> list[Sample]:
    path.write_bytes(content)
    return list(iter_shard_samples(find_files_by_pattern(str(path))[0], None, Counter()))


LABEL_MEMBER = make_tar_member("0.cls", b"1")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (make_tar_header("0.bin", 2**70), "truncated .* ends within a member"),
        (make_tar_header("0.png", 2**70), "truncated .* ends within a member"),
        (make_tar_member(".", make_png()) + LABEL_MEMBER, "damaged, truncated"),
        (make_sparse_tar_member("0.png", 2**30) + LABEL_MEMBER, "0.png in .* is a sparse file"),
        (make_sparse_tar_member("0.png", 10 * 2**40) + LABEL_MEMBER, "0.png in .* is a sparse file"),
        (
            make_pax_tar_member("0.png", **{"GNU.sparse.size": str(2**30), "GNU.sparse.offset": "0"})
            + LABEL_MEMBER,
            "sparse file",
        ),
        (
            make_pax_tar_member("0.png", **{"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**30)})
            + LABEL_MEMBER,
            "sparse file",
        ),
        (
            b"".join(make_pax_tar_member("0.png", comment="x" * 900)[:1536] for _ in range(3000)),
            "damaged, truncated",
        ),
        (
            make_tar_member("0.png", make_png()) + make_tar_member("0.json", b"[" * 100_000),
            "label that cannot be read",
        ),
        (
            make_tar_member("0.png", make_png())
            + make_tar_member("0.json", b'{"label": ' + b"9" * 5000 + b"}"),
            "cannot be read",
        ),
        (
            make_tar_member("0.png", make_png())
            + make_tar_member("0.json", b'{"label": ' + b"9" * 500 + b"}"),
            "a label beyond",
        ),
        (
            make_tar_member("0.png", make_png()) + make_tar_member("0.json", b'{"label": 1e400}'),
            "no usable label: found inf",
        ),
        (
            make_tar_member("0.png", make_png()) + make_tar_member("0.json", b'{"label": NaN}'),
            "no usable label: found nan",
        ),
        (
            make_tar_member("0.png", make_png()) + make_tar_member("0.cls", LONG_NAME.encode()),
            "class name of 1,001 characters",
        ),
        (
            make_tar_member("0.png", make_png()) + make_tar_member("0.cls", b"9" * 5000),
            "class name of 5,000 characters",
        ),
        (
            make_tar_member("0.png", make_png()) + make_tar_member("0.txt", bytes(17 * MIB)),
            "0.txt in .* has 17,825,792 bytes",
        ),
        (make_tar_member("d/" + "x" * 5000 + ".png", make_png()), "a name of 5006 characters"),
    ],
)
def test_a_hostile_shard_raises_a_one_line_error_without_allocating_memory(tmp_path, content, complaint):
    with peak_memory() as growth, pytest.raises(InputError, match=complaint) as raised:
        read_shard(tmp_path / "a.tar", content + TAR_END)
    assert growth[0] < 64 * MIB
    assert re.fullmatch(r".{,1000}", str(raised.value))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_oversized_tar_headers_are_not_decompressed(tmp_path, kind):
    content = gzip.compress(make_tar_member("h", bytes(256 * MIB), kind), compresslevel=1)
    with peak_memory() as growth, pytest.raises(InputError, match="longer than 4,194,304 bytes"):
        read_shard(tmp_path / "a.tar.gz", content)
    assert growth[0] < 64 * MIB


def test_the_total_size_of_global_tar_headers_is_bounded(tmp_path):
    def everywhere(number: int) -> bytes:
        return tarfile.TarInfo.create_pax_global_header({f"k{number}": "x" * 900_000})

    content = b"".join(everywhere(i) + make_tar_member(f"{i}/", b"", tarfile.DIRTYPE) for i in range(6))
    with pytest.raises(InputError, match="global headers are longer"):
        read_shard(tmp_path / "a.tar", content + TAR_END)


def test_an_oversized_tar_member_counts_as_undecodable(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "MAX_IMAGE_BYTES", 1000)
    small = make_tar_member("1.png", make_png()) + make_tar_member("1.cls", b"1")
    large, found = read_shard(
        tmp_path / "a.tar", make_tar_member("0.png", bytes(1001)) + LABEL_MEMBER + small + TAR_END
    )
    assert (large.data, large.class_id, found.data) == (b"", "00001", make_png())
    wanted = DecodingOptions(preprocessings=(), on_error="skip")
    decoded = decode_batch([(0, large), (1, found)], decode_image, wanted)
    assert decoded.kept_indices_in_task == [1]
    assert [s.why for s in decoded.skipped] == ["1,001 bytes: more than 536,870,912 bytes are no image"]
    with pytest.raises(InputError, match=r"cannot decode 0 in .*a.tar: 1,001 bytes"):
        decode_batch([(0, large)], decode_image, DecodingOptions(preprocessings=()))


def test_a_huge_file_in_a_folder_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(10 * 2**40)
    with peak_memory() as growth:
        sample = next(prefetch_samples([SampleFile(str(tmp_path / "huge.png"), "a")]))
    assert sample.fault == "more than 536,870,912 bytes are no image"
    assert growth[0] < 64 * MIB


def test_large_files_are_not_read_ahead(tmp_path, monkeypatch):
    files = [SampleFile(str(tmp_path / f"{i}.png"), "a") for i in range(30)]
    for file in files:
        Path(file.location).write_bytes(bytes(8 * MIB + 1))
    with peak_memory() as growth:
        assert sum(len(sample.data) for sample in prefetch_samples(files)) == 30 * (8 * MIB + 1)
    assert growth[0] < 64 * MIB
    monkeypatch.setattr(sample_module, "MAX_PREFETCH_BYTES", 0)
    assert [sample.location for sample in prefetch_samples(files)] == [file.location for file in files]


def test_pipes_devices_and_circular_symlinks_do_not_block(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(make_png())
    folder = tmp_path / "train" / "a"
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "linked.png").symlink_to(folder / "pipe.png")
    (folder / "circle").symlink_to(folder)
    source = open_source(f"folder:{tmp_path}")
    assert np.bincount(source.train.labels).tolist() == [1, 1]
    assert source.inventory.unused_by_kind["neither file nor folder"] == 4
    with pytest.raises(InputError, match="not a regular file"):
        SampleFile(str(folder / "pipe.png"), "a").read()


def test_very_deep_folders_and_branching_symlinks_are_refused(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    here = os.open(tmp_path / "train" / "a", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        with pytest.raises(InputError, match="more than 100 folders deep"):
            open_source(f"folder:{tmp_path}")
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "train")], check=True)
    levels = [tmp_path / "train" / "a", *(tmp_path / f"level{n}" for n in range(12))]
    for folder, behind in pairwise(levels):
        folder.mkdir(parents=True, exist_ok=True)
        behind.mkdir()
        for name in range(6):
            (folder / str(name)).symlink_to(behind)
    with pytest.raises(InputError, match="in more than 100 ways"):
        open_source(f"folder:{tmp_path}")


def write_idx(path: Path, shape: tuple[int, ...], data: bytes, packed: bool = False) -> None:
    content = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape) + data
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("labels", "images"),
    [
        ((2**32 - 1,), (2, 4, 4)),
        ((2,), (2, 2**32 - 1, 2**32 - 1)),
        ((2,), (2, 0, 4)),
        ((2,), (2**32 - 1, 4, 4)),
    ],
)
def test_idx_headers_with_impossible_sizes_are_refused(tmp_path, labels, images, packed):
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels, b"\0\1", packed)
    write_idx(tmp_path / "train-images-idx3-ubyte", images, bytes(32), packed)
    with peak_memory() as growth, pytest.raises(InputError, match=r"ubyte(.gz)? promises .* bytes: at most"):
        open_source(f"idx:{tmp_path}", require_held_out=False)
    assert growth[0] < 64 * MIB


def write_table(root: Path, image: pa.Array, label: pa.Array, metadata: dict | None = None) -> str:
    table = pa.table({"image": image, "label": label}).replace_schema_metadata(metadata)
    for split in ("train", "test"):
        pq.write_table(table, root / f"{split}.parquet", compression="zstd")
    return f"parquet:{root}"


def test_repeated_images_of_a_table_are_in_memory_once(tmp_path):
    cell = bytes(8 * MIB)
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([cell]))
    source = open_source(write_table(tmp_path, image, pa.array([0, 1] * 100)))
    assert (tmp_path / "train.parquet").stat().st_size < MIB
    with peak_memory() as growth:
        assert sum(len(sample.data) == len(cell) for sample in source.train.shards[0].read(None)) == 200
    assert growth[0] < 128 * MIB


def test_repeated_labels_of_a_table_are_in_memory_once(tmp_path):
    text = "x" * 8 * MIB
    label = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 100, pa.int32()), pa.array([text, "b"]))
    with peak_memory() as growth, pytest.raises(InputError, match="class name of 8,388,608 characters"):
        open_source(write_table(tmp_path, pa.array([make_png()] * 200), label))
    assert growth[0] < 128 * MIB


def test_a_table_with_more_rows_than_bytes_is_refused(tmp_path):
    count = 2_000_000
    spec = write_table(
        tmp_path,
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([make_png()])),
        pa.array(np.zeros(count, np.int8)),
    )
    with peak_memory() as growth, pytest.raises(InputError, match="claims 2,000,000 rows in"):
        open_source(spec)
    assert growth[0] < 64 * MIB


@pytest.mark.parametrize(
    "metadata",
    [
        b"[" * 100_000,
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ' + b"[" * 100_000,
        b'{"info": ' + b"9" * 5000 + b"}",
    ],
)
def test_unparsable_table_metadata_is_ignored(tmp_path, metadata):
    spec = write_table(tmp_path, pa.array([make_png()] * 2), pa.array([0, 1]), {b"huggingface": metadata})
    assert open_source(spec).class_ids == ["00000", "00001"]


def test_list_columns_are_refused_as_images(tmp_path):
    source = open_source(write_table(tmp_path, pa.array([[[1]], [[2]]]), pa.array([0, 1])))
    with pytest.raises(InputError, match="holds no encoded image in image: found list"):
        list(source.train.shards[0].read(None))


def test_overlong_class_names_are_refused_where_they_are_listed(tmp_path, class_file):
    class_file.write_text(f"bag\n{LONG_NAME}\n")
    with pytest.raises(InputError, match=r"the class list .*garments.txt has a class name of 1,001"):
        open_source(f"builtin:fashion-mnist-6k?classes={class_file}")
    names = (
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "%s"]}}}}'
        % LONG_NAME.encode()
    )
    spec = write_table(tmp_path, pa.array([make_png()] * 2), pa.array([0, 1]), {b"huggingface": names})
    with pytest.raises(InputError, match=r"the metadata of .*train.parquet has a class name of 1,001"):
        open_source(spec)


def test_class_names_too_large_for_a_card_are_refused():
    ids = [f"{i:0900d}" for i in range(20_000)]
    with pytest.raises(InputError, match="20,000 classes, whose names take"):
        limits.require_class_names_within_limits(ids, None, "a dataset")
    limits.require_class_names_within_limits(
        [f"{i:06d}" for i in range(210_000)], None, "the largest dataset of landmarks"
    )


def test_a_huge_class_list_file_is_not_read(tmp_path):
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"huge.txt has 1099511627776 bytes"):
        open_source(f"builtin:fashion-mnist-6k?classes={tmp_path / 'huge.txt'}")

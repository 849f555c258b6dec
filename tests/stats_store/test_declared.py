"""Sizes of arrays are known from the cards of their entry: anything else is refused before it is read."""

import json
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from forged_entries import change_metadata, change_object, get_run_folder, rewrite_commit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_entries import (
    CLASSES,
    CLASSIFIER,
    FEATURES,
    TEST_SAMPLES,
    TRAIN_SAMPLES,
    make_backbone_card,
    publish_random_entry,
)
from zarr.storage import MemoryStore

from sfm.errors import DamageError
from sfm.stats_store.array_layouts import (
    ALLOWED_DTYPES,
    MAX_HIGH_RATIO_BYTES,
    ArrayLayout,
    compute_expected_shape,
    parse_array_layout,
    parse_layouts_by_path_and_problems,
)
from sfm.stats_store.cards import Commit, DatasetCard, ExtractionCard, ObjectRecord, Summary
from sfm.stats_store.commits import EntryCards
from sfm.stats_store.schema import DIMENSIONS, create_run_array, is_array_in_schema, strip_sub_class_suffix
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

NAMES = sorted(name + "_3" if "sub_class" in axes else name for name, axes in DIMENSIONS.items())
LARGE = 10**12
RUN = "a" * 32


@pytest.fixture(scope="module")
def original_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = open_or_create_store(str(tmp_path_factory.mktemp("original")))
    publish_random_entry(store, 1)
    return Path(store.url)


@pytest.fixture
def store(original_store: Path, tmp_path: Path) -> Store:
    return open_store(str(shutil.copytree(original_store, tmp_path / "store")))


def make_cards(train: int = TRAIN_SAMPLES, **options: Any) -> tuple[DatasetCard, ExtractionCard]:
    ids = [f"n{i}" for i in range(CLASSES)]
    dataset = DatasetCard(
        name="toy",
        class_ids=ids,
        class_names=ids,
        train_samples=train,
        test_samples=TEST_SAMPLES,
        fingerprint="f" * 64,
        leaves=["f" * 64],
    )
    extraction = ExtractionCard(
        options=options, role="full", versions={}, device="cpu", threads=1, seconds=0.0, images_per_second=0.0
    )
    return dataset, extraction


def list_damage_messages(store: Store, summary: Summary) -> list[str]:
    """Return why an entry cannot be opened, and what `verify_entries` says of it."""
    with pytest.raises(DamageError) as error:
        store.open_entry(summary)
    problems = verify_entries(store)[0].problems
    return [str(error.value), *problems]


@pytest.mark.parametrize("name", NAMES)
def test_expected_shape_of_every_schema_array_follows_from_the_cards(name: str) -> None:
    sizes = {
        "class": CLASSES,
        "feature": FEATURES,
        "feature_b": FEATURES,
        "sub_class": 3,
        "sample": TEST_SAMPLES if name.startswith("test/") else TRAIN_SAMPLES,
        "exemplar": 7,
        "y": 96,
        "x": 96,
        "channel": 3,
    }
    expected = tuple(sizes[axis] for axis in DIMENSIONS[strip_sub_class_suffix(name)])
    assert is_array_in_schema(name)
    assert (
        compute_expected_shape(name, make_backbone_card(), make_cards()[0], exemplars_per_class=7) == expected
    )


@pytest.mark.parametrize(
    "name", ["train/centre", "train/count_5", "train/centre_0", "train/centre_05", "train/centre_5_5", ""]
)
def test_malformed_array_name_is_not_in_the_schema(name: str) -> None:
    assert not is_array_in_schema(name)


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=40, deadline=None)
def test_layout_parsed_from_written_metadata_matches_the_array(name: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 9)) for _ in DIMENSIONS[strip_sub_class_suffix(name)])
    dtype = np.dtype(data.draw(st.sampled_from(ALLOWED_DTYPES[strip_sub_class_suffix(name)])))
    objects = MemoryStore()
    array = create_run_array(objects, RUN, name, shape, dtype)
    array[...] = data.draw(st.sampled_from([0, 7])) * np.ones(shape, dtype)
    written = {path: value.to_bytes() for path, value in objects._store_dict.items()}
    layout = parse_array_layout(written[f"runs/{RUN}/{name}/zarr.json"])
    assert layout == ArrayLayout(shape, array.chunks, dtype, uses_blosc=True, uses_crc32c=True)
    assert layout.nbytes == array.nbytes
    chunks = {p: d for p, d in written.items() if not p.endswith("zarr.json")}
    assert sorted(chunks) == sorted(f"runs/{RUN}/{name}/{key}" for key in layout.iterate_chunk_keys())
    assert [layout.find_encoded_chunk_size_problem(chunk) for chunk in chunks.values()] == [None] * len(
        chunks
    )


def set_shape(*shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update(shape=list(shape))


def set_chunks(*shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata["chunk_grid"]["configuration"].update(chunk_shape=list(shape))


def set_fields(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update(fields)


SHARDS = {"name": "sharding_indexed", "configuration": {"chunk_shape": [4, 6], "codecs": [{"name": "bytes"}]}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_shape(LARGE, FEATURES), r"shape \(1000000000000, 6\), by the cards of its entry \(4, 6\)"),
        (set_shape(CLASSES, FEATURES + 1), r"shape \(4, 7\), by the cards"),
        (set_shape(CLASSES), "its chunk_grid cannot be those of a published array"),
        (set_shape(-1, FEATURES), "its shape cannot"),
        (set_shape(*[1] * 1000), "its shape and chunk_grid cannot"),
        (set_shape(2**70, FEATURES), "its shape cannot"),
        (set_fields(shape=[4.0, 6]), r"shape.0: input should be a valid integer"),
        (set_fields(shape={"4": 6}), "shape: input should be a valid list"),
        (set_fields(data_type="float32"), "type float32, not float64"),
        (set_fields(data_type="string"), "its data_type cannot"),
        (set_chunks(0, 6), r"chunks of \(0, 6\) do not divide \(4, 6\)"),
        (set_chunks(2**40, 6), "do not divide"),
        (set_chunks(1, 6), "missing object .*/train/mean/c/1/0: the commit does not list it"),
        (set_fields(chunk_grid={"name": "regular"}), "chunk_shape: input should be a valid list"),
        (set_fields(chunk_grid={"name": "rectangular"}), "chunk_shape: "),
        (set_fields(chunk_key_encoding={"name": "v2"}), "its chunk_key_encoding cannot"),
        (
            set_fields(chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}),
            "its chunk_key_encoding cannot",
        ),
        (set_fields(codecs=[SHARDS]), "its codecs cannot"),
        (set_fields(codecs=[{"name": "bytes"}, {"name": "gzip"}]), "its codecs cannot"),
        (set_fields(codecs=[]), "its codecs cannot"),
        (set_fields(codecs=[{"name": "bytes"}] * 1000), "its codecs cannot"),
        (set_fields(fill_value="0x7fc00000"), "its fill_value cannot"),
        (set_fields(storage_transformers=[{"name": "x"}]), "its storage_transformers cannot"),
        (set_fields(zarr_format=2), "its zarr_format cannot"),
        (set_fields(node_type="group"), "its node_type cannot"),
    ],
)
def test_array_metadata_contradicting_the_cards_is_damage_at_open_and_in_verify(
    store: Store, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    (summary,) = store.list_summaries()
    change_metadata(store, summary, "train/mean", change)
    run = f"runs/{store.read_entry_commit(summary).run}"
    for line in list_damage_messages(store, summary):
        assert line.startswith((f"damaged object {run}/train/mean/zarr.json: ", "missing object"))
        assert re.search(reason, line), line


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"[" * 100_000, b'{"shape": 1e400}', b"\xff", b"{" * 9]
)
def test_array_metadata_that_is_not_a_json_object_is_damage(store: Store, data: bytes) -> None:
    (summary,) = store.list_summaries()
    change_object(store, summary, "train/mean/zarr.json", data)
    assert all("/train/mean/zarr.json: " in line for line in list_damage_messages(store, summary))


def test_array_metadata_missing_from_the_commit_is_damage(store: Store) -> None:
    (summary,) = store.list_summaries()
    rewrite_commit(store, summary, lambda content: content["objects"].pop("train/mean/zarr.json"))
    with pytest.raises(DamageError, match="train/mean"):
        store.open_entry(summary)
    assert "train/mean" in verify_entries(store)[0].problems[0]


def test_extra_chunk_in_the_commit_is_damage(store: Store) -> None:
    (summary,) = store.list_summaries()
    change_object(store, summary, "train/mean/c/7/7", b"chunk")
    assert all("the commit lists 2 chunks, it has 1" in line for line in list_damage_messages(store, summary))


def test_oversized_chunk_record_is_damage_and_the_chunk_is_not_read(store: Store) -> None:
    (summary,) = store.list_summaries()
    huge = {"size": 2**30, "sha256": "0" * 64}
    rewrite_commit(store, summary, lambda content: content["objects"].update({"train/mean/c/0/0": huge}))
    first, *more = list_damage_messages(store, summary)
    assert "/train/mean/c/0/0: 1073741824 bytes, a chunk has at most" in first
    assert any("1073741824" in line for line in more)


def test_object_larger_than_recorded_is_not_read_into_memory(store: Store) -> None:
    (summary,) = store.list_summaries()
    entry = store.open_entry(summary)
    with (get_run_folder(store, summary) / "train/mean/c/0/0").open("r+b") as chunk:
        chunk.truncate(2**30)  # sparse
    tracemalloc.start()
    with pytest.raises(DamageError, match=r"1073741824 bytes, at most \d+ are read"):
        entry.read_array("train/mean")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def find_layout_problems(samples: int, chunk_size: int) -> list[str]:
    """Return what is wrong with training features whose chunks have so many bytes each."""
    shape, chunk_shape = (samples, FEATURES), (4096, FEATURES)
    metadata = {
        "node_type": "array",
        "zarr_format": 3,
        "shape": shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes"}, {"name": "blosc"}, {"name": "crc32c"}],
    }
    dataset, extraction = make_cards(train=samples)
    record = ObjectRecord(size=chunk_size, sha256="0" * 64)
    names = ["train/feature/zarr.json", *(f"train/feature/c/{row}/0" for row in range(-(-samples // 4096)))]
    commit = Commit(
        kind="entry", run=RUN, arrays={"train/feature": "0" * 64}, objects=dict.fromkeys(names, record)
    )
    documents = {f"runs/{RUN}/train/feature/zarr.json": json.dumps(metadata).encode()}
    return parse_layouts_by_path_and_problems(
        commit, EntryCards(make_backbone_card(), dataset, extraction, CLASSIFIER), documents
    )[1]


def test_extreme_compression_ratio_of_a_large_array_is_damage() -> None:
    samples = MAX_HIGH_RATIO_BYTES // (4 * FEATURES)
    assert find_layout_problems(samples - 4096, chunk_size=50) == []
    assert find_layout_problems(10 * samples, chunk_size=50_000) == []
    (problem,) = find_layout_problems(samples + 4096, chunk_size=50)
    assert "compressed more than 1000 times" in problem


def test_exemplar_arrays_must_match_the_options_and_each_other() -> None:
    dataset, extraction = make_cards(exemplars=5)
    objects = MemoryStore()
    for name, shape in (("exemplar/role", (CLASSES, 2)), ("exemplar/sample", (CLASSES, 5))):
        create_run_array(objects, RUN, name, shape, np.dtype(ALLOWED_DTYPES[name][0]))[...] = 0
    written = {path: value.to_bytes() for path, value in objects._store_dict.items()}
    listed = {
        p.removeprefix(f"runs/{RUN}/"): ObjectRecord(size=len(d), sha256="0" * 64) for p, d in written.items()
    }
    arrays = dict.fromkeys(("exemplar/role", "exemplar/sample"), "0" * 64)
    commit = Commit(kind="entry", run=RUN, arrays=arrays, objects=listed)
    (problem,) = parse_layouts_by_path_and_problems(
        commit, EntryCards(make_backbone_card(), dataset, extraction, CLASSIFIER), written
    )[1]
    assert "exemplar/role/zarr.json: shape (4, 2), by the cards of its entry (4, 5)" in problem
    _, silent = make_cards()
    (problem,) = parse_layouts_by_path_and_problems(
        commit, EntryCards(make_backbone_card(), dataset, silent, CLASSIFIER), written
    )[1]
    assert problem == f"damaged run runs/{RUN}: its exemplar arrays have different lengths"


def append_crc(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def write_chunk_and_get_error(store: Store, data: bytes) -> str:
    """Write the chunk of ``test/feature``, vouched for; return why it cannot be read."""
    (summary,) = store.list_summaries()
    change_object(store, summary, "test/feature/c/0/0", append_crc(data))
    with pytest.raises(DamageError) as error:
        store.open_entry(summary).read_array("test/feature")
    assert any("test/feature" in line for line in verify_entries(store)[0].problems)
    return str(error.value)


def read_chunk_without_crc(store: Store) -> bytes:
    (summary,) = store.list_summaries()
    return (get_run_folder(store, summary) / "test/feature/c/0/0").read_bytes()[:-4]


def test_invalid_blosc_header_is_damage_before_decompression(store: Store) -> None:
    chunk = bytearray(read_chunk_without_crc(store))
    struct.pack_into("<I", chunk, 4, 2**31 - 1)
    assert "it would decompress to 2147483647 bytes, a chunk has 49152" in write_chunk_and_get_error(
        store, bytes(chunk)
    )
    struct.pack_into("<II", chunk, 4, 49152, 2**31 - 1)
    assert "its header is not that of compressed data" in write_chunk_and_get_error(store, bytes(chunk))
    assert "it is too short to be compressed" in write_chunk_and_get_error(store, b"")


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), min_size=1, max_size=9))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
def test_chunk_with_changed_bytes_is_read_or_raises_damage_error(
    original_store: Path, changes: list[tuple[int, int]]
) -> None:
    store = open_store(str(original_store))
    chunk = bytearray(read_chunk_without_crc(store))
    before = bytes(chunk)
    for place, change in changes:
        chunk[place] ^= change
    (summary,) = store.list_summaries()
    try:
        change_object(store, summary, "test/feature/c/0/0", append_crc(bytes(chunk)))
        store.open_entry(summary).read_array("test/feature")
    except DamageError as error:
        assert "test/feature" in str(error)  # noqa: PT017
    finally:
        change_object(store, summary, "test/feature/c/0/0", append_crc(before))

"""The staging folder: masks and blocks, damaged files, links, and concurrent extractions."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import peak_memory

from sfm.deletion import DeletionThroughLinkError
from sfm.errors import InputError
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.row_files import has_finite_rows, read_validated_rows
from sfm.pipeline.staged_features import StagedPartition
from sfm.pipeline.staging import Staging, open_staging_and_delete_on_success
from sfm.pipeline.task_results import TaskResult
from sfm.stats_store.digests import BLOCK_ROWS


def stage_random_rows(tmp_path, sizes, rng):
    staging, parts, rows = Staging(tmp_path), [], []
    for number, size in enumerate(sizes):
        labels = rng.integers(0, 3, size).astype(np.int32)
        partition = StagedPartition("train", number, np.arange(size), labels)
        rows.append(rng.standard_normal((size, 2)).astype(np.float32))
        staging.write_array("backbone", partition, rows[-1])
        parts.append(partition)
    return (
        staging.open_features("backbone", parts),
        np.concatenate(rows),
        np.concatenate([p.labels for p in parts]),
    )


@given(st.integers(0, 2**32))
def test_nested_masks_select_rows_as_array_indexing_does(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    whole, rows, labels = stage_random_rows(tmp_path_factory.mktemp("s"), [5, 3, 4], rng)
    first = rng.random(12) < 0.6
    second = rng.random(int(first.sum())) < 0.6
    chosen = whole.select_rows(first).select_rows(second)
    np.testing.assert_array_equal(chosen.concatenate_labels(), labels[first][second])
    got = [features for features, _ in chosen]
    np.testing.assert_array_equal(np.concatenate([np.zeros((0, 2)), *got]), rows[first][second])


def test_all_blocks_but_the_last_are_full(tmp_path):
    rng = np.random.default_rng(0)
    whole, rows, _ = stage_random_rows(tmp_path, [BLOCK_ROWS, BLOCK_ROWS, 10], rng)
    keep = rng.random(len(rows)) < 0.7
    blocks = list(whole.select_rows(keep).iterate_feature_blocks(np.float32))
    assert [len(b) for b in blocks[:-1]] == [BLOCK_ROWS] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks), rows[keep])


def test_a_partially_written_array_is_not_valid(tmp_path):
    staging = Staging(tmp_path)
    partition = StagedPartition("train", 0, np.arange(2), np.zeros(2, dtype=np.int32))
    staging.write_array("backbone", partition, np.ones((2, 2)))
    assert staging.has_valid_array("backbone", partition, np.float64, 2, (2,))
    file = staging.array_path("backbone", partition)
    file.rename(file.with_suffix(".part"))
    assert not staging.has_valid_array("backbone", partition, np.float64, 2, (2,))


def test_concurrent_extractions_of_one_key_use_separate_staging_and_clean_up(tmp_path):
    with (
        open_staging_and_delete_on_success(tmp_path, "key") as first,
        open_staging_and_delete_on_success(tmp_path, "key") as second,
    ):
        assert first.root != second.root
        assert second.root.is_dir()
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_failed_extraction_keeps_its_staging(tmp_path):
    try:
        with open_staging_and_delete_on_success(tmp_path, "key") as staging:
            (staging.root / "work").write_text("half")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    with open_staging_and_delete_on_success(tmp_path, "key") as again:
        assert (again.root / "work").read_text() == "half"


def make_npy_header(shape: str, dtype: str = "<f4") -> bytes:
    """The beginning of an NPY file, as anybody may write it."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        make_npy_header("(3, 2)")[:40],
        make_npy_header("(3, 2)") + bytes(23),
        make_npy_header("(3, 2)") + bytes(25),
        make_npy_header("(3, 1000000000000)") + bytes(24),
        make_npy_header("(2, 3)") + bytes(24),
        make_npy_header("(6,)") + bytes(24),
        make_npy_header("(-3, -2)") + bytes(24),
        make_npy_header("(3, 2)", "<i4") + bytes(24),
        make_npy_header("(3, 2)", "|O") + b"cos\nsystem\n(S'touch pwned'\ntR.",
        make_npy_header("((((((((((3,),),),),),),),),),2)") + bytes(24),
        make_npy_header("(3, 2") + bytes(24),
        make_npy_header("(3, 2)") + np.float32([1, 2, np.nan, 4, 5, 6]).tobytes(),
        make_npy_header("(3, 2)") + np.float32([1, 2, np.inf, 4, 5, 6]).tobytes(),
    ],
)
def test_invalid_row_files_are_not_valid_and_take_no_memory(tmp_path, content):
    (tmp_path / "rows.npy").write_bytes(content)
    with peak_memory() as growth:
        assert not has_finite_rows(tmp_path / "rows.npy", np.float32, 3, (2,))
    assert growth[0] < 2**24
    (tmp_path / "sound.npy").write_bytes(make_npy_header("(3, 2)") + np.arange(6, dtype=np.float32).tobytes())
    assert has_finite_rows(tmp_path / "sound.npy", np.float32, 3, (2,))


def test_missing_row_files_and_pipes_raise_an_input_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("pipe", "gone"):
        with pytest.raises(InputError, match=f"{name}.npy is damaged or gone: run again"):
            read_validated_rows(tmp_path / f"{name}.npy", np.float32, 3)


VALID_RESULT = {"read": 3, "kept": [0, 2], "skipped": [{"place": 1, "where": "b.png", "why": "it is empty"}]}


@pytest.mark.parametrize(
    "change",
    [
        {"read": 2},
        {"read": 10**12},
        {"read": -1},
        {"read": "3"},
        {"kept": [0, 3]},
        {"kept": [2, 0]},
        {"kept": [0, 1]},
        {"kept": [0, 10**30]},
        {"kept": [-1, 2]},
        {"kept": None},
        {"skipped": [{}]},
        {"labels": [0, 0, 0]},
        {"classes": ["a"], "labels": [0, 0, 1]},
        {"classes": ["a"], "labels": [0, 0, -1]},
        {"classes": ["x" * 1001], "labels": [0, 0, 0]},
        {"classes": ["a", "a"], "labels": [0, 0, 1]},
        {"marked": {"dark": [7]}, "examples": {"dark": "b.png"}},
        {"marked": {"dark": [0]}},
        {"marked": {"bright": [0]}, "examples": {"bright": "b.png"}},
        {"unused": {"a": -1}},
    ],
)
def test_task_results_with_invalid_values_are_ignored(tmp_path, change):
    staging = Staging(tmp_path)
    known = PartitionTask("train", 0, np.arange(3))
    task = known if "classes" not in change else PartitionTask("train", 0, None)
    (tmp_path / "found").mkdir()
    sound = {**VALID_RESULT, "classes": [], "labels": []}
    staging.result_path(known).write_text(json.dumps(sound))
    assert isinstance(staging.read_result(known), TaskResult)
    staging.result_path(task).write_text(json.dumps({**sound, **change}))
    assert staging.read_result(task) is None


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"{}", b"[]", b"\xff", b'{"read": ' + b"9" * 5000 + b"}"]
)
def test_task_results_that_cannot_be_parsed_are_ignored(tmp_path, content):
    task = PartitionTask("train", 0, np.arange(3))
    (tmp_path / "found").mkdir()
    Staging(tmp_path).result_path(task).write_bytes(content)
    assert Staging(tmp_path).read_result(task) is None


@pytest.mark.parametrize("inside", ["", "backbone"])
def test_a_symlinked_staging_folder_is_left_unchanged_and_another_is_used(tmp_path, inside):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "train-000000.npy").write_bytes(b"mine")
    link = tmp_path / "staging" / "key" / inside
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    with open_staging_and_delete_on_success(tmp_path / "staging", "key") as staging:
        assert staging.root.name.startswith("key-")
        staging.write_array(
            "backbone", StagedPartition("train", 0, np.arange(1), np.zeros(1, np.int32)), np.zeros((1, 2))
        )
        staging.delete_task_files(PartitionTask("train", 0, None))
        assert not list(staging.root.rglob("*.npy"))
    assert (victim / "train-000000.npy").read_bytes() == b"mine"
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["key"]


def test_staged_files_are_not_deleted_through_a_later_symlink(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "train-000000.npy").write_bytes(b"mine")
    with open_staging_and_delete_on_success(tmp_path / "staging", "key") as staging:
        (staging.root / "backbone").symlink_to(victim)
        with pytest.raises(DeletionThroughLinkError):
            staging.delete_task_files(PartitionTask("train", 0, None))
    assert (victim / "train-000000.npy").read_bytes() == b"mine"
    assert list((tmp_path / "staging").iterdir()) == []

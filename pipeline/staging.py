"""The staging folder: finished partitions on disk, so that a killed extraction can be resumed.

Files are written atomically; temporary files of killed processes are overwritten by the next one.
"""

import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sfm.atomic import atomic_open
from sfm.deletion import delete_without_following_links
from sfm.errors import InputError
from sfm.locking import acquire_file_lock
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.row_files import has_finite_rows, read_validated_rows, write_rows
from sfm.pipeline.staged_features import StagedFeatures, StagedPartition
from sfm.pipeline.task_results import (
    MAX_TASK_RESULT_BYTES,
    TASK_RESULT_ADAPTER,
    TaskResult,
    is_plausible_result,
)
from sfm.stats_store.local_files import copy_permissions
from sfm.text import escape_non_utf8_in_json
from sfm.untrusted_files import read_bounded_file


class IncompleteExtractionError(Exception):
    """The extraction stopped early; finished partitions are staged, and the same command resumes."""


@dataclass(frozen=True)
class Staging:
    """The folder that holds the partitions of one extraction: arrays by name, and results of tasks."""

    root: Path

    def array_path(self, array_name: str, partition: PartitionTask | StagedPartition) -> Path:
        """Return the file of an array (``digests``, ``sizes``, or a feature array) of a partition."""
        return self.root / array_name / f"{partition.name}.npy"

    def has_valid_array(
        self,
        array_name: str,
        partition: PartitionTask | StagedPartition,
        dtype: npt.DTypeLike,
        row_count: int,
        row_shape: tuple[int, ...],
    ) -> bool:
        """Return whether an array is complete and valid: the folder may be shared with others."""
        return has_finite_rows(self.array_path(array_name, partition), dtype, row_count, row_shape)

    def write_array(
        self, array_name: str, partition: PartitionTask | StagedPartition, rows: npt.NDArray[Any]
    ) -> None:
        """Write an array atomically."""
        with atomic_staged_file(self.array_path(array_name, partition)) as file:
            write_rows(file, rows)

    def read_encoded_bytes_per_sample(self, partition: StagedPartition) -> npt.NDArray[np.int64]:
        """Return the encoded bytes of the samples of a partition."""
        return read_validated_rows(self.array_path("sizes", partition), np.int64, len(partition.labels), ())

    def read_digests(self, partition: StagedPartition) -> npt.NDArray[np.uint8]:
        """Return the sample digests of a partition, shape (n, 32)."""
        return read_validated_rows(
            self.array_path("digests", partition), np.uint8, len(partition.labels), (32,)
        )

    def differs_from_staged_digests(self, task: PartitionTask, digests: npt.NDArray[np.uint8]) -> bool:
        """Return whether an earlier, complete pass over a task read other samples than these."""
        result, file = self.read_result(task), self.array_path("digests", task)
        if result is None or not has_finite_rows(file, np.uint8, len(result.kept), (32,)):
            return False
        return not np.array_equal(read_validated_rows(file, np.uint8, len(result.kept), (32,)), digests)

    def result_path(self, task: PartitionTask) -> Path:
        """Return the file of a task's result."""
        return self.root / "found" / f"{task.name}.json"

    def write_result(self, task: PartitionTask, result: TaskResult) -> None:
        """Write a task's result atomically; it is written after the arrays, so it marks a complete task."""
        with atomic_staged_file(self.result_path(task)) as file:
            file.write(json.dumps(escape_non_utf8_in_json(dataclasses.asdict(result))).encode())

    def read_result(self, task: PartitionTask) -> TaskResult | None:
        """Return a task's result; None if the task is not complete, or the file is damaged."""
        try:
            data = read_bounded_file(self.result_path(task), MAX_TASK_RESULT_BYTES)
            result = TASK_RESULT_ADAPTER.validate_json(data, strict=True)
            return result if is_plausible_result(result, task) else None
        except (OSError, ValueError, OverflowError):
            return None

    def delete_task_files(self, task: PartitionTask) -> None:
        """Delete the staged files of a task."""
        delete_without_following_links(self.root, f"found/{self.result_path(task).name}")
        for file in self.root.glob(f"*/{task.name}.npy"):
            delete_without_following_links(self.root, file.relative_to(self.root))

    def open_features(self, array_name: str, partitions: Sequence[StagedPartition]) -> StagedFeatures:
        """Return a feature array of several partitions as one sequence of rows."""
        return StagedFeatures(
            tuple(self.array_path(array_name, partition) for partition in partitions),
            tuple(partition.labels for partition in partitions),
        )


@contextmanager
def atomic_staged_file(file: Path) -> Iterator[IO[bytes]]:
    """Open a file of the staging folder for an atomic write.

    Two workers may write the same file, when one is presumed dead: each has its own temporary file.
    """
    # Without parents: a worker presumed dead must not recreate a deleted folder.
    file.parent.mkdir(exist_ok=True)
    copy_permissions(file.parent, reference_folder=file.parent.parent)
    temporary = file.with_name(f"{file.stem}-{uuid.uuid4().hex[:8]}.part")
    with atomic_open(file, temporary) as out:
        copy_permissions(temporary, reference_folder=file.parent)
        yield out


@contextmanager
def open_staging_and_delete_on_success(
    parent_folder: Path, staging_key: str, permission_reference_folder: Path | None = None
) -> Iterator[Staging]:
    """Lock the staging folder of an extraction; it is deleted on success and kept on failure.

    A second process with the same key gets another folder: both extract, and the store decides which one
    publishes.

    Parameters
    ----------
    parent_folder : Path
        Parent of all staging folders.
    staging_key : str
        Equal for extractions that would compute the same features.
    permission_reference_folder : Path, optional
        A folder whose permissions all staged files get: the store's, if work is staged there, so that
        another member of a team can resume or collect it.

    Raises
    ------
    InputError
        If the folder is not writable.
    """
    with explained_staging_errors(parent_folder):
        parent_folder.mkdir(parents=True, exist_ok=True)
    if permission_reference_folder:
        copy_permissions(parent_folder, permission_reference_folder)
    with try_lock_staging(parent_folder / f"{staging_key}.lock") as locked:
        root = parent_folder / (
            staging_key
            if locked and is_absent_or_usable_folder(parent_folder / staging_key)
            else f"{staging_key}-{uuid.uuid4().hex[:8]}"
        )
        with explained_staging_errors(parent_folder):
            root.mkdir(exist_ok=True)
        if permission_reference_folder:
            copy_permissions(root, permission_reference_folder)
        yield Staging(root)
        delete_without_following_links(parent_folder, root.name)
        if locked:
            delete_without_following_links(parent_folder, f"{staging_key}.lock")


def is_absent_or_usable_folder(folder: Path) -> bool:
    """Return whether a folder does not exist yet, or is writable and holds no symbolic link.

    Another user may have created it, and links may point anywhere.
    """
    if not os.path.lexists(folder):
        return True
    writable = folder.is_dir() and not folder.is_symlink() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    return writable and not any(path.is_symlink() for path in folder.iterdir())


@contextmanager
def explained_staging_errors(folder: Path) -> Iterator[None]:
    """Translate errors of writing a folder into an :class:`InputError` that names --staging."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"cannot keep unfinished work in {folder}: {error.strerror}; name a folder that can be written "
            f"with --staging"
        ) from error


@contextmanager
def try_lock_staging(lock_file: Path) -> Iterator[bool]:
    """Hold a lock that everyone with write access to the folder can take; yield whether it was acquired."""
    if lock_file.exists() and not os.access(lock_file, os.W_OK):
        yield False  # of another user
        return
    with explained_staging_errors(lock_file.parent):
        lock = acquire_file_lock(lock_file)
    try:
        if lock is not None:
            copy_permissions(lock_file, reference_folder=lock_file.parent)
        yield lock is not None
    finally:
        if lock is not None:
            lock.close()

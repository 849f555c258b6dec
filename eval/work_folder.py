"""Finished rows and features, kept in a folder until an evaluation is complete, so that it can resume.

Every file is named by the digest of its inputs, is written atomically, and holds the digest of its content: a
damaged file is computed again. If nothing can be written, the evaluation
continues, but cannot resume.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save
from torch import Tensor

from sfm.atomic import require_folder_is_not_link
from sfm.deletion import delete_without_following_links
from sfm.errors import InputError
from sfm.eval.output_files import write_output
from sfm.eval.result import AccuracyRow
from sfm.stats_store.digests import compute_array_digest, compute_sha256, encode_canonical_json
from sfm.tensor_files import open_safetensors, read_tensor_specs
from sfm.untrusted_files import OversizeError, read_bounded_file

SECONDS_BETWEEN_WRITES = 15.0
"""Seconds between writes: bounds the work lost when a process is killed."""

KEY_CHARACTERS = 40
"""Characters of the key that every file name begins with, after a dot while it is being written."""

LOG = logging.getLogger(__name__)


ViewCount = int


class _StoredRow(BaseModel):
    row: str
    sha256: str
    made_from: list[str] = []


@dataclass
class WorkFolder:
    """The folder that keeps finished rows and features of an evaluation.

    Attributes
    ----------
    folder : Path
        Made by the first write.
    is_writable : bool
        False after a failed write.
    used_keys : list of str
        Keys that were read or written, the latest last.
    """

    folder: Path
    is_writable: bool = field(default=True, init=False)
    used_keys: list[str] = field(default_factory=list, init=False)

    def try_write_file(self, name: str, data: bytes) -> None:
        """Write a file; log once if that is not possible."""
        if self.is_writable:
            try:
                require_folder_is_not_link(self.folder)
                write_output(self.folder / name, data)
            except InputError as error:
                self.is_writable = False
                LOG.warning("an interruption would start over: %s", error)

    def read_row_if_intact(self, row_key: str) -> AccuracyRow | None:
        """Return a finished row; None if it is missing or not as it was written."""
        self.used_keys.append(row_key)
        try:
            stored = _StoredRow.model_validate_json(read_bounded_file(self.folder / f"{row_key}.json"))
            if stored.sha256 != compute_sha256(stored.row.encode()):
                return None
            row = AccuracyRow.model_validate_json(stored.row)
        except (OSError, ValidationError, OversizeError):
            return None
        self.used_keys += stored.made_from
        return row

    def write_row(self, row_key: str, row: AccuracyRow, feature_keys: Sequence[str] = ()) -> None:
        """Write a finished row with the keys of the features that it was trained on."""
        text = row.model_dump_json()
        stored = _StoredRow(row=text, sha256=compute_sha256(text.encode()), made_from=list(feature_keys))
        self.try_write_file(f"{row_key}.json", stored.model_dump_json().encode())

    def delete_used_files(self) -> None:
        """Delete the files of used keys; others may be of another, interrupted command."""
        used_keys = set(self.used_keys)
        with suppress(OSError):
            for path in list(self.folder.iterdir()):
                if path.name.lstrip(".")[:KEY_CHARACTERS] in used_keys:
                    delete_without_following_links(self.folder.parent, f"{self.folder.name}/{path.name}")
            self.folder.rmdir()


@dataclass
class ResumableFeatures:
    """The features of one set of views, written in blocks of consecutive views while they are computed.

    Attributes
    ----------
    work_folder : WorkFolder
    key : str
        Digest of all their inputs.
    features : Tensor, shape (view, feature)
        Filled in order by the caller.
    stored_view_count : int
        Number of views whose features are on the disk.
    """

    work_folder: WorkFolder
    key: str
    features: Tensor
    stored_view_count: int = field(default=0, init=False)
    _last_write_monotonic_seconds: float = field(default_factory=time.monotonic, init=False)

    def load_stored_view_features(self) -> ViewCount:
        """Fill in the features on the disk up to the first gap; return the number of their views."""
        self.work_folder.used_keys.append(self.key)
        while self.stored_view_count < len(self.features):
            block = self._read_block(self.stored_view_count)
            if block is None:
                break
            self.features[self.stored_view_count : self.stored_view_count + len(block)] = block.to(
                self.features.device
            )
            self.stored_view_count += len(block)
        return self.stored_view_count

    def write_unwritten_views_if_due(self, computed_view_count: int) -> None:
        """Write new features of the first views, if all are done or some seconds have passed."""
        if (
            computed_view_count == len(self.features)
            or time.monotonic() - self._last_write_monotonic_seconds > SECONDS_BETWEEN_WRITES
        ):
            self.write_unwritten_views(computed_view_count)

    def write_unwritten_views(self, computed_view_count: int) -> None:
        """Write new features of the first `computed_view_count` views."""
        if computed_view_count > self.stored_view_count:
            block = self.features[self.stored_view_count : computed_view_count].cpu().contiguous()
            header = {"key": self.key, "digest": compute_array_digest(block.numpy())}
            self.work_folder.try_write_file(
                self._make_block_file_name(self.stored_view_count), save({"features": block}, header)
            )
            self.stored_view_count, self._last_write_monotonic_seconds = computed_view_count, time.monotonic()

    def _make_block_file_name(self, first_view: int) -> str:
        return f"{self.key}-{first_view:09d}.safetensors"

    def _read_block(self, first_view: int) -> Tensor | None:
        path = self.work_folder.folder / self._make_block_file_name(first_view)
        try:
            with open_safetensors(path, "pt", 4 * self.features[first_view:].numel()) as file:
                dtype, (views, *width) = read_tensor_specs(file).get("features", ("", (0,)))
                has_shape = dtype == "F32" and width == [*self.features.shape[1:]]
                if not has_shape or not 0 < views <= len(self.features) - first_view:
                    return None
                header, block = file.metadata() or {}, file.get_tensor("features")
        except (FileNotFoundError, ValueError):
            return None
        is_intact = header == {"key": self.key, "digest": compute_array_digest(block.numpy())}
        return block if is_intact and block.isfinite().all() else None


def compute_work_key(inputs: Mapping[str, Any], device: torch.device) -> str:
    """Return the digest of inputs that work depends on, with the device and the version of torch."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return compute_sha256(
        encode_canonical_json({**inputs, "device": device_name, "torch": torch.__version__})
    )[:KEY_CHARACTERS]

"""Work of an evaluation that is kept until all of it is done, so that an interrupted one goes on.

Every file is named by what it depends on, appears whole, and holds its own digest: what is not as it was
written is computed again. Work that cannot be kept costs nothing but the going on.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save
from torch import Tensor

from sfm.atomic import require_no_link
from sfm.deletion import delete_below
from sfm.errors import InputError
from sfm.eval.output_files import write_output
from sfm.eval.result import Row
from sfm.stats_store.digests import compute_array_digest, compute_sha256, encode_canonical_json
from sfm.tensor_files import open_safetensors, read_tensor_specs
from sfm.untrusted_files import OversizeError, read_bounded_file

SECONDS_BETWEEN_WRITES = 15.0
"""At most so much of the work on one set of views is lost when a process is killed."""

KEY_LENGTH = 40
"""Every file's name begins with a key of so many characters, after a dot while it is being written."""

LOG = logging.getLogger(__name__)


class _StoredRow(BaseModel):
    row: str
    sha256: str
    made_from: list[str] = []


@dataclass
class Work:
    """Rows and features of views that are done.

    Attributes
    ----------
    folder : Path
        Made when something is kept.
    writable : bool
        False once something could not be kept.
    used : list of str
        Keys that were read or kept, the latest last.
    """

    folder: Path
    writable: bool = field(default=True, init=False)
    used: list[str] = field(default_factory=list, init=False)

    def keep(self, name: str, data: bytes) -> None:
        """Write a file; says once if that is not possible."""
        if self.writable:
            try:
                require_no_link(self.folder)
                write_output(self.folder / name, data)
            except InputError as error:
                self.writable = False
                LOG.warning("an interruption would start over: %s", error)

    def read_row(self, key: str) -> Row | None:
        """Return a row that is done, if it is there as it was written."""
        self.used.append(key)
        try:
            stored = _StoredRow.model_validate_json(read_bounded_file(self.folder / f"{key}.json"))
            if stored.sha256 != compute_sha256(stored.row.encode()):
                return None
            row = Row.model_validate_json(stored.row)
        except (OSError, ValidationError, OversizeError):
            return None
        self.used += stored.made_from
        return row

    def keep_row(self, key: str, row: Row, made_from: Sequence[str] = ()) -> None:
        """Keep a row that is done, and the keys of the features that it was made from."""
        text = row.model_dump_json()
        stored = _StoredRow(row=text, sha256=compute_sha256(text.encode()), made_from=list(made_from))
        self.keep(f"{key}.json", stored.model_dump_json().encode())

    def remove(self) -> None:
        """Delete what was used; the folder may hold work of another command, which was interrupted."""
        used = set(self.used)
        with suppress(OSError):
            for path in list(self.folder.iterdir()):
                if path.name.lstrip(".")[:KEY_LENGTH] in used:
                    delete_below(self.folder.parent, f"{self.folder.name}/{path.name}")
            self.folder.rmdir()


@dataclass
class KeptFeatures:
    """The features of one set of views, kept while they are computed, in blocks of consecutive views.

    Attributes
    ----------
    work : Work
    key : str
        Names everything that they depend on.
    features : Tensor, shape (view, feature)
        Filled in order by whoever computes them.
    stored : int
        How many of them are on the disk.
    """

    work: Work
    key: str
    features: Tensor
    stored: int = field(default=0, init=False)
    _wrote: float = field(default_factory=time.monotonic, init=False)

    def load(self) -> int:
        """Fill in what is on the disk without a gap; return how many views that are."""
        self.work.used.append(self.key)
        while self.stored < len(self.features):
            block = self._read(self.stored)
            if block is None:
                break
            self.features[self.stored : self.stored + len(block)] = block.to(self.features.device)
            self.stored += len(block)
        return self.stored

    def keep(self, done: int) -> None:
        """Write what is new of the first `done` views, if the last write is a while ago or all are done."""
        if done == len(self.features) or time.monotonic() - self._wrote > SECONDS_BETWEEN_WRITES:
            self.flush(done)

    def flush(self, done: int) -> None:
        """Write what is new of the first `done` views."""
        if done > self.stored:
            block = self.features[self.stored : done].cpu().contiguous()
            about = {"key": self.key, "digest": compute_array_digest(block.numpy())}
            self.work.keep(self._name(self.stored), save({"features": block}, about))
            self.stored, self._wrote = done, time.monotonic()

    def _name(self, start: int) -> str:
        return f"{self.key}-{start:09d}.safetensors"

    def _read(self, start: int) -> Tensor | None:
        path = self.work.folder / self._name(start)
        try:
            with open_safetensors(path, "pt", 4 * self.features[start:].numel()) as file:
                kind, (views, *width) = read_tensor_specs(file).get("features", ("", (0,)))
                fits = kind == "F32" and width == [*self.features.shape[1:]]
                if not fits or not 0 < views <= len(self.features) - start:
                    return None
                about, block = file.metadata() or {}, file.get_tensor("features")
        except (FileNotFoundError, ValueError):
            return None
        whole = about == {"key": self.key, "digest": compute_array_digest(block.numpy())}
        return block if whole and block.isfinite().all() else None


def work_key(**parts: Any) -> str:
    """Return the name of work that depends on these values, the device, and torch."""
    device = parts.pop("device")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return compute_sha256(encode_canonical_json(parts | {"device": name, "torch": torch.__version__}))[:KEY_LENGTH]

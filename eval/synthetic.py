"""Read what a distillation left behind: its images as anyone else would, and where they came from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sfm.backbones.card import BackboneCard
from sfm.config_fields import MAX_CANVAS_PIXELS, MAX_IMAGES_PER_CLASS
from sfm.constrained_types import Count, Digest, InputPixels, Name
from sfm.errors import InputError
from sfm.image_files import read_png
from sfm.paths import resolve_links
from sfm.text import sanitize_line
from sfm.untrusted_files import OversizeError, read_bounded_file

ALWAYS_READ, MOST_COMPRESSED = 2**30, 50
"""Bytes of pixels that are read whatever their files' size, and how many to a byte of larger sets' files."""

LONGEST_TOLD = 200
"""Characters of the name of a field in an error."""

Parsed = TypeVar("Parsed")


class AskedFor(BaseModel):
    """The part of a run's configuration that evaluation needs.

    Attributes
    ----------
    backbone : str
        The spec with the whole path of a file of weights, which the card does not tell.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    backbone: str


class RunRecord(BaseModel):
    """The part of ``run.json`` that evaluation needs.

    Attributes
    ----------
    images : str or None
        Digest of the pixels that were distilled; None in runs of versions that did not write it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    command: Literal["distill"]
    config: AskedFor
    store: str
    entry_digest: Digest
    fingerprint: Digest
    dataset: Name
    backbone: BackboneCard
    image_size: InputPixels
    canvas: Annotated[int, Field(ge=1, le=MAX_CANVAS_PIXELS)]
    ipc: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
    images: Digest | None = None


class ClassRecord(BaseModel):
    """One element of ``classes.json``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    index: Count
    class_id: Name
    name: Name


ClassRecords = Annotated[list[ClassRecord], Field(fail_fast=True)]
"""All of ``classes.json``."""


@dataclass(frozen=True)
class DistilledRun:
    """A distilled dataset, read from its files.

    Attributes
    ----------
    record : RunRecord
    class_ids : list of str
        In the order of the labels.
    class_names : list of str
        Display names, in the same order; may repeat.
    files : list of Path
        The images' files, one for each of `pixels`.
    pixels : ndarray of uint8, shape (class * ipc, canvas, canvas, 3)
        The images of the first class, then those of the second, ...
    labels : ndarray of int64, shape (class * ipc,)
    """

    record: RunRecord
    class_ids: list[str]
    class_names: list[str]
    files: list[Path]
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def read_run(directory: Path) -> DistilledRun:
    """Read the directory of a finished distillation: ``run.json``, ``classes.json``, ``images/``.

    Raises
    ------
    InputError
        If it is not such a directory, or classes or images are missing, too many, unreadable or not of the
        size that ``run.json`` names.
    """
    if not directory.is_dir():
        raise InputError(f"no run directory at {directory}: give the --out of a `sfm distill`")
    if (directory / "checkpoint").is_dir() and not (directory / "run.json").exists():
        raise InputError(
            f"{directory} is not a finished run of `sfm distill`, but holds a checkpoint: wait for it, or "
            f"repeat its command with --resume if it was interrupted"
        )
    record = parsed(TypeAdapter(RunRecord), directory / "run.json")
    classes = parsed(TypeAdapter(ClassRecords), directory / "classes.json")
    if [c.index for c in classes] != list(range(len(classes))) or not classes:
        raise InputError(f"{directory / 'classes.json'} does not number its classes 0, 1, 2, ...")
    folders = _numbered(directory / "images", len(classes), "class folder", r"(\d+)(_.*)?")
    files = [file for folder in folders for file in _numbered(folder, record.ipc, "image", r"(\d+)\.png")]
    require_inside(directory, [directory / "images", *folders, *files])
    require_plausible(directory, files, record.canvas)
    pixels = np.empty((len(files), record.canvas, record.canvas, 3), np.uint8)
    for place, file in zip(pixels, files, strict=True):
        place[:] = read_png(file, record.canvas**2, (record.canvas, record.canvas))
    return DistilledRun(
        record,
        [c.class_id for c in classes],
        [c.name for c in classes],
        files,
        pixels,
        np.repeat(np.arange(len(classes)), record.ipc),
    )


def parsed(kind: TypeAdapter[Parsed], path: Path) -> Parsed:
    """Read a JSON file of a run's directory.

    Raises
    ------
    InputError
        If it is missing, or not what is written there.
    """
    try:
        return kind.validate_json(read_bounded_file(path))
    except OSError as error:
        raise InputError(
            f"{path.parent} is not a finished run of `sfm distill`: cannot read {path.name}: {error.strerror}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = sanitize_line(".".join(map(str, first["loc"])), LONGEST_TOLD) or "the file"
        raise InputError(
            f"{path} is not what `sfm distill` writes: {where}: {first['msg'].lower()}"
        ) from error
    except OversizeError as error:
        raise InputError(f"{path} is not what `sfm distill` writes: it is too long") from error


def require_inside(directory: Path, paths: Iterable[Path]) -> None:
    """Refuse links that lead out of a run's directory: an export or a report would give away what is there.

    Raises
    ------
    InputError
        Names the first.
    """
    root = resolve_links(directory)
    for path in paths:
        if path.is_symlink() and not resolve_links(path).is_relative_to(root):
            raise InputError(
                f"{path} is a link that leads out of the run directory, to what may be private: if you trust "
                f"whoever made it, copy the directory with `cp -rL`"
            )


def require_plausible(directory: Path, files: Sequence[Path], canvas: int) -> None:
    """Refuse small files that claim to be gigabytes of images.

    Raises
    ------
    InputError
        If they do.
    """
    pixels = len(files) * canvas**2 * 3
    held = sum(file.stat().st_size for file in files if file.is_file())
    if pixels > ALWAYS_READ and pixels > MOST_COMPRESSED * held:
        raise InputError(
            f"the {len(files)} images in {directory} would take {pixels / 2**30:.1f} GiB, their files have "
            f"{held / 2**20:.1f} MiB: distilled images do not compress like that"
        )


def _numbered(folder: Path, count: int, what: str, pattern: str) -> list[Path]:
    """Return what is in a folder, ordered by the numbers 0 to `count` - 1 in the names."""
    if not folder.is_dir():
        raise InputError(f"no {what}s: {folder} is missing")
    found: dict[int, Path] = {}
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        name = re.fullmatch(pattern, path.name, re.ASCII)
        number = int(name[1]) if name else count
        if number >= count or number in found:
            raise InputError(f"unexpected {path}: {folder} should hold {_many(count, what)} and no more")
        found[number] = path
    missing = [number for number in range(count) if number not in found]
    if missing:
        raise InputError(f"{folder} should hold {_many(count, what)}, but {_listed(missing)} is missing")
    return [found[number] for number in range(count)]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(numbers: Sequence[int], most: int = 5) -> str:
    return ", ".join(f"number {n}" for n in numbers[:most]) + (", ..." if len(numbers) > most else "")

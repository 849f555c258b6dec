"""Read what a distillation left behind: its images as anyone else would, and where they came from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sfm.backbones.card import BackboneCard
from sfm.errors import InputError

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
    entry_digest: str
    fingerprint: str
    dataset: str
    backbone: BackboneCard
    image_size: int
    canvas: int
    ipc: int
    images: str | None = None


class ClassRecord(BaseModel):
    """One element of ``classes.json``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    index: int
    class_id: str
    name: str


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
    classes = parsed(TypeAdapter(list[ClassRecord]), directory / "classes.json")
    if [c.index for c in classes] != list(range(len(classes))) or not classes:
        raise InputError(f"{directory / 'classes.json'} does not number its classes 0, 1, 2, ...")
    folders = _numbered(directory / "images", len(classes), "class folder", r"(\d+)(_.*)?")
    files = [file for folder in folders for file in _numbered(folder, record.ipc, "image", r"(\d+)\.png")]
    return DistilledRun(
        record,
        [c.class_id for c in classes],
        [c.name for c in classes],
        files,
        np.stack([_read_image(file, record.canvas) for file in files]),
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
        return kind.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path.parent} is not a finished run of `sfm distill`: cannot read {path.name}: {error.strerror}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{path} is not what `sfm distill` writes: {where}: {first['msg'].lower()}"
        ) from error


def _numbered(folder: Path, count: int, what: str, pattern: str) -> list[Path]:
    """Return what is in a folder, ordered by the numbers 0 to `count` - 1 in the names."""
    if not folder.is_dir():
        raise InputError(f"no {what}s: {folder} is missing")
    found: dict[int, Path] = {}
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        name = re.fullmatch(pattern, path.name)
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


def _listed(numbers: Iterable[int], most: int = 5) -> str:
    shown = [f"number {n}" for n in numbers]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def read_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image, of shape (height, width, 3): red, green and blue, whatever an editor saved.

    That is how torchvision's ImageFolder reads it.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from error


def _read_image(path: Path, canvas: int) -> npt.NDArray[np.uint8]:
    pixels = read_pixels(path)
    if pixels.shape != (canvas, canvas, 3):
        height, width = pixels.shape[:2]
        raise InputError(f"{path} has {width} x {height} pixels, run.json says {canvas} x {canvas}")
    return pixels

"""Read a directory of distilled images: those of a finished distillation, or of another program.

The former holds ``run.json``; the latter, which `sfm evaluate` writes for images that another program made
(:mod:`sfm.eval.foreign_run`), holds ``images.json``. Both hold ``classes.json`` and ``images/``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sfm.backbones.card import BackboneCard
from sfm.config_fields import MAX_CANVAS_PIXELS, MAX_DISTILLATION_BACKBONES, MAX_IMAGES_PER_CLASS, LossWeight
from sfm.constrained_types import MAX_CLASSES, Count, Digest, InputPixels, Name
from sfm.errors import InputError
from sfm.eval.run_directory import CLASSES_FILE, FOREIGN_RECORD_FILE, RUN_FILE
from sfm.image_files import read_png_as_rgb
from sfm.paths import resolve_links
from sfm.text import format_words_as_list, make_distinct_backbone_names, sanitize_line
from sfm.untrusted_files import OversizeError, read_bounded_file

MAX_UNCHECKED_BYTES, MAX_COMPRESSION = 2**30, 50
"""Bytes of pixels that are read in any case, and the highest ratio of pixels to file bytes above that."""

UNKNOWN_BACKBONE = "unknown"
"""Name of the backbone distilled on where nobody said which it was."""

MAX_FIELD_CHARACTERS = 200
"""Characters of a field's name in an error."""

Model = TypeVar("Model")

CanvasSidePixels = Annotated[int, Field(ge=1, le=MAX_CANVAS_PIXELS)]
ImagesPerClass = Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
DistilledPixelDigest = Digest
SpecWithWeightsPath = Annotated[str, Field(max_length=10_000)]
SourcePath = Annotated[str, Field(max_length=10_000)]

MAX_NOTES = 100
"""Notes about the reading of images that are kept."""


class DistillationBackbone(BaseModel):
    """One of the backbones that a run was distilled on, with the entry of its statistics.

    Attributes
    ----------
    backbone : BackboneCard
    spec : str
        The spec with the absolute path of a file of weights, which the card lacks.
    entry_digest : str
    image_size : int
        Its input size, in pixels.
    weight : float
        Weight of its loss.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    backbone: BackboneCard
    spec: SpecWithWeightsPath
    entry_digest: Digest
    image_size: InputPixels
    weight: LossWeight = 1.0


class RunRecord(BaseModel):
    """The fields of ``run.json`` or ``images.json`` that evaluation needs.

    Attributes
    ----------
    entry_digest, backbone, image_size
        Of the first backbone distilled on.
    ipc
        Images per class; the largest number where classes have different ones.
    images : str or None
        Digest of the pixels that were distilled; None in runs of older versions.
    backbones : list of DistillationBackbone
        All backbones distilled on, each once; the only one of a run of an older version. Where the backbone
        distilled on is unknown, the one whose statistics say which classes and samples there are.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    command: Literal["distill", "evaluate"]
    store: str
    entry_digest: Digest
    fingerprint: Digest
    dataset: Name
    backbone: BackboneCard
    image_size: InputPixels
    canvas: CanvasSidePixels
    ipc: ImagesPerClass
    images: DistilledPixelDigest | None = None
    backbones: Annotated[
        list[DistillationBackbone],
        Field(fail_fast=True, min_length=1, max_length=MAX_DISTILLATION_BACKBONES),
    ]

    @model_validator(mode="before")
    @classmethod
    def _add_missing_backbones_list(cls, values: Any) -> Any:
        """Add the list of backbones that a run of an older version lacks."""
        if not isinstance(values, dict) or "backbones" in values:
            return values
        config = values.get("config")
        if not isinstance(config, dict) or "backbone" not in config:
            return values
        names = [name for name in ("backbone", "entry_digest", "image_size") if name in values]
        only = {"spec": config["backbone"], **{name: values[name] for name in names}}
        return values | {"backbones": [only]}

    @field_validator("backbones")
    @classmethod
    def _require_run_backbone_first_and_distinct(
        cls, backbones: list[DistillationBackbone], info: ValidationInfo
    ) -> list[DistillationBackbone]:
        first, names = backbones[0], ("backbone", "entry_digest", "image_size")
        if any(name in info.data and info.data[name] != getattr(first, name) for name in names):
            raise ValueError("the first is another one than the run names")
        if len({b.backbone.hash for b in backbones}) < len(backbones):
            raise ValueError("one backbone is there twice")
        if len({b.entry_digest for b in backbones}) < len(backbones):
            raise ValueError("one entry is there twice")
        return backbones

    @property
    def knows_backbones(self) -> bool:
        """Whether it is known which backbones the images were distilled on."""
        return True

    @property
    def largest_image_size(self) -> int:
        """Largest input size of the backbones distilled on, in pixels."""
        return max(b.image_size for b in self.backbones)

    @property
    def backbone_names(self) -> list[str]:
        """Specs of the backbones distilled on, with the input size where a spec has several."""
        if not self.knows_backbones:
            return [UNKNOWN_BACKBONE]
        return make_distinct_backbone_names((b.backbone.spec, b.image_size) for b in self.backbones)

    def format_backbone_names(self) -> str:
        """Return the names of the backbones distilled on as text: ``lite0 and lite1``."""
        return format_words_as_list(list(dict.fromkeys(self.backbone_names)))

    def format_backbones_with_sizes(self) -> str:
        """Return the backbones distilled on with their input sizes: ``lite0 and lite1 at 96 px``."""
        if not self.knows_backbones:
            return "an unknown backbone"
        if len({b.image_size for b in self.backbones}) == 1:
            return f"{self.format_backbone_names()} at {self.image_size} px"
        return format_words_as_list([f"{b.backbone.spec} at {b.image_size} px" for b in self.backbones])


class DistillationRecord(RunRecord):
    """The fields of the ``run.json`` of `sfm distill`."""

    command: Literal["distill"]


class ForeignRecord(RunRecord):
    """The fields of ``images.json``: images that another program made.

    Attributes
    ----------
    source : str
        Where they were read.
    source_digest : str
        Digest of them before they were resized.
    images_per_class : list of int
    distilled_on_known : bool
        Whether the user said which backbones they were distilled on.
    notes : list of str
        What was done to the images when they were read.
    """

    command: Literal["evaluate"]
    source: SourcePath
    source_digest: Digest
    images_per_class: Annotated[
        list[ImagesPerClass], Field(fail_fast=True, min_length=1, max_length=MAX_CLASSES)
    ]
    distilled_on_known: bool
    notes: Annotated[list[str], Field(fail_fast=True, max_length=MAX_NOTES)]

    @property
    def knows_backbones(self) -> bool:
        """Whether the user said which backbones the images were distilled on."""
        return self.distilled_on_known


class ClassRecord(BaseModel):
    """One element of ``classes.json``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    index: Count
    class_id: Name
    name: Name


ClassRecords = Annotated[list[ClassRecord], Field(fail_fast=True)]
"""The content of ``classes.json``."""


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
    image_files : list of Path
        One file for each of `pixels`.
    pixels : ndarray of uint8, shape (image, canvas, canvas, 3)
        The images of the first class, then those of the second, ...
    labels : ndarray of int64, shape (image,)
    """

    record: RunRecord
    class_ids: list[str]
    class_names: list[str]
    image_files: list[Path]
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @property
    def images_per_class(self) -> list[int]:
        """Number of images of every class; they are equal unless another program made the images."""
        counts: list[int] = np.bincount(self.labels, minlength=len(self.class_ids)).tolist()
        return counts


def format_images_per_class(images_per_class: Sequence[int]) -> str:
    """Return numbers of images as text: "1 per class", "1 to 3 per class"."""
    fewest, most = min(images_per_class), max(images_per_class)
    return f"{most:,} per class" if fewest == most else f"{fewest:,} to {most:,} per class"


def read_distilled_run(run_directory: Path) -> DistilledRun:
    """Read a directory of images: ``run.json`` or ``images.json``, ``classes.json``, ``images/``.

    Raises
    ------
    InputError
        If it is not such a directory, or classes or images are missing, too many, unreadable or not of the
        size that the record names.
    """
    if not run_directory.is_dir():
        raise InputError(f"no run directory at {run_directory}: give the --out of a `sfm distill`")
    if (run_directory / "checkpoint").is_dir() and not (run_directory / "run.json").exists():
        raise InputError(
            f"{run_directory} is not a finished run of `sfm distill`, but holds a checkpoint: wait for it, "
            f"or repeat its command with --resume if it was interrupted"
        )
    is_foreign = (run_directory / FOREIGN_RECORD_FILE).exists()
    record = (
        read_foreign_record(run_directory)
        if is_foreign
        else read_run_json(TypeAdapter(DistillationRecord), run_directory / RUN_FILE)
    )
    classes = read_run_json(TypeAdapter(ClassRecords), run_directory / CLASSES_FILE)
    if [c.index for c in classes] != list(range(len(classes))) or not classes:
        raise InputError(f"{run_directory / 'classes.json'} does not number its classes 0, 1, 2, ...")
    counts = record.images_per_class if isinstance(record, ForeignRecord) else [record.ipc] * len(classes)
    if len(counts) != len(classes):
        raise InputError(f"{run_directory / CLASSES_FILE} lists other classes than {FOREIGN_RECORD_FILE}")
    folders = _list_numbered_paths(run_directory / "images", len(classes), "class folder", r"(\d+)(_.*)?")
    files = [
        file
        for folder, count in zip(folders, counts, strict=True)
        for file in _list_numbered_paths(folder, count, "image", r"(\d+)\.png")
    ]
    require_no_outside_links(run_directory, [run_directory / "images", *folders, *files])
    require_plausible_compression(run_directory, files, record.canvas)
    pixels = np.empty((len(files), record.canvas, record.canvas, 3), np.uint8)
    for image, file in zip(pixels, files, strict=True):
        image[:] = read_png_as_rgb(file, record.canvas**2, (record.canvas, record.canvas))
    return DistilledRun(
        record,
        [c.class_id for c in classes],
        [c.name for c in classes],
        files,
        pixels,
        np.repeat(np.arange(len(classes)), counts),
    )


def read_foreign_record(run_directory: Path) -> ForeignRecord:
    """Read the ``images.json`` that `sfm evaluate` writes for images of another program.

    Raises
    ------
    InputError
        If it is missing, or not what `sfm evaluate` writes.
    """
    return read_run_json(TypeAdapter(ForeignRecord), run_directory / FOREIGN_RECORD_FILE, "evaluate")


def read_run_json(type_adapter: TypeAdapter[Model], path: Path, command: str = "distill") -> Model:
    """Read and validate a JSON file of a run directory, which a command wrote.

    Raises
    ------
    InputError
        If it is missing, or not what the command writes.
    """
    try:
        return type_adapter.validate_json(read_bounded_file(path))
    except OSError as error:
        raise InputError(
            f"{path.parent} is not a finished run of `sfm {command}`: cannot read {path.name}: "
            f"{error.strerror}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = sanitize_line(".".join(map(str, first["loc"])), MAX_FIELD_CHARACTERS) or "the file"
        problem = first["msg"].lower().removeprefix("value error, ")
        raise InputError(f"{path} is not what `sfm {command}` writes: {field}: {problem}") from error
    except OversizeError as error:
        raise InputError(f"{path} is not what `sfm {command}` writes: it is too long") from error


def require_no_outside_links(run_directory: Path, paths: Iterable[Path]) -> None:
    """Refuse links that lead out of a run directory: an export or a report would disclose their targets.

    Raises
    ------
    InputError
        If there is one; names it.
    """
    root = resolve_links(run_directory)
    for path in paths:
        if path.is_symlink() and not resolve_links(path).is_relative_to(root):
            raise InputError(
                f"{path} is a link that leads out of the run directory, to files that may be private: if "
                f"you trust its author, copy the directory with `cp -rL`"
            )


def require_plausible_compression(
    run_directory: Path, image_files: Sequence[Path], image_side_pixels: int
) -> None:
    """Refuse small files that decode to gigabytes of images.

    Raises
    ------
    InputError
        If they are that small.
    """
    pixel_bytes = len(image_files) * image_side_pixels**2 * 3
    file_bytes = sum(file.stat().st_size for file in image_files if file.is_file())
    if pixel_bytes > MAX_UNCHECKED_BYTES and pixel_bytes > MAX_COMPRESSION * file_bytes:
        raise InputError(
            f"the {len(image_files)} images in {run_directory} would take {pixel_bytes / 2**30:.1f} GiB, "
            f"their files have {file_bytes / 2**20:.1f} MiB: distilled images do not compress like that"
        )


def _list_numbered_paths(
    folder: Path, expected_count: int, singular_noun: str, number_regex: str
) -> list[Path]:
    """Return the paths in a folder, ordered by the numbers 0 to `expected_count` - 1 in their names."""
    if not folder.is_dir():
        raise InputError(f"no {singular_noun}s: {folder} is missing")
    paths: dict[int, Path] = {}
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        match = re.fullmatch(number_regex, path.name, re.ASCII)
        number = int(match[1]) if match else expected_count
        if number >= expected_count or number in paths:
            raise InputError(
                f"unexpected {path}: {folder} should hold "
                f"{_format_count(expected_count, singular_noun)} and no more"
            )
        paths[number] = path
    missing = [number for number in range(expected_count) if number not in paths]
    if missing:
        raise InputError(
            f"{folder} should hold {_format_count(expected_count, singular_noun)}, but "
            f"{_format_missing_numbers(missing)} is missing"
        )
    return [paths[number] for number in range(expected_count)]


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _format_missing_numbers(numbers: Sequence[int], max_listed: int = 5) -> str:
    return ", ".join(f"number {n}" for n in numbers[:max_listed]) + (
        ", ..." if len(numbers) > max_listed else ""
    )

"""Read everything a report shows: run directories, results, and the entries they were distilled from."""

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sfm.config_fields import MAX_CANVAS_PIXELS, MAX_ITERATIONS
from sfm.constrained_types import Count, FiniteFloat, Name, NonNegativeFloat, PackageVersions
from sfm.errors import InputError
from sfm.eval.class_subset import NEAREST_ROLE, ClassSubsetStatistics, select_statistics_of_run_classes
from sfm.eval.combined_results import combine_evaluations, read_evaluation_if_exists
from sfm.eval.config import RESULT_FILE
from sfm.eval.distilled_labels import read_run_soft_labels
from sfm.eval.distilled_run import (
    DistilledPixelDigest,
    DistilledRun,
    ForeignRecord,
    read_distilled_run,
    read_run_json,
    require_no_outside_links,
)
from sfm.eval.output_files import make_distinct_directory_names
from sfm.eval.result import Evaluation, SourceEntryRecord
from sfm.eval.run_directory import RUN_FILE, is_run_directory, make_foreign_result_folder
from sfm.image_files import read_png_as_rgb
from sfm.paths import resolve_links
from sfm.soft_label_files import SoftLabels
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
from sfm.stats_store.store import Entry, Store, open_store
from sfm.untrusted_files import MAX_HISTORY_BYTES, read_bounded_file

MAX_LEVELS, MAX_LOSS = 20, 1e30
"""Limits on the levels of a pyramid and the absolute value of a loss."""

MAX_SHEET_PIXELS = 2**20
"""Limit on the pixels of a growth sheet."""


class VersionedDefaults(BaseModel):
    """Options of a run whose defaults changed after version 0.1.0, which did not record some of them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    feature_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    final_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    noisy_views: Annotated[float, Field(ge=0, le=1)] = 0.5


class RunDetails(BaseModel):
    """The fields of ``run.json`` that only reports show; None where a run did not record one.

    Attributes
    ----------
    images : str or None
        Digest of the pixels as they were distilled.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    config: dict[str, Any]
    resolved: VersionedDefaults = VersionedDefaults()
    licence: Name | None = None
    train_samples: Count | None = None
    seed: Count | None = None
    images: DistilledPixelDigest | None = None
    versions: PackageVersions = {}
    device: Name | None = None
    loss: FiniteFloat | None = None
    wall_seconds: NonNegativeFloat | None = None
    peak_memory_bytes: Count | None = None


class LossPoint(NamedTuple):
    """One row of ``history.csv``."""

    step: int
    loss: float
    resolution: int


@dataclass(frozen=True)
class GrowthSheet:
    """The first images of a run after one level of their pyramid.

    Attributes
    ----------
    step : int
        Steps done.
    pixels : ndarray of uint8, shape (height, width, 3)
    """

    step: int
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SourceData:
    """Statistics and real images of the entries that a run was distilled from.

    Attributes
    ----------
    all_statistics : list of ClassSubsetStatistics
        Of every backbone distilled on.
    exemplar_pixels : ndarray of uint8, shape (class, exemplar, height, width, 3), or None
        Real images, where the entry keeps them.
    nearest_exemplar_indices : ndarray of int64, shape (class,), or None
        Index of the exemplar of every class that is nearest to its mean, where every class has one.
    """

    all_statistics: list[ClassSubsetStatistics]
    exemplar_pixels: npt.NDArray[np.uint8] | None
    nearest_exemplar_indices: npt.NDArray[np.int64] | None

    @property
    def first_statistics(self) -> ClassSubsetStatistics:
        """The statistics of the first backbone distilled on."""
        return self.all_statistics[0]

    @property
    def total_entry_bytes(self) -> int:
        """Size of the entries."""
        return sum(
            record.size
            for statistics in self.all_statistics
            for record in statistics.entry.commit.objects.values()
        )


@dataclass(frozen=True)
class ReportedRun:
    """Everything that a report or an export reads of one run.

    Attributes
    ----------
    directory : Path
    name : str
        Name of the run in the report; no other run has it.
    distilled : DistilledRun
    details : RunDetails
    pixel_digest : str
        Digest of the pixels as they are now.
    loss_history : list of LossPoint
    growth_sheets : list of GrowthSheet
    evaluation : Evaluation or None
    source_data : SourceData or None
        None unless a store was given that holds the run's entries.
    soft_labels : SoftLabels or None
        As they are in the directory; they may be of images that were edited since.
    """

    directory: Path
    name: str
    distilled: DistilledRun
    details: RunDetails
    pixel_digest: str
    loss_history: list[LossPoint]
    growth_sheets: list[GrowthSheet]
    evaluation: Evaluation | None
    source_data: SourceData | None
    soft_labels: SoftLabels | None = None

    @property
    def image_file_bytes(self) -> int:
        """Size of the images' files."""
        return sum(file.stat().st_size for file in self.distilled.image_files)

    @property
    def label_file_bytes(self) -> int:
        """Size of the file of soft labels; 0 without one."""
        return self.soft_labels.file_bytes if self.soft_labels else 0

    @property
    def has_labels_of_other_images(self) -> bool:
        """Whether the soft labels are of other images than those in the directory."""
        return self.soft_labels is not None and self.soft_labels.header.images != self.pixel_digest


def read_reported_runs(
    run_directories: Sequence[Path], store_urls: Sequence[str], result_paths: Sequence[Path] = ()
) -> list[ReportedRun]:
    """Read runs, and find the entries they were distilled from in the stores.

    Parameters
    ----------
    run_directories : sequence of Path
    store_urls : sequence of str
        Paths or URLs of stores; may be empty.
    result_paths : sequence of Path
        Files, or folders of files, that `sfm evaluate --out` wrote.

    Raises
    ------
    InputError
        If a directory is not a finished run, or appears twice; if a file in it is not valid; if a result is
        of none of the runs; if a store cannot be opened, holds none of the runs' entries, or other classes.
    """
    run_directories = [find_evaluated_directory(directory) for directory in run_directories]
    paths = [resolve_links(directory) for directory in run_directories]
    for directory, path in zip(run_directories, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{directory} is given more than once: name every run directory once")
    runs = [read_distilled_run(directory) for directory in run_directories]
    source_data = find_source_data_by_run_index(runs, run_directories, store_urls)
    digests = [compute_array_digest(run.pixels) for run in runs]
    external_results = read_external_results_by_run(result_paths, digests)
    names = make_distinct_directory_names(paths)
    return [
        ReportedRun(
            directory=directory,
            name=name,
            distilled=run,
            details=read_run_details(directory, run),
            pixel_digest=digests[i],
            loss_history=read_loss_history(directory / "history.csv"),
            growth_sheets=read_growth_sheets(directory / "growth"),
            evaluation=combine_run_results(
                [read_evaluation_if_exists(directory / RESULT_FILE), *external_results[i]], run, directory
            ),
            source_data=source_data.get(i),
            soft_labels=read_run_soft_labels(directory, run),
        )
        for i, (directory, name, run) in enumerate(zip(run_directories, names, runs, strict=True))
    ]


def find_evaluated_directory(path: Path) -> Path:
    """Return a run directory as it is, and for images of another program the folder of their evaluation.

    Raises
    ------
    InputError
        If such images were not evaluated.
    """
    if is_run_directory(path) or not path.exists():
        return path
    folder = make_foreign_result_folder(path)
    if is_run_directory(folder):
        return folder
    raise InputError(
        f"{path} is no run directory: for images of another program, run `sfm evaluate` first, then give the "
        f"folder that it wrote (--out, or {folder})"
    )


def read_run_details(run_directory: Path, run: DistilledRun) -> RunDetails:
    """Read what only reports show of a run; of images of another program only the digest is known.

    Raises
    ------
    InputError
        If ``run.json`` is not what `sfm distill` writes.
    """
    if isinstance(run.record, ForeignRecord):
        return RunDetails(config={}, images=run.record.images)
    return read_run_json(TypeAdapter(RunDetails), run_directory / RUN_FILE)


def find_source_data_by_run_index(
    runs: Sequence[DistilledRun], run_directories: Sequence[Path], store_urls: Sequence[str]
) -> dict[int, SourceData]:
    """Find the entries that runs were distilled from; return them by the index of the run.

    Raises
    ------
    InputError
        If a store holds the entries of none of the runs, or an entry has other classes.
    """
    source_data: dict[int, SourceData] = {}
    for store_url in store_urls:
        store = open_store(store_url)
        entries_by_run = {
            i: entries for i, run in enumerate(runs) if (entries := open_source_entries_if_stored(store, run))
        }
        if not entries_by_run:
            raise InputError(
                f"{store.url} holds no entry that {' or '.join(map(str, run_directories))} was distilled "
                f"from: give the store that `sfm distill` was given"
            )
        for i, entries in entries_by_run.items():
            statistics = [
                select_statistics_of_run_classes(entry, runs[i].class_ids, run_directories[i])
                for entry in entries
            ]
            source_data.setdefault(i, read_source_data(statistics))
    return source_data


def read_external_results_by_run(
    result_paths: Sequence[Path], pixel_digests: Sequence[str]
) -> list[list[Evaluation]]:
    """Read results outside the run directories; return those of every run, matched by pixel digest.

    Raises
    ------
    InputError
        If a path holds no result of any of the runs.
    """
    by_run: list[list[Evaluation]] = [[] for _ in pixel_digests]
    for path in result_paths:
        evaluations = [
            evaluation for file in list_result_files(path) if (evaluation := read_evaluation_if_exists(file))
        ]
        matching = [e for e in evaluations if e.provenance.images in pixel_digests]
        if not matching:
            raise InputError(f"--evaluation {path}: it holds no result of the images of these runs")
        for evaluation in matching:
            for i, digest in enumerate(pixel_digests):
                if evaluation.provenance.images == digest:
                    by_run[i].append(evaluation)
    return by_run


def list_result_files(path: Path) -> list[Path]:
    """Return the results at a path: a file, or a folder that `sfm evaluate --out` wrote."""
    return sorted({*path.glob(RESULT_FILE), *path.glob(f"*/{RESULT_FILE}")}) if path.is_dir() else [path]


def combine_run_results(
    evaluations: Sequence[Evaluation | None], run: DistilledRun, run_directory: Path
) -> Evaluation | None:
    """Combine evaluations of one run; later ones replace equal rows of earlier ones.

    Raises
    ------
    InputError
        If one is of other classes.
    """
    backbone = run.record.backbone
    distilled_on = {
        "distilled_on_hash": backbone.hash,
        "distilled_at": backbone.preprocessing.input_size,
        "distilled_from_entries": [
            SourceEntryRecord(
                backbone=each.backbone.spec,
                backbone_hash=each.backbone.hash,
                image_size=each.image_size,
                entry_digest=each.entry_digest,
            )
            for each in run.record.backbones
        ],
    }
    combined: Evaluation | None = None
    for evaluation in evaluations:
        if evaluation is not None:
            require_matching_classes_and_ipc(evaluation, run, run_directory)
            combined = combine_evaluations(evaluation, combined, len(run.image_files))
    if combined is None:
        return None
    # Files of older versions lack these fields.
    update = distilled_on if run.record.knows_backbones else {}
    provenance = combined.provenance.model_copy(update=update)
    return combined.model_copy(update={"provenance": provenance})


def open_source_entries_if_stored(store: Store, run: DistilledRun) -> list[Entry]:
    """Open the entries that a run was distilled from; an empty list if the store does not hold all."""
    entries = []
    for distillation_backbone in run.record.backbones:
        digest = distillation_backbone.entry_digest
        known = list_visible_and_pinned_summaries(store, f"{run.record.dataset}@{digest}")
        matching = [summary for summary in known if summary.entry_digest == digest]
        if not matching:
            return []
        entries.append(store.open_entry(matching[0]))
    return entries


def read_source_data(all_statistics: list[ClassSubsetStatistics]) -> SourceData:
    """Read the real images of some classes, if the first entry keeps any."""
    first = all_statistics[0]
    if "exemplar/role" not in first.entry:
        return SourceData(all_statistics, None, None)
    is_nearest = first.read_per_class_array("exemplar/role") == NEAREST_ROLE
    nearest_indices = is_nearest.argmax(axis=1) if is_nearest.any(axis=1).all() else None
    return SourceData(all_statistics, first.read_per_class_array("exemplar/image"), nearest_indices)


def read_loss_history(path: Path) -> list[LossPoint]:
    """Read the ``history.csv`` of a run; an empty list if there is none.

    Raises
    ------
    InputError
        If it is not what `sfm distill` writes.
    """
    try:
        lines = read_bounded_file(path, MAX_HISTORY_BYTES).decode().splitlines()
        history = [parse_loss_point(row) for row in csv.DictReader(lines)]
        require_valid_loss_history(history)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path} is not what `sfm distill` writes: restore it, or delete it to have a report without it"
        ) from error
    return history


def parse_loss_point(row: Mapping[str, str]) -> LossPoint:
    """Convert a row of ``history.csv``."""
    return LossPoint(int(row["step"]), float(row["loss"]), int(row["resolution"]))


def require_valid_loss_history(history: Sequence[LossPoint]) -> None:
    """Refuse an invalid history: steps count up, the pyramid never shrinks, losses are finite.

    Raises
    ------
    ValueError
        If it is not valid.
    """
    if len({point.resolution for point in history}) > MAX_LEVELS:
        raise ValueError("too many levels")
    first = LossPoint(0, 0.0, 1)
    for previous, point in itertools.pairwise([first, *history]):
        grows = previous.resolution <= point.resolution <= MAX_CANVAS_PIXELS
        if not (previous.step < point.step <= MAX_ITERATIONS and abs(point.loss) < MAX_LOSS and grows):
            raise ValueError(f"step {point.step} does not follow step {previous.step}")


def read_growth_sheets(folder: Path) -> list[GrowthSheet]:
    """Read the growth sheets of a run, in the order of its steps.

    Raises
    ------
    InputError
        If one is not an image, or there are more than a pyramid has levels.
    """
    matches = {path: re.fullmatch(r"step_(\d+)\.png", path.name) for path in sorted(folder.glob("*.png"))}
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    if len(steps) > MAX_LEVELS:
        raise InputError(f"{folder} holds {len(steps)} sheets: a run leaves one for each level, at most 20")
    require_no_outside_links(folder.parent, [folder, *steps])
    return [GrowthSheet(step, read_png_as_rgb(path, MAX_SHEET_PIXELS)) for path, step in steps.items()]


def require_matching_classes_and_ipc(evaluation: Evaluation, run: DistilledRun, run_directory: Path) -> None:
    """Refuse an evaluation of other classes than the run's.

    Raises
    ------
    InputError
        If a row does not fit the run's classes.
    """
    class_count, images_per_class = len(run.class_ids), run.images_per_class
    per_class = [row.per_class for row in evaluation.rows if row.per_class is not None]
    per_class += [row.per_class for row in evaluation.full_data if row.per_class is not None]
    matrices = [row.confusion for row in evaluation.rows if row.confusion is not None]
    pairs = [pair for row in evaluation.rows for pair in row.confused or ()]
    chosen = [row.chosen for row in evaluation.rows if row.chosen is not None]
    if not (
        all(len(accuracies) == class_count for accuracies in per_class)
        and all(len(m) == class_count and all(len(row) == class_count for row in m) for m in matrices)
        and all(max(pair.right, pair.predicted) < class_count for pair in pairs)
        and all([len(row) for row in by_class] == images_per_class for by_class in chosen)
    ):
        raise InputError(
            f"the evaluation of {run_directory} has accuracies of other classes or images than the run's: "
            f"move {run_directory / RESULT_FILE} away and evaluate again"
        )

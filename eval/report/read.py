"""Read everything a report shows: run directories, and what stores know of the data behind them."""

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, TypeAdapter

from sfm.config_fields import MAX_CANVAS_PIXELS, MAX_ITERATIONS
from sfm.constrained_types import Count, Digest, FiniteFloat, Name, NonNegativeFloat, PackageVersions
from sfm.errors import InputError
from sfm.eval.accumulate import accumulate, read_result
from sfm.eval.config import RESULT
from sfm.eval.output_files import distinguish_directories
from sfm.eval.part import Part, part_of
from sfm.eval.result import Evaluation
from sfm.eval.synthetic import DistilledRun, parsed, read_run, require_inside
from sfm.image_files import read_png
from sfm.paths import resolve_links
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.history import summaries_for
from sfm.stats_store.store import Entry, Store, open_store
from sfm.untrusted_files import MAX_HISTORY_BYTES, read_bounded_file

MOST_LEVELS, LARGEST_LOSS = 20, 1e30
"""Levels of a pyramid of any size, and what a loss stays below."""

SHEET_PIXELS = 2**20
"""Pixels of a sheet: ten images of 64 pixels a side, and more."""

NEAREST_TO_MEAN = 1
"""Value of ``exemplar/role``."""


class Details(BaseModel):
    """What ``run.json`` says besides what evaluation needs; what a run did not record is None.

    Attributes
    ----------
    images : str or None
        Digest of the pixels as they were distilled.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    config: dict[str, Any]
    licence: Name | None = None
    train_samples: Count | None = None
    seed: Count | None = None
    images: Digest | None = None
    versions: PackageVersions = {}
    device: Name | None = None
    loss: FiniteFloat | None = None
    wall_seconds: NonNegativeFloat | None = None
    peak_memory_bytes: Count | None = None


class Step(NamedTuple):
    """One row of ``history.csv``."""

    step: int
    loss: float
    resolution: int


@dataclass(frozen=True)
class Sheet:
    """What the first images looked like when a level of their pyramid was done.

    Attributes
    ----------
    step : int
        Steps done.
    pixels : ndarray of uint8, shape (height, width, 3)
    """

    step: int
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Behind:
    """What a store knows of the data that a run was distilled from.

    Attributes
    ----------
    part : Part
    exemplars : ndarray of uint8, shape (class, exemplar, height, width, 3), or None
        Real images, where they are stored.
    nearest : ndarray of int64, shape (class,), or None
        Place of the exemplar of every class that is nearest to its mean, where every class has one.
    """

    part: Part
    exemplars: npt.NDArray[np.uint8] | None
    nearest: npt.NDArray[np.int64] | None

    @property
    def stored_bytes(self) -> int:
        """Size of the entry."""
        return sum(record.size for record in self.part.entry.commit.objects.values())


@dataclass(frozen=True)
class ReportedRun:
    """One run, read whole.

    Attributes
    ----------
    directory : Path
    name : str
        What the report calls it; no other run has the name.
    run : DistilledRun
    details : Details
    digest : str
        Of the pixels as they are now.
    history : list of Step
    growth : list of Sheet
    evaluation : Evaluation or None
    behind : Behind or None
        None unless a store was given that holds the run's entry.
    """

    directory: Path
    name: str
    run: DistilledRun
    details: Details
    digest: str
    history: list[Step]
    growth: list[Sheet]
    evaluation: Evaluation | None
    behind: Behind | None

    @property
    def image_bytes(self) -> int:
        """Size of the images' files."""
        return sum(file.stat().st_size for file in self.run.files)


def read_all(
    directories: Sequence[Path], places: Sequence[str], results: Sequence[Path] = ()
) -> list[ReportedRun]:
    """Read runs, and find the entries they were distilled from in the stores.

    Parameters
    ----------
    directories : sequence of Path
    places : sequence of str
        Paths or URLs of stores; may be empty.
    results : sequence of Path
        Files, or folders of files, that `sfm evaluate --out` wrote.

    Raises
    ------
    InputError
        If a directory is not a finished run, or appears twice; if a file in it is not what was written
        there; if a result is of none of the runs; if a store cannot be opened, knows none of the runs, or
        other classes.
    """
    paths = [resolve_links(directory) for directory in directories]
    for directory, path in zip(directories, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{directory} is given more than once: name every run directory once")
    runs = [read_run(directory) for directory in directories]
    behind: dict[int, Behind] = {}
    for place in places:
        store = open_store(place)
        found = {i: entry for i, run in enumerate(runs) if (entry := entry_of(store, run))}
        if not found:
            raise InputError(
                f"{store.url} holds no entry that {' or '.join(map(str, directories))} was distilled from: "
                f"give the store that `sfm distill` was given"
            )
        for i, entry in found.items():
            behind.setdefault(i, behind_of(part_of(entry, runs[i].class_ids, directories[i])))
    digests = [compute_array_digest(run.pixels) for run in runs]
    elsewhere = results_of(results, digests)
    return [
        ReportedRun(
            directory=directory,
            name=name,
            run=run,
            details=parsed(TypeAdapter(Details), directory / "run.json"),
            digest=digests[i],
            history=read_history(directory / "history.csv"),
            growth=read_growth(directory / "growth"),
            evaluation=together([read_result(directory / RESULT), *elsewhere[i]], run, directory),
            behind=behind.get(i),
        )
        for i, (directory, name, run) in enumerate(
            zip(directories, distinguish_directories(paths), runs, strict=True)
        )
    ]


def results_of(places: Sequence[Path], digests: Sequence[str]) -> list[list[Evaluation]]:
    """Read results that lie elsewhere; return those of every run, by the digest of its images.

    Raises
    ------
    InputError
        If there is none at a place, or it is of none of the runs.
    """
    found: list[list[Evaluation]] = [[] for _ in digests]
    for place in places:
        evaluations = [evaluation for file in result_files(place) if (evaluation := read_result(file))]
        own = [evaluation for evaluation in evaluations if evaluation.provenance.images in digests]
        if not own:
            raise InputError(f"--evaluation {place}: no result of the images of these runs is there")
        for evaluation in own:
            for i, digest in enumerate(digests):
                if evaluation.provenance.images == digest:
                    found[i].append(evaluation)
    return found


def result_files(place: Path) -> list[Path]:
    """Return the results at a place: a file, or a folder that `sfm evaluate --out` wrote."""
    return sorted({*place.glob(RESULT), *place.glob(f"*/{RESULT}")}) if place.is_dir() else [place]


def together(
    evaluations: Sequence[Evaluation | None], run: DistilledRun, directory: Path
) -> Evaluation | None:
    """Put evaluations of one run together; the later ones count.

    Raises
    ------
    InputError
        If one is of other classes.
    """
    backbone = run.record.backbone
    own = {"distilled_on_hash": backbone.hash, "distilled_at": backbone.preprocessing.input_size}
    whole: Evaluation | None = None
    for evaluation in evaluations:
        if evaluation is not None:
            require_fitting(evaluation, run, directory)
            whole = accumulate(evaluation, whole, len(run.files))
    # Files of older versions do not say it.
    return whole and whole.model_copy(update={"provenance": whole.provenance.model_copy(update=own)})


def entry_of(store: Store, run: DistilledRun) -> Entry | None:
    """Open the entry that a run was distilled from, if the store holds it."""
    record = run.record
    known = summaries_for(store, f"{record.dataset}@{record.entry_digest}")
    found = [summary for summary in known if summary.entry_digest == record.entry_digest]
    return store.open_entry(found[0]) if found else None


def behind_of(part: Part) -> Behind:
    """Read the real images of some classes, if the entry holds any."""
    if "exemplar/role" not in part.entry:
        return Behind(part, None, None)
    nearest = part.read("exemplar/role") == NEAREST_TO_MEAN
    places = nearest.argmax(axis=1) if nearest.any(axis=1).all() else None
    return Behind(part, part.read("exemplar/image"), places)


def read_history(path: Path) -> list[Step]:
    """Read the course of a run; nothing if it was not kept.

    Raises
    ------
    InputError
        If it is not what `sfm distill` writes.
    """
    try:
        lines = read_bounded_file(path, MAX_HISTORY_BYTES).decode().splitlines()
        steps = [step_of(row) for row in csv.DictReader(lines)]
        require_course(steps)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path} is not what `sfm distill` writes: restore it, or delete it to have a report without it"
        ) from error
    return steps


def step_of(row: Mapping[str, str]) -> Step:
    """Read a row of a history."""
    return Step(int(row["step"]), float(row["loss"]), int(row["resolution"]))


def require_course(steps: Sequence[Step]) -> None:
    """Refuse what no run leaves: steps count up, the pyramid grows and never shrinks, losses are finite.

    Raises
    ------
    ValueError
        If that is so.
    """
    if len({step.resolution for step in steps}) > MOST_LEVELS:
        raise ValueError("too many levels")
    first = Step(0, 0.0, 1)
    for before, step in itertools.pairwise([first, *steps]):
        grown = before.resolution <= step.resolution <= MAX_CANVAS_PIXELS
        if not (before.step < step.step <= MAX_ITERATIONS and abs(step.loss) < LARGEST_LOSS and grown):
            raise ValueError(f"step {step.step} does not follow step {before.step}")


def read_growth(folder: Path) -> list[Sheet]:
    """Read the sheets that a run left, in the order of its steps.

    Raises
    ------
    InputError
        If one is not an image, or there are more than a pyramid has levels.
    """
    named = {path: re.fullmatch(r"step_(\d+)\.png", path.name) for path in sorted(folder.glob("*.png"))}
    sheets = {path: int(name[1]) for path, name in named.items() if name}
    if len(sheets) > MOST_LEVELS:
        raise InputError(f"{folder} holds {len(sheets)} sheets: a run leaves one for each level, at most 20")
    require_inside(folder.parent, [folder, *sheets])
    return [Sheet(step, read_png(path, SHEET_PIXELS)) for path, step in sheets.items()]


def require_fitting(evaluation: Evaluation, run: DistilledRun, directory: Path) -> None:
    """Refuse figures of other classes than the run's.

    Raises
    ------
    InputError
        If there are some.
    """
    classes, ipc = len(run.class_ids), run.record.ipc
    by_class = [row.per_class for row in evaluation.rows if row.per_class is not None]
    by_class += [row.per_class for row in evaluation.full_data if row.per_class is not None]
    squares = [row.confusion for row in evaluation.rows if row.confusion is not None]
    pairs = [pair for row in evaluation.rows for pair in row.confused or ()]
    chosen = [row.chosen for row in evaluation.rows if row.chosen is not None]
    if not (
        all(len(figures) == classes for figures in by_class)
        and all(len(rows) == classes and all(len(row) == classes for row in rows) for rows in squares)
        and all(max(pair.right, pair.predicted) < classes for pair in pairs)
        and all(len(rows) == classes and all(len(row) == ipc for row in rows) for rows in chosen)
    ):
        raise InputError(
            f"the evaluation of {directory} has figures of other classes or images than the run's: move "
            f"{directory / RESULT} away and evaluate again"
        )

"""Tables of figures: runs side by side, and what was distilled on one backbone on all others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sfm.eval.findings import READ_ELSEWHERE
from sfm.eval.report.figures import Figure, figures_of, label_of, most_thorough
from sfm.eval.report.read import ReportedRun
from sfm.eval.report.words import MODES, NOT_KNOWN, percent
from sfm.eval.result import Evaluation, FullData

OWN_BACKBONE = (
    "Through the backbone distilled on, this shows the classifier of all real images more than the distilled "
    "ones: read the other columns."
)


@dataclass(frozen=True)
class Cell:
    """One figure of a table that is also shaded: `share` in [0, 1], None where there is none."""

    text: str
    share: float | None


@dataclass(frozen=True)
class Grid:
    """A table with names at its rows and columns."""

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str = ""


def backbones_of(rows: Iterable[Figure]) -> dict[tuple[str, int], str]:
    """Name the backbones of rows; by their input size too, where that differs."""
    keys = list(dict.fromkeys((row.backbone, row.image_size) for row in rows))
    sizes = {image_size for _, image_size in keys}
    return {(spec, px): spec if len(sizes) == 1 else f"{spec} at {px} px" for spec, px in keys}


def comparison(runs: Sequence[ReportedRun], title: str) -> Grid:
    """Put the figures of runs of one dataset side by side."""
    told = [comparable(run.evaluation) if run.evaluation else {} for run in runs]
    names = backbones_of(row for found in told for row in found.values())
    order = list(names)
    labels = dict.fromkeys(
        key
        for place in order
        for found in told
        for key, row in found.items()
        if place_of_backbone(row) == place
    )
    rows = [
        (
            f"{names[place_of_backbone(next(f[key] for f in told if key in f))]}: {key[1]}",
            [accuracy_cell(found[key]) if key in found else Cell(NOT_KNOWN, None) for found in told],
        )
        for key in labels
    ]
    return Grid(f"Top-1 accuracy on {title}, %", "trained on", [run.name for run in runs], rows, unlike(runs))


def comparable(evaluation: Evaluation) -> dict[tuple[tuple[str, int], str], Figure]:
    """Return one figure for every backbone and way of training, by both."""
    reduced = evaluation.model_copy(update={"rows": most_thorough(evaluation.rows)})
    return {(place_of_backbone(row), label_of(row, reduced)): row for row in figures_of(reduced)}


def place_of_backbone(row: Figure) -> tuple[str, int]:
    """Return spec and size of the backbone evaluated on."""
    return row.backbone, row.image_size


def unlike(runs: Sequence[ReportedRun]) -> str:
    """Say if figures of several runs were not measured alike."""
    protocols = {
        run.name: {
            (row.epochs, row.seeds, row.views)
            for row in most_thorough(run.evaluation.rows)
            if (row.images, row.mode) == ("distilled", "linear") and row.epochs
        }
        for run in runs
        if run.evaluation
    }
    protocols = {name: found for name, found in protocols.items() if found}
    if len(set(map(frozenset, protocols.values()))) <= 1:
        return ""
    shown = {
        name: [f"{epochs} epochs, {seeds} seeds, {views} views" for epochs, seeds, views in found]
        for name, found in protocols.items()
    }
    return "Not measured alike: " + "; ".join(
        f"{name}: {' or '.join(sorted(t))}" for name, t in shown.items()
    )


def accuracy_cell(row: Figure) -> Cell:
    """Write a top-1 accuracy to be shaded."""
    if isinstance(row, FullData):
        return Cell(percent(row.top1), row.top1)
    return Cell(percent(row.top1_mean, row.top1_std if row.seeds > 1 else None), row.top1_mean)


def matrices(runs: Sequence[ReportedRun], title: str) -> list[Grid]:
    """Show, for every mode, what was distilled on which backbone against which it is evaluated on.

    Empty where only one backbone is concerned.
    """
    told = [
        (run, run.evaluation, [r for r in most_thorough(run.evaluation.rows) if r.images == "distilled"])
        for run in runs
        if run.evaluation
    ]
    distilled = [row for _, _, rows in told for row in rows]
    names = backbones_of(distilled)
    if len(names) < 2:
        return []
    grids = []
    for mode in sorted({row.mode for row in distilled}, key=list(MODES).index):
        rows = []
        for run, evaluation, measured in told:
            own = {place_of_backbone(row): accuracy_cell(row) for row in measured if row.mode == mode}
            spec, record = evaluation.provenance.distilled_on, run.run.record
            label = f"{spec} ({run.name}, {record.ipc} per class)" if len(told) > 1 else spec
            rows.append((label, [own.get(key, Cell(NOT_KNOWN, None)) for key in names]))
        full = {
            (row.backbone, row.image_size): accuracy_cell(row)
            for _, evaluation, _ in told
            for row in evaluation.full_data
            if row.classifier == "linear"
        }
        rows.append(("all real images", [full.get(key, Cell(NOT_KNOWN, None)) for key in names]))
        note = OWN_BACKBONE if mode in READ_ELSEWHERE else ""
        heading = f"{title}, {mode}: top-1 accuracy, %"
        grids.append(Grid(heading, "distilled on ↓ evaluated on →", list(names.values()), rows, note))
    return grids

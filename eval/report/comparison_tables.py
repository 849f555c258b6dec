"""Tables of accuracies: runs side by side, and cross-backbone matrices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sfm.eval.caveats import OWN_BACKBONE_BIASED_MODES
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.row_selection import (
    ResultRow,
    list_result_rows,
    make_row_label,
    select_longest_trained_rows,
)
from sfm.eval.report.text_format import MODE_DESCRIPTIONS, UNKNOWN
from sfm.eval.result import Evaluation, FullDataRow
from sfm.text import format_percent

OWN_BACKBONE_NOTE = (
    "Through the backbone distilled on, this shows the classifier of all real images more than the distilled "
    "ones: read the other columns."
)

SpecAndInputSize = tuple[str, int]


@dataclass(frozen=True)
class TableCell:
    """A text of a table, shaded by `shade_fraction` in [0, 1] unless that is None."""

    text: str
    shade_fraction: float | None


@dataclass(frozen=True)
class ReportTable:
    """A table with row and column headers."""

    title: str
    corner_header: str
    columns: list[str]
    rows: list[tuple[str, list[TableCell]]]
    note: str = ""


def make_backbone_labels(rows: Iterable[ResultRow]) -> dict[SpecAndInputSize, str]:
    """Return a label for every backbone of rows, with its input size where sizes differ."""
    keys = list(dict.fromkeys((row.backbone, row.image_size) for row in rows))
    sizes = {image_size for _, image_size in keys}
    return {(spec, px): spec if len(sizes) == 1 else f"{spec} at {px} px" for spec, px in keys}


def make_comparison_table(runs: Sequence[ReportedRun], dataset_title: str) -> ReportTable:
    """Return a table of the accuracies of runs of one dataset, one column per run."""
    rows_by_run = [index_rows_by_backbone_and_label(run.evaluation) if run.evaluation else {} for run in runs]
    backbone_labels = make_backbone_labels(row for rows in rows_by_run for row in rows.values())
    row_keys = dict.fromkeys(
        key for backbone in backbone_labels for rows in rows_by_run for key in rows if key[0] == backbone
    )
    table_rows = [
        (
            f"{backbone_labels[backbone]}: {label}",
            [make_accuracy_cell(rows.get((backbone, label))) for rows in rows_by_run],
        )
        for backbone, label in row_keys
    ]
    return ReportTable(
        f"Top-1 accuracy on {dataset_title}, %",
        "trained on",
        [run.name for run in runs],
        table_rows,
        describe_training_mismatch(runs),
    )


def index_rows_by_backbone_and_label(evaluation: Evaluation) -> dict[tuple[SpecAndInputSize, str], ResultRow]:
    """Return one row for every backbone and label, by both."""
    reduced = evaluation.model_copy(update={"rows": select_longest_trained_rows(evaluation.rows)})
    return {(get_backbone_key(row), make_row_label(row, reduced)): row for row in list_result_rows(reduced)}


def get_backbone_key(row: ResultRow) -> SpecAndInputSize:
    """Return spec and input size of the backbone evaluated on."""
    return row.backbone, row.image_size


def describe_training_mismatch(runs: Sequence[ReportedRun]) -> str:
    """Return a note if runs were evaluated by different protocols; otherwise an empty text."""
    protocols = {
        run.name: {
            (row.epochs, row.seeds, row.views)
            for row in select_longest_trained_rows(run.evaluation.rows)
            if (row.images, row.mode) == ("distilled", "linear") and row.epochs
        }
        for run in runs
        if run.evaluation
    }
    protocols = {name: values for name, values in protocols.items() if values}
    if len(set(map(frozenset, protocols.values()))) <= 1:
        return ""
    texts = {
        name: [f"{epochs} epochs, {seeds} seeds, {views} views" for epochs, seeds, views in values]
        for name, values in protocols.items()
    }
    return "Not measured alike: " + "; ".join(
        f"{name}: {' or '.join(sorted(t))}" for name, t in texts.items()
    )


def make_accuracy_cell(row: ResultRow | None) -> TableCell:
    """Return the shaded cell of a row's top-1 accuracy; a dash for None."""
    if row is None:
        return TableCell(UNKNOWN, None)
    if isinstance(row, FullDataRow):
        return TableCell(format_percent(row.top1), row.top1)
    return TableCell(format_percent(row.top1_mean, row.top1_std if row.seeds > 1 else None), row.top1_mean)


def make_backbone_matrix_tables(runs: Sequence[ReportedRun], dataset_title: str) -> list[ReportTable]:
    """Return a cross-backbone matrix for every mode; none where there is only one backbone."""
    evaluated = [
        (
            run,
            run.evaluation,
            [r for r in select_longest_trained_rows(run.evaluation.rows) if r.images == "distilled"],
        )
        for run in runs
        if run.evaluation
    ]
    distilled = [row for _, _, rows in evaluated for row in rows]
    backbone_labels = make_backbone_labels(distilled)
    if len(backbone_labels) < 2:
        return []
    tables = []
    for mode in sorted({row.mode for row in distilled}, key=list(MODE_DESCRIPTIONS).index):
        rows = []
        for run, evaluation, measured in evaluated:
            by_backbone = {get_backbone_key(row): row for row in measured if row.mode == mode}
            spec, record = evaluation.provenance.distilled_on, run.distilled.record
            label = f"{spec} ({run.name}, {record.ipc} per class)" if len(evaluated) > 1 else spec
            rows.append((label, [make_accuracy_cell(by_backbone.get(key)) for key in backbone_labels]))
        full_data = {
            get_backbone_key(row): row
            for _, evaluation, _ in evaluated
            for row in evaluation.full_data
            if row.classifier == "linear"
        }
        cells = [make_accuracy_cell(full_data.get(key)) for key in backbone_labels]
        rows.append(("all real images", cells))
        note = OWN_BACKBONE_NOTE if mode in OWN_BACKBONE_BIASED_MODES else ""
        heading = f"{dataset_title}, {mode}: top-1 accuracy, %"
        tables.append(
            ReportTable(heading, "distilled on ↓ evaluated on →", list(backbone_labels.values()), rows, note)
        )
    return tables

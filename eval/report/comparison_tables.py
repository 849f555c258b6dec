"""Tables of accuracies: runs side by side, and cross-backbone matrices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sfm.eval.caveats import (
    LABEL_ROBUST_SCORE_NOTE,
    OWN_BACKBONE_BIASED_MODES,
    UNSEEN_CELL_NOTE,
    list_earlier_training_notes,
)
from sfm.eval.distilled_run import format_images_per_class
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.row_selection import (
    list_linear_rows,
    list_result_rows,
    make_row_label,
    select_longest_trained_rows,
)
from sfm.eval.report.text_format import MODE_DESCRIPTIONS, UNKNOWN
from sfm.eval.result import Evaluation, FullDataRow, ResultRow, is_row_on_distillation_backbone
from sfm.text import format_percent

OWN_BACKBONE_NOTE = (
    "Through a backbone distilled on, this shows the classifier of all real images more than the distilled "
    "ones: read the accuracies on other backbones."
)

SpecAndInputSize = tuple[str, int]


@dataclass(frozen=True)
class TableCell:
    """A text of a table, shaded by `shade_fraction` in [0, 1] unless that is None."""

    text: str
    shade_fraction: float | None


class LabelledCells(NamedTuple):
    """A line of a table: its header and its cells, one per column."""

    label: str
    cells: list[TableCell]


class ColumnGroup(NamedTuple):
    """A header above neighbouring columns, and the number of columns below it."""

    header: str
    column_count: int


@dataclass(frozen=True)
class ReportTable:
    """A table with row and column headers."""

    title: str
    corner_header: str
    columns: list[str]
    rows: list[LabelledCells]
    note: str = ""
    column_groups: list[ColumnGroup] = field(default_factory=list)


def make_backbone_labels(rows: Iterable[ResultRow]) -> dict[SpecAndInputSize, str]:
    """Return a label for every backbone of rows, with its input size where sizes differ."""
    keys = list(dict.fromkeys((row.backbone, row.image_size) for row in rows))
    sizes = {image_size for _, image_size in keys}
    return {(spec, px): spec if len(sizes) == 1 else f"{spec} at {px} px" for spec, px in keys}


def make_comparison_table(runs: Sequence[ReportedRun], dataset_title: str) -> ReportTable:
    """Return a table of the accuracies of runs of one dataset, one column per run."""
    rows_by_run = [index_rows_by_backbone_and_label(run.evaluation) if run.evaluation else {} for run in runs]
    columns = list_backbone_columns(runs, [row for rows in rows_by_run for row in rows.values()])
    row_keys = dict.fromkeys(
        (column, label)
        for column in columns
        for rows in rows_by_run
        for backbone, label in rows
        if backbone == column.key
    )
    table_rows = [
        LabelledCells(
            f"{column.label}{' (unseen)' if is_unseen_to_all(column, runs) else ''}: {label}",
            [
                make_cell_parenthesized_if_unseen(run, rows.get((column.key, label)), column)
                for run, rows in zip(runs, rows_by_run, strict=True)
            ],
        )
        for column, label in row_keys
    ]
    notes = [
        describe_training_mismatch(runs),
        describe_parentheses_if_any([cells for _, cells in table_rows]),
    ]
    return ReportTable(
        f"Top-1 accuracy on {dataset_title}, %",
        "trained on",
        [run.name for run in runs],
        table_rows,
        ". ".join(filter(None, notes)),
    )


@dataclass(frozen=True)
class BackboneColumn:
    """A backbone of a table of several runs.

    Attributes
    ----------
    key : (str, int)
        Its spec and input size.
    label : str
    has_own_run : bool
        Whether one of the runs was distilled on it; otherwise it is unseen to all.
    """

    key: SpecAndInputSize
    label: str
    has_own_run: bool


def list_backbone_columns(runs: Sequence[ReportedRun], rows: Sequence[ResultRow]) -> list[BackboneColumn]:
    """Return the backbones of rows; those that none of the runs was distilled on come last."""
    own_keys = {
        get_backbone_key(row)
        for run in runs
        if run.evaluation
        for row in list_result_rows(run.evaluation)
        if is_row_on_distillation_backbone(row, run.evaluation.provenance)
    }
    columns = [
        BackboneColumn(key, label, key in own_keys) for key, label in make_backbone_labels(rows).items()
    ]
    return sorted(columns, key=lambda column: not column.has_own_run)


def is_unseen_to_all(column: BackboneColumn, runs: Sequence[ReportedRun]) -> bool:
    """Return whether it is known that none of the runs was distilled on a backbone."""
    return not column.has_own_run and all(run.distilled.record.knows_backbones for run in runs)


def make_score_table(runs: Sequence[ReportedRun], dataset_title: str) -> ReportTable | None:
    """Return a table of the label-robust scores of runs of one dataset; None if no row has one."""
    scores_by_run = [
        {
            get_backbone_key(row): row.label_robust_score
            for row in (list_linear_rows(run.evaluation) if run.evaluation else ())
            if row.label_robust_score is not None
        }
        for run in runs
    ]
    linear_rows = [row for run in runs if run.evaluation for row in list_linear_rows(run.evaluation)]
    table_rows = [
        LabelledCells(
            label, [TableCell(format_percent(scores.get(key)), scores.get(key)) for scores in scores_by_run]
        )
        for key, label in make_backbone_labels(linear_rows).items()
        if any(key in scores for scores in scores_by_run)
    ]
    if not table_rows:
        return None
    return ReportTable(
        f"Label-robust score on {dataset_title}, %",
        "evaluated on",
        [run.name for run in runs],
        table_rows,
        LABEL_ROBUST_SCORE_NOTE,
    )


def make_cell_parenthesized_if_unseen(
    run: ReportedRun, row: ResultRow | None, column: BackboneColumn
) -> TableCell:
    """Return the cell of a run; accuracy of images is in parentheses if unseen to this run, not to all."""
    cell = make_accuracy_cell(row)
    if row is None or row.images != "distilled" or run.evaluation is None or not column.has_own_run:
        return cell
    provenance = run.evaluation.provenance
    if not provenance.distilled_on_known or is_row_on_distillation_backbone(row, provenance):
        return cell
    return TableCell(f"({cell.text})", cell.shade_fraction)


def describe_parentheses_if_any(cells_by_row: Iterable[Sequence[TableCell]]) -> str:
    """Return the note about cells in parentheses; an empty text if there is none."""
    has_any = any(cell.text.startswith("(") for cells in cells_by_row for cell in cells)
    return UNSEEN_CELL_NOTE if has_any else ""


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
    columns = list_backbone_columns(runs, distilled)
    if len(columns) < 2:
        return []
    unseen_count = sum(not column.has_own_run for column in columns)
    are_known = all(run.distilled.record.knows_backbones for run in runs)
    rest = "unseen" if are_known else "unknown whether distilled on"
    group_sizes = {"distilled on": len(columns) - unseen_count, rest: unseen_count}
    column_groups = (
        [ColumnGroup(title, size) for title, size in group_sizes.items() if size] if unseen_count else []
    )
    tables = []
    for mode in sorted({row.mode for row in distilled}, key=list(MODE_DESCRIPTIONS).index):
        rows = []
        for run, evaluation, measured in evaluated:
            by_backbone = {get_backbone_key(row): row for row in measured if row.mode == mode}
            specs = evaluation.provenance.format_backbone_names()
            count = format_images_per_class(run.distilled.images_per_class)
            label = f"{specs} ({run.name}, {count})" if len(evaluated) > 1 else specs
            cells = [make_cell_parenthesized_if_unseen(run, by_backbone.get(c.key), c) for c in columns]
            rows.append(LabelledCells(label, cells))
        full_data = {
            get_backbone_key(row): row
            for _, evaluation, _ in evaluated
            for row in evaluation.full_data
            if row.classifier == "linear"
        }
        notes = [
            OWN_BACKBONE_NOTE if mode in OWN_BACKBONE_BIASED_MODES else "",
            *list_earlier_training_notes([row for row in distilled if row.mode == mode]),
            describe_parentheses_if_any([cells for _, cells in rows]),
        ]
        full_data_cells = [make_accuracy_cell(full_data.get(c.key)) for c in columns]
        rows.append(LabelledCells("all real images", full_data_cells))
        tables.append(
            ReportTable(
                f"{dataset_title}, {mode}: top-1 accuracy, %",
                "distilled on ↓ evaluated on →",
                [column.label for column in columns],
                rows,
                " ".join(filter(None, notes)),
                column_groups,
            )
        )
    return tables

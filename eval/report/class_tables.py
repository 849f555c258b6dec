"""Tables by class: accuracies, and the most frequent confusions."""

from dataclasses import dataclass
from typing import NamedTuple

from sfm.eval.report.comparison_tables import LabelledCells, TableCell
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.row_selection import find_linear_full_data_row, find_row_shown_in_detail, make_row_label
from sfm.eval.result import AccuracyRow
from sfm.text import format_percent

MAX_CONFUSIONS, MAX_TABLE_CLASSES = 10, 30


@dataclass(frozen=True)
class ClassAccuracyTable:
    """The accuracy of every class, worst first."""

    title: str
    columns: list[str]
    rows: list[LabelledCells]
    note: str


class ConfusedClasses(NamedTuple):
    """Names of two classes, and how often the first was taken for the second."""

    true_class: str
    predicted_class: str
    frequency: TableCell


@dataclass(frozen=True)
class ConfusionTable:
    """The pairs of classes that one classifier confuses most."""

    title: str
    pairs: list[ConfusedClasses]


def make_classifier_title(run: ReportedRun, row: AccuracyRow, *, with_run_name: bool) -> str:
    """Return label and backbone of the classifier that a table is of, maybe with the run's name."""
    assert run.evaluation
    prefix = f"{run.name}: " if with_run_name else ""
    return f"{prefix}{make_row_label(row, run.evaluation)} on {row.backbone}"


def get_top1_by_class(row: AccuracyRow) -> list[float | None] | None:
    """Return top-1 by class; computed from the confusion matrix where an older version did not write it."""
    if row.per_class is not None or row.confusion is None:
        return row.per_class
    return [counts[c] / sum(counts) if sum(counts) else None for c, counts in enumerate(row.confusion)]


def make_class_accuracy_table(run: ReportedRun, *, with_run_name: bool) -> ClassAccuracyTable | None:
    """Return the accuracy of every class for the distilled images and for all real ones, worst first."""
    row = find_row_shown_in_detail(run.evaluation) if run.evaluation else None
    distilled = get_top1_by_class(row) if row else None
    if run.evaluation is None or row is None or distilled is None:
        return None
    full = find_linear_full_data_row(row, run.evaluation)
    columns, accuracies = ["distilled"], [distilled]
    if full and full.per_class:
        columns.append("all real")
        accuracies.append(full.per_class)
    measured = [c for c, accuracy in enumerate(distilled) if accuracy is not None]
    order = sorted(measured, key=lambda c: distilled[c] or 0.0)
    rows = [
        LabelledCells(run.distilled.class_names[c], [make_percent_cell(column[c]) for column in accuracies])
        for c in order[:MAX_TABLE_CLASSES]
    ]
    note = (
        f"The {MAX_TABLE_CLASSES} worst of {len(order):,} classes." if len(order) > MAX_TABLE_CLASSES else ""
    )
    return ClassAccuracyTable(
        make_classifier_title(run, row, with_run_name=with_run_name), columns, rows, note
    )


def make_percent_cell(fraction: float | None) -> TableCell:
    """Return the shaded cell of an accuracy in percent."""
    return TableCell(format_percent(fraction), fraction)


def make_confusion_table(run: ReportedRun, *, with_run_name: bool) -> ConfusionTable | None:
    """Return the pairs of classes that the classifier shown in detail confuses most."""
    row = find_row_shown_in_detail(run.evaluation) if run.evaluation else None
    if row is None or not row.confused:
        return None
    names = run.distilled.class_names
    pairs: list[ConfusedClasses]
    if row.confusion:
        totals = [max(1, sum(counts)) for counts in row.confusion]
        shares = [
            (count / totals[right], right, predicted)
            for right, counts in enumerate(row.confusion)
            for predicted, count in enumerate(counts)
            if right != predicted and count
        ]
        shares.sort(key=lambda item: (-item[0], item[1], item[2]))
        pairs = [
            ConfusedClasses(names[right], names[predicted], TableCell(f"{format_percent(share)} %", share))
            for share, right, predicted in shares[:MAX_CONFUSIONS]
        ]
    else:
        pairs = [
            ConfusedClasses(
                names[pair.right], names[pair.predicted], TableCell(f"{pair.count:,} times", None)
            )
            for pair in sorted(row.confused, key=lambda pair: -pair.count)[:MAX_CONFUSIONS]
        ]
    return ConfusionTable(make_classifier_title(run, row, with_run_name=with_run_name), pairs)

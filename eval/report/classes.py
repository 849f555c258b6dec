"""Figures by class: how well each is recognised, and what it is taken for."""

from dataclasses import dataclass

from sfm.eval.report.figures import full_data_of, label_of, shown_in_detail
from sfm.eval.report.read import ReportedRun
from sfm.eval.report.tables import Cell
from sfm.eval.report.words import NOT_KNOWN, percent
from sfm.eval.result import Row

MOST_CONFUSIONS, MOST_CLASSES = 10, 30


@dataclass(frozen=True)
class ByClass:
    """The accuracies of the classes, worst first."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str


@dataclass(frozen=True)
class Confusions:
    """The pairs of classes that one classifier confused most."""

    title: str
    pairs: list[tuple[str, str, Cell]]


def title_of(run: ReportedRun, row: Row, *, named: bool) -> str:
    """Say which classifier a table is of."""
    assert run.evaluation
    whose = f"{run.name}: " if named else ""
    return f"{whose}{label_of(row, run.evaluation)} on {row.backbone}"


def per_class(row: Row) -> list[float | None] | None:
    """Return top-1 by class; from the confusions where an older version did not write it."""
    if row.per_class is not None or row.confusion is None:
        return row.per_class
    return [counts[c] / sum(counts) if sum(counts) else None for c, counts in enumerate(row.confusion)]


def by_class(run: ReportedRun, *, named: bool) -> ByClass | None:
    """Show how well every class is recognised, by images alone and by all real ones, worst first."""
    row = shown_in_detail(run.evaluation) if run.evaluation else None
    own = per_class(row) if row else None
    if run.evaluation is None or row is None or own is None:
        return None
    full = full_data_of(row, run.evaluation)
    columns, figures = ["distilled"], [own]
    if full and full.per_class:
        columns.append("all real")
        figures.append(full.per_class)
    known = [c for c in range(len(own)) if own[c] is not None]
    order = sorted(known, key=lambda c: own[c] or 0.0)
    rows = [(run.run.class_names[c], [shaded(figure[c]) for figure in figures]) for c in order[:MOST_CLASSES]]
    note = f"The {MOST_CLASSES} worst of {len(order):,} classes." if len(order) > MOST_CLASSES else ""
    return ByClass(title_of(run, row, named=named), columns, rows, note)


def shaded(share: float | None) -> Cell:
    """Write an accuracy in percent."""
    return Cell(NOT_KNOWN if share is None else percent(share), share)


def confusions(run: ReportedRun, *, named: bool) -> Confusions | None:
    """List the pairs of classes that the classifier shown in detail confuses most, by the figure shown."""
    row = shown_in_detail(run.evaluation) if run.evaluation else None
    if row is None or not row.confused:
        return None
    names = run.run.class_names
    pairs: list[tuple[str, str, Cell]]
    if row.confusion:
        totals = [max(1, sum(counts)) for counts in row.confusion]
        shares = [
            (count / totals[right], right, predicted)
            for right, counts in enumerate(row.confusion)
            for predicted, count in enumerate(counts)
            if right != predicted and count
        ]
        shares.sort(key=lambda found: (-found[0], found[1], found[2]))
        pairs = [
            (names[right], names[predicted], Cell(f"{percent(share)} %", share))
            for share, right, predicted in shares[:MOST_CONFUSIONS]
        ]
    else:
        pairs = [
            (names[pair.right], names[pair.predicted], Cell(f"{pair.count:,} times", None))
            for pair in sorted(row.confused, key=lambda pair: -pair.count)[:MOST_CONFUSIONS]
        ]
    return Confusions(title_of(run, row, named=named), pairs)

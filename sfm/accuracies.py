"""The figures of an evaluation, as a person reads them, with what speaks against them."""

import sys
from collections.abc import Sequence
from typing import Any

from sfm.eval.findings import NO_BETTER, READ_ELSEWHERE
from sfm.eval.result import Provenance, Row, is_own
from sfm.tables import print_accuracy_table, print_matrix_table, shorten_path
from sfm.terminal import print_line

FOOTNOTE = (
    "* Through the backbone distilled on, inheritance shows the classifier of all real images more than the "
    "distilled ones: read `linear` there, and inheritance on other backbones."
)


def print_accuracies(record: dict[str, Any]) -> None:
    """Print the rows of an evaluation, how to read them, and what became of earlier ones."""
    provenance = Provenance.model_validate(record["provenance"])
    rows = [
        mark(row) if is_read_elsewhere(row, is_own(Row.model_validate(row), provenance)) else row
        for row in record["rows"]
    ]
    warned = warnings(record)
    notes = [note for note in record["notes"] if note not in warned]
    print_accuracy_table(record | {"rows": rows, "notes": notes})
    if rows != record["rows"]:
        print_line(FOOTNOTE)
    for change in record["changes"]:
        print_line(change)


def print_matrix(cells: Sequence[dict[str, Any]]) -> None:
    """Print the cross-backbone matrix; cells that are to be read elsewhere point to the footnote."""
    print_matrix_table([c | {"mark": " *"} if is_read_elsewhere(c, c["own_backbone"]) else c for c in cells])


def mark(row: dict[str, Any]) -> dict[str, Any]:
    """Point from a row to the footnote."""
    return row | {"mode": f"{row['mode']} *"}


def is_read_elsewhere(row: dict[str, Any], own_backbone: bool) -> bool:
    """Return whether a row says little of the images, because of the backbone it was measured on."""
    return row["mode"] in READ_ELSEWHERE and own_backbone


def print_warnings(records: Sequence[dict[str, Any]]) -> None:
    """Print on stderr where distilled images do no better than random real ones."""
    for record in records:
        for line in warnings(record):
            print_line(f"warning: {shorten_path(record['config']['run'])}: {line}", file=sys.stderr)


def warnings(record: dict[str, Any]) -> list[str]:
    """Return the notes of an evaluation that are warnings."""
    return [note for note in record["notes"] if note.startswith(NO_BETTER)]

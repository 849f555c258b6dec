"""Print the accuracies of evaluations, with footnotes and warnings."""

import sys
from collections.abc import Sequence
from typing import Any

from sfm.eval.caveats import NOT_BETTER_THAN_RANDOM, OWN_BACKBONE_BIASED_MODES
from sfm.eval.result import AccuracyRow, Provenance, is_row_on_distillation_backbone
from sfm.tables import make_path_relative_to_cwd, print_accuracy_table, print_matrix_table
from sfm.terminal import print_line

FOOTNOTE = (
    "* Through the backbone distilled on, inheritance shows the classifier of all real images more than the "
    "distilled ones: read `linear` there, and inheritance on other backbones."
)


def print_evaluation_accuracies(evaluation_record: dict[str, Any]) -> None:
    """Print the rows of an evaluation, with footnote, notes and changes."""
    provenance = Provenance.model_validate(evaluation_record["provenance"])
    rows = [
        add_footnote_sign_to_mode(row)
        if is_row_biased_by_own_backbone(
            row, is_row_on_distillation_backbone(AccuracyRow.model_validate(row), provenance)
        )
        else row
        for row in evaluation_record["rows"]
    ]
    warnings = list_evaluation_warnings(evaluation_record)
    notes = [note for note in evaluation_record["notes"] if note not in warnings]
    print_accuracy_table(evaluation_record | {"rows": rows, "notes": notes})
    if rows != evaluation_record["rows"]:
        print_line(FOOTNOTE)
    for change in evaluation_record["changes"]:
        print_line(change)


def print_cross_backbone_matrix(evaluation_rows: Sequence[dict[str, Any]]) -> None:
    """Print the cross-backbone matrix; biased cells are marked with a footnote sign."""
    print_matrix_table(
        [
            c | {"mark": " *"} if is_row_biased_by_own_backbone(c, c["own_backbone"]) else c
            for c in evaluation_rows
        ]
    )


def add_footnote_sign_to_mode(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose mode refers to the footnote."""
    return row | {"mode": f"{row['mode']} *"}


def is_row_biased_by_own_backbone(row: dict[str, Any], is_own_backbone: bool) -> bool:
    """Return whether a row shows the inherited classifier more than the images."""
    return row["mode"] in OWN_BACKBONE_BIASED_MODES and is_own_backbone


def print_evaluation_warnings(evaluation_records: Sequence[dict[str, Any]]) -> None:
    """Print warnings on stderr about distilled images that are no better than random real ones."""
    for record in evaluation_records:
        for line in list_evaluation_warnings(record):
            print_line(
                f"warning: {make_path_relative_to_cwd(record['config']['run'])}: {line}", file=sys.stderr
            )


def list_evaluation_warnings(evaluation_record: dict[str, Any]) -> list[str]:
    """Return the notes of an evaluation that are warnings."""
    return [note for note in evaluation_record["notes"] if note.startswith(NOT_BETTER_THAN_RANDOM)]

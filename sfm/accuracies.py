"""Print the accuracies of evaluations, with footnotes and warnings."""

import sys
from collections.abc import Sequence
from typing import Any

from sfm.eval.caveats import (
    LABEL_ROBUST_SCORE_NOTE,
    NOT_BETTER_THAN_RANDOM,
    OWN_BACKBONE_BIASED_MODES,
    UNKNOWN_BACKBONE_NOTE,
    UNSEEN_BACKBONE_NOTE,
    UNSEEN_CELL_NOTE,
)
from sfm.eval.result import Provenance
from sfm.tables import make_path_relative_if_below_cwd, print_accuracy_table, print_runs_by_backbones_table
from sfm.terminal import print_line
from sfm.text import format_percent, make_distinct_backbone_names

FOOTNOTE = (
    "* Through the backbone distilled on, inheritance shows the classifier of all real images more than the "
    "distilled ones: read `linear` there, and inheritance on other backbones."
)


def print_evaluation_rows_and_notes(evaluation_record: dict[str, Any]) -> None:
    """Print the rows of an evaluation, with footnote, notes and changes."""
    rows = [
        add_footnote_sign_to_mode(row) if is_row_biased_by_own_backbone(row, row["unseen"] is False) else row
        for row in evaluation_record["rows"]
    ]
    warnings = list_evaluation_warnings(evaluation_record)
    notes = [note for note in evaluation_record["notes"] if note not in warnings]
    result_rows = make_rows_with_distinct_backbone_names([*rows, *evaluation_record["full_data"]])
    # None: it is unknown what the images were distilled on.
    for unseen in (None, False, True):
        block = [row for row in result_rows if row["unseen"] is unseen]
        if block:
            print_accuracy_table(
                make_accuracy_table_title(evaluation_record, for_unseen_backbones=unseen is True), block
            )
    scores = [
        f"{row['backbone']} {format_percent(row['label_robust_score'])} %"
        for row in result_rows
        if row.get("label_robust_score") is not None
    ]
    if scores:
        print_line(f"LRS of the distilled images: {', '.join(scores)}")
        print_line(LABEL_ROBUST_SCORE_NOTE)
    if any(row["unseen"] is None for row in result_rows):
        print_line(UNKNOWN_BACKBONE_NOTE)
    if any(row["unseen"] for row in result_rows):
        print_line(UNSEEN_BACKBONE_NOTE)
    for note in notes:
        print_line(f"note: {note}")
    if rows != evaluation_record["rows"]:
        print_line(FOOTNOTE)
    for change in evaluation_record["changes"]:
        print_line(change)


def make_accuracy_table_title(evaluation_record: dict[str, Any], *, for_unseen_backbones: bool) -> str:
    """Return the title of a table of accuracies: the run, and the backbones that it was distilled on."""
    provenance = Provenance.model_validate(evaluation_record["provenance"])
    specs = provenance.format_backbone_names() if provenance.distilled_on_known else "an unknown backbone"
    return (
        f"Accuracy on {'unseen backbones' if for_unseen_backbones else 'held-out features'}: "
        f"{make_path_relative_if_below_cwd(evaluation_record['config']['run'])}, distilled on {specs}"
    )


def print_cross_backbone_matrix(evaluation_rows: Sequence[dict[str, Any]]) -> None:
    """Print the cross-backbone matrix, with a table of its own for backbones that are unseen to all runs.

    Biased cells are marked with a footnote sign. In the first table, accuracies on backbones that are unseen
    to their run are in parentheses.
    """
    cells = make_rows_with_distinct_backbone_names(evaluation_rows)
    own_backbones = {cell["backbone"] for cell in cells if cell["own_backbone"]}
    seen_cells = [
        cell
        | {"mark": " *" if is_row_biased_by_own_backbone(cell, cell["own_backbone"]) else ""}
        | {"in_parentheses": cell["unseen"] is True}
        for cell in cells
        if cell["backbone"] in own_backbones
    ]
    unseen_cells = [cell for cell in cells if cell["backbone"] not in own_backbones]
    if seen_cells:
        print_runs_by_backbones_table("Top-1 %, by the backbone evaluated on", seen_cells)
    if any(cell["unseen"] for cell in seen_cells):
        print_line(UNSEEN_CELL_NOTE)
    if unseen_cells:
        are_unseen = all(cell["unseen"] for cell in unseen_cells)
        title = "backbones that are unseen to all of these runs" if are_unseen else "other backbones"
        print_runs_by_backbones_table(f"Top-1 %, {title}", unseen_cells)
    if any(cell["unseen"] is None for cell in cells):
        print_line(UNKNOWN_BACKBONE_NOTE)
    scored = [cell for cell in cells if cell["label_robust_score"] is not None]
    if scored:
        print_runs_by_backbones_table(
            "Label-robust score of DD-Ranking, by the backbone evaluated on",
            [cell | {"shown": format_percent(cell["label_robust_score"])} for cell in scored],
        )


def make_rows_with_distinct_backbone_names(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose backbones are named with the input size where a spec has several."""
    names = make_distinct_backbone_names((row["backbone"], row["image_size"]) for row in rows)
    return [row | {"backbone": name} for row, name in zip(rows, names, strict=True)]


def add_footnote_sign_to_mode(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose mode refers to the footnote."""
    return row | {"mode": f"{row['mode']} *"}


def is_row_biased_by_own_backbone(row: dict[str, Any], is_evaluated_on_own_backbone: bool) -> bool:
    """Return whether a row shows the inherited classifier more than the images."""
    return row["mode"] in OWN_BACKBONE_BIASED_MODES and is_evaluated_on_own_backbone


def print_evaluation_warnings(evaluation_records: Sequence[dict[str, Any]]) -> None:
    """Print warnings on stderr about distilled images that are no better than random real ones."""
    for record in evaluation_records:
        for line in list_evaluation_warnings(record):
            print_line(
                f"warning: {make_path_relative_if_below_cwd(record['config']['run'])}: {line}",
                file=sys.stderr,
            )


def list_evaluation_warnings(evaluation_record: dict[str, Any]) -> list[str]:
    """Return the notes of an evaluation that are warnings."""
    return [note for note in evaluation_record["notes"] if note.startswith(NOT_BETTER_THAN_RANDOM)]

"""Combine the rows of a command with those of earlier commands in ``evaluation.json``."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sfm.errors import InputError
from sfm.eval.caveats import CAVEAT_STARTS, FRESH_HEAD_MODES, list_caveats
from sfm.eval.config import CLOSED_FORM_MODES, EvaluateConfig, RowTrainingOptions, make_row_training_options
from sfm.eval.dd_ranking import add_label_robust_scores
from sfm.eval.result import (
    AccuracyRow,
    EarlierCommand,
    Evaluation,
    is_row_of_earlier_training,
    mark_unseen_rows,
)
from sfm.untrusted_files import MAX_EVALUATION_BYTES, OversizeError, read_bounded_file

RowIdentity = tuple[Any, ...]


def read_evaluation_if_exists(path: Path) -> Evaluation | None:
    """Read an ``evaluation.json`` of this or an older version; None if there is none.

    Raises
    ------
    InputError
        If it cannot be read, or is not an evaluation.
    """
    try:
        return Evaluation.model_validate_json(read_bounded_file(path, MAX_EVALUATION_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; move it away") from error
    except (OversizeError, ValidationError) as error:
        raise InputError(f"{path} is not what this version of `sfm evaluate` writes: move it away") from error


def make_row_identity(row: AccuracyRow) -> RowIdentity:
    """Return the values in which two rows of the same images agree if the later one replaces the other."""
    protocol = (row.epochs, row.views, row.seed, row.seeds, row.projector_init)
    options = (row.crop_edge, row.kd_temperature, row.kd_weight)
    return (row.images, row.backbone_hash, row.image_size, row.mode, *protocol, *options)


def combine_evaluations(
    current: Evaluation, previous: Evaluation | None, distilled_image_count: int
) -> Evaluation:
    """Return a command's rows together with those of earlier commands that it did not measure again.

    Rows of other images than the command's, or of another entry of the store, are dropped.

    Parameters
    ----------
    current, previous : Evaluation
        The command's result, and the previous content of the file.
    distilled_image_count : int
        Number of distilled images.

    Returns
    -------
    Evaluation
        The command's rows first; its `changes` list replaced and dropped rows.
    """
    current = fill_missing_options_of_rows(current, distilled_image_count)
    if previous is None:
        return current
    if get_combinable_data_key(previous) != get_combinable_data_key(current):
        dropped = format_row_count(len(previous.rows))
        change = f"dropped: {dropped} of images or data that are no longer those of the run"
        return current.model_copy(update={"changes": [change]})
    previous = fill_missing_options_of_rows(previous, distilled_image_count)
    stale_hashes = find_stale_backbone_hashes(previous, current)
    valid_rows: list[AccuracyRow] = []
    stale_rows: list[AccuracyRow] = []
    superseded_rows: list[AccuracyRow] = []
    for row in previous.rows:
        is_stale = row.backbone_hash in stale_hashes or was_trained_on_stale_labels(row, current)
        is_superseded = is_superseded_row_of_earlier_training(row, current)
        (stale_rows if is_stale else superseded_rows if is_superseded else valid_rows).append(row)
    new_rows = {make_row_identity(row): row for row in current.rows}
    replaced = [
        (row, new_rows[make_row_identity(row)]) for row in valid_rows if make_row_identity(row) in new_rows
    ]
    kept_rows = [row for row in valid_rows if make_row_identity(row) not in new_rows]
    rows = [*current.rows, *kept_rows]

    entries, full_data = list(current.provenance.entries), list(current.full_data)
    kept_hashes = {row.backbone_hash for row in kept_rows} - {e.backbone_hash for e in entries}
    kept_entries = [e for e in previous.provenance.entries if e.backbone_hash in kept_hashes]
    kept_backbones = {(e.backbone, e.image_size) for e in kept_entries}
    entries += kept_entries
    full_data += [f for f in previous.full_data if (f.backbone, f.image_size) in kept_backbones]
    notes = [
        *drop_caveat_notes(current.notes),
        *(note for note in drop_caveat_notes(previous.notes) if not is_left_out_note_outdated(note, rows)),
        *list_caveats(rows, full_data, entries),
    ]
    earlier = [make_earlier_command(previous), *previous.earlier]
    combined = current.model_copy(
        update={
            "rows": rows,
            "full_data": full_data,
            "notes": list(dict.fromkeys(notes)),
            "provenance": current.provenance.model_copy(update={"entries": entries}),
            "earlier": [
                command
                for command in earlier
                if may_have_measured_any_row(command, kept_rows, distilled_image_count)
            ],
            "changes": describe_row_changes(replaced, stale_rows, superseded_rows, kept_rows),
        }
    )
    return add_label_robust_scores(mark_unseen_rows(combined))


def get_combinable_data_key(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the values in which two evaluations agree whose rows can stand in one file."""
    p = evaluation.provenance
    return p.images, p.fingerprint, p.role, p.distilled_from


def was_trained_on_stale_labels(row: AccuracyRow, current: Evaluation) -> bool:
    """Return whether a row was trained on other soft labels than the command's rows."""
    current_labels = {other.labels for other in current.rows if other.labels}
    return row.labels is not None and bool(current_labels) and row.labels not in current_labels


def is_superseded_row_of_earlier_training(row: AccuracyRow, current: Evaluation) -> bool:
    """Return whether the command measured the same mode, whose training has changed, on the backbone."""
    return is_row_of_earlier_training(row) and any(
        (other.mode, other.backbone_hash) == (row.mode, row.backbone_hash) for other in current.rows
    )


def find_stale_backbone_hashes(previous: Evaluation, current: Evaluation) -> set[str]:
    """Return the hashes of backbones whose entry was replaced, or whose name denotes another backbone now."""
    by_hash = {e.backbone_hash: e.entry_digest for e in current.provenance.entries}
    by_name = {(e.backbone, e.image_size): e.backbone_hash for e in current.provenance.entries}
    return {
        e.backbone_hash
        for e in previous.provenance.entries
        if by_hash.get(e.backbone_hash, e.entry_digest) != e.entry_digest
        or by_name.get((e.backbone, e.image_size), e.backbone_hash) != e.backbone_hash
    }


def fill_missing_options_of_rows(evaluation: Evaluation, distilled_image_count: int) -> Evaluation:
    """Return an evaluation whose rows have a protocol; older files have it in their config alone."""
    rows = [fill_missing_row_options(row, evaluation, distilled_image_count) for row in evaluation.rows]
    return evaluation if rows == evaluation.rows else evaluation.model_copy(update={"rows": rows})


def fill_missing_row_options(
    row: AccuracyRow, evaluation: Evaluation, distilled_image_count: int
) -> AccuracyRow:
    """Return a row with backbone hash and protocol; a row of an older version takes them from its file.

    Projectors of ``inherit`` started at zero before there was a choice.
    """
    if row.mode == "inherit" and row.projector_init is None:
        row = row.model_copy(update={"projector_init": "zero"})
    if row.backbone_hash is not None:
        return row
    hashes = {(e.backbone, e.image_size): e.backbone_hash for e in evaluation.provenance.entries}
    missing: dict[str, Any] = {"backbone_hash": hashes.get((row.backbone, row.image_size))}
    try:
        config = EvaluateConfig.model_validate(evaluation.config)
    except ValidationError:
        return row.model_copy(update=missing)
    options = asdict(make_row_training_options(config, row.mode, distilled_image_count))
    return row.model_copy(update=missing | options | {"projector_init": row.projector_init})


def describe_row_changes(
    replaced_pairs: Sequence[tuple[AccuracyRow, AccuracyRow]],
    stale_rows: Sequence[AccuracyRow],
    superseded_rows: Sequence[AccuracyRow],
    kept_rows: Sequence[AccuracyRow],
) -> list[str]:
    """Return a line about each change to rows that the file held before.

    Parameters
    ----------
    replaced_pairs : sequence of (AccuracyRow, AccuracyRow)
        Rows that were measured again, before and now.
    stale_rows : sequence of AccuracyRow
        Rows of entries that the store replaced, or of soft labels that were.
    superseded_rows : sequence of AccuracyRow
        See :func:`is_superseded_row_of_earlier_training`.
    kept_rows : sequence of AccuracyRow
    """
    changed = [(old, new) for old, new in replaced_pairs if (old.top1, old.top5) != (new.top1, new.top5)]
    lines = [
        f"replaced: {describe_row(old)}: {100 * old.top1_mean:.1f} -> {100 * new.top1_mean:.1f}"
        for old, new in changed
    ]
    if len(changed) < len(replaced_pairs):
        lines.append(f"measured again, and the same: {format_row_count(len(replaced_pairs) - len(changed))}")
    if stale_rows:
        lines.append(
            f"dropped: {format_row_count(len(stale_rows))} of entries or labels that were replaced since"
        )
    if superseded_rows:
        lines.append(
            f"dropped: {format_row_count(len(superseded_rows))} of joint or stage as an earlier version "
            f"trained them"
        )
    if kept_rows:
        lines.append(f"kept: {format_row_count(len(kept_rows))} of earlier evaluations")
    return lines


def describe_row(row: AccuracyRow) -> str:
    """Return a short description of a row: images, backbone, mode, seeds."""
    images = "" if row.images in ("distilled", "none") else f"{row.images} real images, "
    return f"{images}{row.backbone} {row.mode}, {row.seeds} seed{'' if row.seeds == 1 else 's'}"


def format_row_count(count: int) -> str:
    """Return a number of rows with its noun: "1 row", "3 rows"."""
    return f"{count} row{'' if count == 1 else 's'}"


def drop_caveat_notes(notes: Sequence[str]) -> list[str]:
    """Return the notes without those that :func:`~sfm.eval.caveats.list_caveats` writes anew."""
    return [note for note in notes if not note.startswith(CAVEAT_STARTS)]


def is_left_out_note_outdated(earlier_note: str, current_rows: Sequence[AccuracyRow]) -> bool:
    """Return whether an earlier note says that a backbone was left out that has rows now."""
    return any(earlier_note.startswith(f"{row.backbone} is left out: ") for row in current_rows)


def make_earlier_command(evaluation: Evaluation) -> EarlierCommand:
    """Return the record of a command that the file keeps after a later one."""
    provenance = evaluation.provenance
    backbones = provenance.evaluated_on
    return EarlierCommand(
        config=evaluation.config,
        backbones=[e.backbone_hash for e in provenance.entries] if backbones is None else backbones,
        versions=provenance.versions,
        device=provenance.device,
        seconds=provenance.seconds,
    )


def may_have_measured_any_row(
    command: EarlierCommand, rows: Sequence[AccuracyRow], distilled_image_count: int
) -> bool:
    """Return whether one of the kept rows can have been measured by an earlier command."""
    candidates = [row for row in rows if row.backbone_hash in command.backbones]
    try:
        config = EvaluateConfig.model_validate(command.config)
    except ValidationError:
        return bool(candidates)
    return any(is_row_made_by_config(row, config, distilled_image_count) for row in candidates)


def is_row_made_by_config(row: AccuracyRow, config: EvaluateConfig, distilled_image_count: int) -> bool:
    """Return whether a config measures such a row; those of real images are of `linear` or `soft`."""
    modes = list(config.mode)
    if row.images not in ("distilled", "none"):
        modes = ["linear", *(mode for mode in config.mode if mode in FRESH_HEAD_MODES)]
    seeds = 1 if row.mode in CLOSED_FORM_MODES else config.seeds
    protocol = RowTrainingOptions(
        epochs=row.epochs,
        views=row.views,
        seed=row.seed,
        crop_edge=row.crop_edge,
        kd_temperature=row.kd_temperature,
        kd_weight=row.kd_weight,
        projector_init=row.projector_init,
    )
    expected_protocol = make_row_training_options(config, row.mode, distilled_image_count)
    if is_row_of_earlier_training(row):
        expected_protocol = replace(expected_protocol, projector_init=None)
    return row.mode in modes and row.seeds == seeds and protocol == expected_protocol

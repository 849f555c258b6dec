"""Evaluations of the same images add up: what later commands measure joins what earlier ones did."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sfm.errors import InputError
from sfm.eval.config import NOT_RANDOM, EvaluateConfig, Protocol, protocol_of
from sfm.eval.findings import ABOVE_FULL_DATA, NO_BETTER, findings
from sfm.eval.result import EarlierEvaluation, Evaluation, Row
from sfm.untrusted_files import MAX_EVALUATION_BYTES, OversizeError, read_bounded_file

Key = tuple[Any, ...]


def read_result(path: Path) -> Evaluation | None:
    """Read what evaluations have found so far, of this version or an older one; None if there was none.

    Raises
    ------
    InputError
        If it cannot be read, or is something else.
    """
    try:
        return Evaluation.model_validate_json(read_bounded_file(path, MAX_EVALUATION_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; move it away") from error
    except (OversizeError, ValidationError) as error:
        raise InputError(f"{path} is not what this version of `sfm evaluate` writes: move it away") from error


def key_of(row: Row) -> Key:
    """Return what two figures of the same images have in common if the later one replaces the other."""
    protocol = (row.epochs, row.views, row.seed, row.seeds)
    return (row.images, row.backbone_hash, row.image_size, row.mode, *protocol)


def accumulate(found: Evaluation, before: Evaluation | None, images: int) -> Evaluation:
    """Return what a command found together with the rows of earlier ones that it did not measure again.

    Rows of other images than the command's, or of another entry of the store, are dropped.

    Parameters
    ----------
    found, before : Evaluation
        What the command found, and what the file held until now.
    images : int
        How many were distilled.

    Returns
    -------
    Evaluation
        The command's rows first; its `changes` say what was replaced and dropped.
    """
    found = with_protocols(found, images)
    if before is None:
        return found
    if data_of(before) != data_of(found):
        line = f"dropped: {counted(len(before.rows))} of images or data that are no longer those of the run"
        return found.model_copy(update={"changes": [line]})
    stale = stale_hashes(before, found)
    before = with_protocols(before, images)
    old = before.rows
    gone = [row for row in old if row.backbone_hash in stale]
    new = {key_of(row): row for row in found.rows}
    again = [(row, new[key_of(row)]) for row in old if row.backbone_hash not in stale and key_of(row) in new]
    kept = [row for row in old if row.backbone_hash not in stale and key_of(row) not in new]
    rows = [*found.rows, *kept]

    entries, full_data = list(found.provenance.entries), list(found.full_data)
    own = {e.backbone_hash for e in entries}
    still = {row.backbone_hash for row in kept} - own
    entries += [e for e in before.provenance.entries if e.backbone_hash in still]
    places = {(e.backbone, e.image_size) for e in before.provenance.entries if e.backbone_hash in still}
    full_data += [f for f in before.full_data if (f.backbone, f.image_size) in places]
    notes = [*other_notes(found), *(note for note in other_notes(before) if holds(note, rows))]
    notes += findings(rows, full_data, entries)
    return found.model_copy(
        update={
            "rows": rows,
            "full_data": full_data,
            "notes": list(dict.fromkeys(notes)),
            "provenance": found.provenance.model_copy(update={"entries": entries}),
            "earlier": [
                one for one in (earlier_command(before), *before.earlier) if still_counts(one, kept, images)
            ],
            "changes": changes(again, gone, kept),
        }
    )


def data_of(evaluation: Evaluation) -> tuple[str, ...]:
    """Return what two evaluations have in common whose rows can stand in one file."""
    p = evaluation.provenance
    return p.images, p.fingerprint, p.role, p.distilled_from


def stale_hashes(before: Evaluation, found: Evaluation) -> set[str]:
    """Return the hashes of backbones that have another entry now, or whose name is another's now."""
    by_hash = {e.backbone_hash: e.entry_digest for e in found.provenance.entries}
    by_name = {(e.backbone, e.image_size): e.backbone_hash for e in found.provenance.entries}
    return {
        e.backbone_hash
        for e in before.provenance.entries
        if by_hash.get(e.backbone_hash, e.entry_digest) != e.entry_digest
        or by_name.get((e.backbone, e.image_size), e.backbone_hash) != e.backbone_hash
    }


def with_protocols(evaluation: Evaluation, images: int) -> Evaluation:
    """Return an evaluation of so many images whose rows say how they were measured, as older ones do not."""
    rows = [with_protocol(row, evaluation, images) for row in evaluation.rows]
    return evaluation if rows == evaluation.rows else evaluation.model_copy(update={"rows": rows})


def with_protocol(row: Row, evaluation: Evaluation, images: int) -> Row:
    """Return a row of an older version with what it left to the configuration of its file."""
    if row.backbone_hash is not None:
        return row
    hashes = {(e.backbone, e.image_size): e.backbone_hash for e in evaluation.provenance.entries}
    told: dict[str, Any] = {"backbone_hash": hashes.get((row.backbone, row.image_size))}
    try:
        config = EvaluateConfig.model_validate(evaluation.config)
    except ValidationError:
        return row.model_copy(update=told)
    return row.model_copy(update=told | asdict(protocol_of(config, row.mode, images)))


def changes(again: Sequence[tuple[Row, Row]], gone: Sequence[Row], kept: Sequence[Row]) -> list[str]:
    """Say what became of rows that were in the file before."""
    moved = [(old, new) for old, new in again if (old.top1, old.top5) != (new.top1, new.top5)]
    lines = [
        f"replaced: {named(old)}: {100 * old.top1_mean:.1f} -> {100 * new.top1_mean:.1f}"
        for old, new in moved
    ]
    if len(moved) < len(again):
        lines.append(f"measured again, and the same: {counted(len(again) - len(moved))}")
    if gone:
        lines.append(f"dropped: {counted(len(gone))} of entries that the store replaced")
    if kept:
        lines.append(f"kept: {counted(len(kept))} of earlier evaluations")
    return lines


def named(row: Row) -> str:
    """Name a row in few words."""
    images = "" if row.images in ("distilled", "none") else f"{row.images} real images, "
    return f"{images}{row.backbone} {row.mode}, {row.seeds} seed{'' if row.seeds == 1 else 's'}"


def counted(rows: int) -> str:
    """Write a number of rows."""
    return f"{rows} row{'' if rows == 1 else 's'}"


def other_notes(evaluation: Evaluation) -> list[str]:
    """Return the notes that do not follow from the figures."""
    return [note for note in evaluation.notes if not note.startswith((NO_BETTER, ABOVE_FULL_DATA))]


def holds(note: str, rows: Sequence[Row]) -> bool:
    """Return whether an earlier note is still true: a backbone that was left out may be there now."""
    return not any(note.startswith(f"{row.backbone} is left out: ") for row in rows)


def earlier_command(evaluation: Evaluation) -> EarlierEvaluation:
    """Return what is kept of a command once another one follows it."""
    provenance = evaluation.provenance
    own = provenance.evaluated_on
    return EarlierEvaluation(
        config=evaluation.config,
        backbones=[e.backbone_hash for e in provenance.entries] if own is None else own,
        versions=provenance.versions,
        device=provenance.device,
        seconds=provenance.seconds,
    )


def still_counts(earlier: EarlierEvaluation, kept: Sequence[Row], images: int) -> bool:
    """Return whether one of the rows kept, of so many images each, can be of an earlier command."""
    own = [row for row in kept if row.backbone_hash in earlier.backbones]
    try:
        config = EvaluateConfig.model_validate(earlier.config)
    except ValidationError:
        return bool(own)
    return any(is_asked_for(row, config, images) for row in own)


def is_asked_for(row: Row, config: EvaluateConfig, images: int) -> bool:
    """Return whether a command gives such a row; real images are trained on in mode `linear`, unasked."""
    modes = config.mode if row.images in ("distilled", "none") else ["linear"]
    seeds = 1 if row.mode in NOT_RANDOM else config.seeds
    protocol = Protocol(row.epochs, row.views, row.seed)
    return row.mode in modes and row.seeds == seeds and protocol == protocol_of(config, row.mode, images)

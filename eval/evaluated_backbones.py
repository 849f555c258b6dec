"""Load the backbones to evaluate on, and open their entries in the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sfm.backbones.build import Backbone
from sfm.backbones.spec import parse_spec
from sfm.errors import InputError
from sfm.eval.class_subset import ClassSubsetStatistics, select_statistics_of_run_classes
from sfm.eval.config import ALL_BACKBONES, EvaluateConfig
from sfm.eval.distilled_run import DistillationBackbone, DistilledRun, RunRecord
from sfm.eval.result import NoteText
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
from sfm.stats_store.entry_selection import (
    NotExtractedError,
    describe_entry,
    open_entry_of_backbone,
    select_model_summaries_of_one_size,
)
from sfm.stats_store.extract_command import format_extract_command
from sfm.stats_store.store import Entry, Store

LoadBackbone = Callable[[str, int | None], Backbone]
"""Returns the backbone of a spec at an input size; each is loaded once."""


@dataclass(frozen=True)
class EvaluatedBackbone:
    """A backbone to evaluate on, and the statistics of the run's classes through it."""

    backbone: Backbone
    statistics: ClassSubsetStatistics


class RequestedBackbone(NamedTuple):
    """A backbone that an evaluation was asked for.

    Attributes
    ----------
    spec : str
    image_size : int or None
        Input size in pixels; None if it follows from what the store holds.
    is_required : bool
        Whether it may not be left out.
    """

    spec: str
    image_size: int | None
    is_required: bool


def open_source_statistics(
    store: Store, run: DistilledRun, run_directory: Path
) -> list[ClassSubsetStatistics]:
    """Return the statistics of the run's classes from every entry that it was distilled from.

    Raises
    ------
    InputError
        If the store does not hold one of them, they are of different data, or their classes or backbones are
        not those of the run.
    """
    all_source_statistics = [
        open_statistics_of_backbone(store, run, distillation_backbone, run_directory)
        for distillation_backbone in run.record.backbones
    ]
    first = all_source_statistics[0].entry.summary
    for other in (source.entry.summary for source in all_source_statistics[1:]):
        if (other.fingerprint, other.role) != (first.fingerprint, first.role):
            raise InputError(
                f"{run_directory / 'run.json'} names entries of different data: {describe_entry(first)}; "
                f"{describe_entry(other)}"
            )
    return all_source_statistics


def open_statistics_of_backbone(
    store: Store, run: DistilledRun, distillation_backbone: DistillationBackbone, run_directory: Path
) -> ClassSubsetStatistics:
    """Return the statistics of one backbone distilled on; raises as :func:`open_source_statistics`."""
    record, digest = run.record, distillation_backbone.entry_digest
    known = list_visible_and_pinned_summaries(store, f"{record.dataset}@{digest}")
    matching = [s for s in known if s.entry_digest == digest]
    if not matching:
        raise InputError(
            f"{run_directory} was distilled from {record.dataset}@{digest[:12]} of "
            f"{record.store}, and {store.url} holds no such entry: it is a run directory from another store, "
            f"or the entry was replaced since"
        )
    statistics = select_statistics_of_run_classes(store.open_entry(matching[0]), run.class_ids, run_directory)
    if (distillation_backbone.backbone.hash, distillation_backbone.image_size) != (
        statistics.entry.backbone.hash,
        matching[0].image_size,
    ):
        raise InputError(
            f"{run_directory / 'run.json'} names another backbone than the entry that the run was "
            f"distilled from"
        )
    return statistics


def load_evaluated_backbones(
    config: EvaluateConfig,
    record: RunRecord,
    store: Store,
    summaries: Sequence[Summary],
    all_source_statistics: Sequence[ClassSubsetStatistics],
    load_backbone: LoadBackbone,
) -> tuple[list[EvaluatedBackbone], list[NoteText]]:
    """Load the backbones to evaluate on, and open their entries of the data the run was distilled from.

    Same data is same fingerprint and same role. Of several variants of an entry, the one with the options of
    the run's entry (of the same backbone, or else the first) is taken. Of ``all`` backbones, those that
    cannot be loaded here are left out.

    Returns
    -------
    list of EvaluatedBackbone
    list of str
        Notes about backbones that are left out, with the reason.

    Raises
    ------
    InputError
        If there is no such entry, several match, a backbone is not the one of its entry, or there are no
        held-out features.
    """
    source = all_source_statistics[0].entry.summary
    comparable = [s for s in summaries if s.fingerprint == source.fingerprint and s.role == source.role]
    eval_backbones: dict[str, EvaluatedBackbone] = {}
    notes: list[str] = []
    for requested in list_requested_backbones(config, record, comparable):
        try:
            eval_backbone = load_evaluated_backbone(
                requested, record, store, comparable, all_source_statistics, load_backbone
            )
        except InputError as error:
            if requested.is_required:
                raise
            notes.append(f"{requested.spec} is left out: {error}.")
        else:
            eval_backbones.setdefault(eval_backbone.backbone.card.hash, eval_backbone)
    return list(eval_backbones.values()), notes


def list_requested_backbones(
    config: EvaluateConfig, record: RunRecord, comparable_summaries: Sequence[Summary]
) -> list[RequestedBackbone]:
    """Return the backbones to evaluate on; by default those that the run was distilled on.

    ``all`` stands for the backbones distilled on, by the specs in ``run.json``, and the others of the store,
    by its specs; ordered by name, which gives every run the same columns.
    """
    named = list(dict.fromkeys(spec for spec in config.backbone if spec != ALL_BACKBONES))
    own = [
        (b.backbone.spec, RequestedBackbone(b.spec, config.image_size or b.image_size, True))
        for b in record.backbones
    ]
    named_backbones: list[RequestedBackbone] = []
    for spec in named:
        same_spec = [requested for _, requested in own if requested.spec == spec]
        named_backbones += same_spec or [RequestedBackbone(spec, config.image_size, True)]
    if ALL_BACKBONES not in config.backbone:
        return list(dict.fromkeys(named_backbones or [requested for _, requested in own]))
    own_names, own_hashes = {name for name, _ in own}, {b.backbone.hash for b in record.backbones}
    others = [
        (s.backbone, RequestedBackbone(s.backbone, config.image_size, s.backbone in named))
        for s in comparable_summaries
        if s.backbone_hash not in own_hashes and s.backbone not in own_names
    ]
    by_name = sorted([*own, *others], key=lambda named_request: named_request[0])
    return list(dict.fromkeys([*(requested for _, requested in by_name), *named_backbones]))


def load_evaluated_backbone(
    requested: RequestedBackbone,
    record: RunRecord,
    store: Store,
    comparable_summaries: Sequence[Summary],
    all_source_statistics: Sequence[ClassSubsetStatistics],
    load_backbone: LoadBackbone,
) -> EvaluatedBackbone:
    """Load one backbone and open its entry; raises as :func:`load_evaluated_backbones`."""
    source = all_source_statistics[0].entry.summary
    dataset = source.dataset + ("@tuning" if source.role == "tuning" else "")
    model = parse_spec(requested.spec).model
    stored_sizes = {s.image_size for s in comparable_summaries if s.model == model}
    own_sizes = [b.image_size for b in record.backbones if b.backbone.model == model]
    size = requested.image_size or next(
        (size for size in (*own_sizes, record.image_size) if size in stored_sizes), None
    )
    try:
        candidates = select_model_summaries_of_one_size(
            comparable_summaries, dataset=dataset, model=model, image_size=size
        )
    except NotExtractedError as error:
        line = format_extract_command(
            store, source, requested.spec, requested.image_size or record.image_size
        )
        raise InputError(f"{error}; to add it: {line}") from None
    backbone = load_backbone(requested.spec, candidates[0].image_size)
    options = select_matching_or_first_statistics(
        all_source_statistics, backbone.card.hash
    ).entry.summary.options
    same_options = [s for s in candidates if (s.backbone_hash, s.options) == (backbone.card.hash, options)]
    entry = open_entry_of_backbone(store, same_options or candidates, backbone.card)
    require_held_out_features(entry)
    return EvaluatedBackbone(backbone, ClassSubsetStatistics(entry, all_source_statistics[0].class_indices))


def select_matching_or_first_statistics(
    all_source_statistics: Sequence[ClassSubsetStatistics], backbone_hash: str
) -> ClassSubsetStatistics:
    """Return the statistics of a backbone if it is one distilled on, and else those of the first."""
    return next(
        (source for source in all_source_statistics if source.entry.backbone.hash == backbone_hash),
        all_source_statistics[0],
    )


def require_held_out_features(entry: Entry) -> None:
    """Refuse an entry without held-out features.

    Raises
    ------
    InputError
        If it has none.
    """
    if entry.dataset.test_samples == 0 or "test/feature" not in entry:
        raise InputError(
            f"the entry of {entry.dataset.name} through {entry.backbone.spec} has no held-out features to "
            f"evaluate on: extract from a source with a test split"
        )


def reuse_or_load_teacher_backbone(
    record: RunRecord,
    store: Store,
    teacher_statistics: ClassSubsetStatistics,
    eval_backbones: Sequence[EvaluatedBackbone],
    load_backbone: LoadBackbone,
) -> EvaluatedBackbone:
    """Return the first backbone distilled on with its entry; it is loaded unless it is evaluated on.

    Raises
    ------
    InputError
        If the backbone that the run's spec names here is not the one distilled on.
    """
    for eval_backbone in eval_backbones:
        if eval_backbone.backbone.card.hash == teacher_statistics.entry.backbone.hash:
            return EvaluatedBackbone(eval_backbone.backbone, teacher_statistics)
    backbone = load_backbone(record.backbones[0].spec, record.image_size)
    return EvaluatedBackbone(
        backbone,
        ClassSubsetStatistics(
            open_entry_of_backbone(store, [teacher_statistics.entry.summary], backbone.card),
            teacher_statistics.class_indices,
        ),
    )

"""Load the backbones to evaluate on, and open their entries in the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfm.backbones.build import Backbone
from sfm.backbones.spec import parse_spec
from sfm.errors import InputError
from sfm.eval.class_subset import ClassSubsetStatistics, select_run_statistics
from sfm.eval.config import ALL_BACKBONES, EvaluateConfig
from sfm.eval.distilled_run import DistilledRun, RunRecord
from sfm.eval.result import NoteText
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_selection import (
    NotExtractedError,
    filter_summaries_by_model,
    open_entry_of_backbone,
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


def open_source_statistics(
    store: Store, summaries: Sequence[Summary], run: DistilledRun, run_directory: Path
) -> ClassSubsetStatistics:
    """Return the statistics of the run's classes from the entry that it was distilled from.

    Raises
    ------
    InputError
        If the store does not hold it, or its classes are not those of the run.
    """
    record = run.record
    matching = [s for s in summaries if s.entry_digest == record.entry_digest]
    if not matching:
        raise InputError(
            f"{run_directory} was distilled from {record.dataset}@{record.entry_digest[:12]} of "
            f"{record.store}, and {store.url} holds no such entry: it is a run directory from another store, "
            f"or the entry was replaced since"
        )
    statistics = select_run_statistics(store.open_entry(matching[0]), run.class_ids, run_directory)
    if (record.backbone.hash, record.image_size) != (statistics.entry.backbone.hash, matching[0].image_size):
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
    source_statistics: ClassSubsetStatistics,
    load_backbone: LoadBackbone,
) -> tuple[list[EvaluatedBackbone], list[NoteText]]:
    """Load the backbones to evaluate on, and open their entries of the data the run was distilled from.

    Same data is same fingerprint and same role. Of several variants of an entry, the one with the options of
    the run's entry is taken. Of ``all`` backbones, those that cannot be loaded here are left out.

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
    source = source_statistics.entry.summary
    comparable = [s for s in summaries if s.fingerprint == source.fingerprint and s.role == source.role]
    eval_backbones: dict[str, EvaluatedBackbone] = {}
    notes: list[str] = []
    for spec, is_named in list_specs_and_whether_named(config, record, comparable):
        try:
            eval_backbone = load_evaluated_backbone(
                spec, config, record, store, comparable, source_statistics, load_backbone
            )
        except InputError as error:
            if is_named:
                raise
            notes.append(f"{spec} is left out: {error}.")
        else:
            eval_backbones.setdefault(eval_backbone.backbone.card.hash, eval_backbone)
    return list(eval_backbones.values()), notes


def list_specs_and_whether_named(
    config: EvaluateConfig, record: RunRecord, comparable_summaries: Sequence[Summary]
) -> list[tuple[str, bool]]:
    """Return the specs to evaluate on, and whether each was named on the command line.

    ``all`` stands for the backbone distilled on, by the spec in ``run.json``, and the others of the store, by
    its specs; ordered by name, which gives every run the same columns.
    """
    named = list(dict.fromkeys(spec for spec in config.backbone if spec != ALL_BACKBONES))
    if ALL_BACKBONES not in config.backbone:
        return [(spec, True) for spec in named or [record.config.backbone]]
    stored = {s.backbone: s.backbone for s in comparable_summaries if s.backbone_hash != record.backbone.hash}
    stored[record.backbone.spec] = record.config.backbone
    all_specs = [stored[name] for name in sorted(stored)]
    return [(spec, spec in (*named, record.config.backbone)) for spec in dict.fromkeys([*all_specs, *named])]


def load_evaluated_backbone(
    backbone_spec: str,
    config: EvaluateConfig,
    record: RunRecord,
    store: Store,
    comparable_summaries: Sequence[Summary],
    source_statistics: ClassSubsetStatistics,
    load_backbone: LoadBackbone,
) -> EvaluatedBackbone:
    """Load one backbone and open its entry; raises as :func:`load_evaluated_backbones`."""
    source = source_statistics.entry.summary
    dataset = source.dataset + ("@tuning" if source.role == "tuning" else "")
    model = parse_spec(backbone_spec).model
    has_distilled_size = any(
        s.model == model and s.image_size == record.image_size for s in comparable_summaries
    )
    size = config.image_size or (record.image_size if has_distilled_size else None)
    try:
        candidates = filter_summaries_by_model(
            comparable_summaries, dataset=dataset, model=model, image_size=size
        )
    except NotExtractedError as error:
        line = format_extract_command(store, [source], backbone_spec, config.image_size or record.image_size)
        raise InputError(f"{error}; to add it: {line}") from None
    backbone = load_backbone(backbone_spec, candidates[0].image_size)
    same_options = [
        s for s in candidates if s.backbone_hash == backbone.card.hash and s.options == source.options
    ]
    entry = open_entry_of_backbone(store, same_options or candidates, backbone.card)
    require_held_out_features(entry)
    return EvaluatedBackbone(backbone, ClassSubsetStatistics(entry, source_statistics.class_indices))


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
    source_statistics: ClassSubsetStatistics,
    eval_backbones: Sequence[EvaluatedBackbone],
    load_backbone: LoadBackbone,
) -> EvaluatedBackbone:
    """Return the backbone distilled on with its entry; it is loaded unless it is one of those evaluated on.

    Raises
    ------
    InputError
        If the backbone that the run's spec names here is not the one distilled on.
    """
    for eval_backbone in eval_backbones:
        if eval_backbone.backbone.card.hash == source_statistics.entry.backbone.hash:
            return EvaluatedBackbone(eval_backbone.backbone, source_statistics)
    backbone = load_backbone(record.config.backbone, record.image_size)
    return EvaluatedBackbone(
        backbone,
        ClassSubsetStatistics(
            open_entry_of_backbone(store, [source_statistics.entry.summary], backbone.card),
            source_statistics.class_indices,
        ),
    )

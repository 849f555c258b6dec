"""Which backbones to evaluate on, and which entries of the store belong to them and to the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.spec import parse_spec
from sfm.errors import InputError
from sfm.eval.config import EvaluateConfig
from sfm.eval.synthetic import DistilledRun, RunRecord
from sfm.stats_store.cards import Summary
from sfm.stats_store.select import match, narrow
from sfm.stats_store.store import Entry, Store


@dataclass(frozen=True)
class Subject:
    """A backbone, and the statistics of the run's dataset through it."""

    backbone: Backbone
    entry: Entry


def source_entry(store: Store, summaries: Sequence[Summary], run: DistilledRun, directory: Path) -> Entry:
    """Open the entry that a run was distilled from.

    Raises
    ------
    InputError
        If the store does not hold it, or its classes are not those of the run.
    """
    record = run.record
    found = [s for s in summaries if s.entry_digest == record.entry_digest]
    if not found:
        raise InputError(
            f"{directory} was distilled from {record.dataset}@{record.entry_digest[:12]} of {record.store}, "
            f"and {store.url} holds no such entry: it is a run directory from another store, or the entry "
            f"was replaced since"
        )
    entry = store.open(found[0])
    if entry.dataset.class_ids != run.class_ids:
        raise InputError(
            f"the classes in {directory / 'classes.json'} are not those of "
            f"{record.dataset}@{record.entry_digest[:12]}, which run.json names"
        )
    return entry


def find_subjects(
    config: EvaluateConfig, record: RunRecord, store: Store, summaries: Sequence[Summary], source: Entry
) -> list[Subject]:
    """Load the backbones to evaluate on, and open their entries of the very data the run was distilled from.

    Same data is same fingerprint and same role. Of several variants of an entry, the one with the options of
    the run's own entry is taken.

    Raises
    ------
    InputError
        If there is no such entry, several fit, a backbone is not the one of its entry, or there are no
        held-out features.
    """
    comparable = [
        s for s in summaries if s.fingerprint == source.summary.fingerprint and s.role == source.summary.role
    ]
    dataset = source.summary.dataset + ("@tuning" if source.summary.role == "tuning" else "")
    subjects: dict[str, Subject] = {}
    for spec in config.backbone or [record.config.backbone]:
        model = parse_spec(spec).model
        as_distilled = any(s.model == model and s.image_size == record.image_size for s in comparable)
        size = config.image_size or (record.image_size if as_distilled else None)
        candidates = narrow(comparable, dataset=dataset, model=model, image_size=size)
        backbone = load_backbone(spec, image_size=candidates[0].image_size, device=config.device)
        alike = [
            s
            for s in candidates
            if s.backbone_hash == backbone.card.hash and s.options == source.summary.options
        ]
        subject = Subject(backbone, match(store, alike or candidates, backbone.card))
        require_held_out(subject.entry)
        subjects.setdefault(backbone.card.hash, subject)
    return list(subjects.values())


def require_held_out(entry: Entry) -> None:
    """Refuse an entry without held-out features."""
    if entry.dataset.test_samples == 0 or "test/feature" not in entry:
        raise InputError(
            f"the entry of {entry.dataset.name} through {entry.backbone.spec} has no held-out features to "
            f"evaluate on: extract from a source with a test split"
        )


def find_teacher(
    config: EvaluateConfig, record: RunRecord, store: Store, source: Entry, subjects: Sequence[Subject]
) -> Subject:
    """Return the backbone distilled on with its entry: a subject's if it is one of them, else load it.

    Raises
    ------
    InputError
        If the backbone that the run's spec names here is not the one distilled on.
    """
    for subject in subjects:
        if subject.backbone.card.hash == source.backbone.hash:
            return Subject(subject.backbone, source)
    backbone = load_backbone(record.config.backbone, image_size=record.image_size, device=config.device)
    return Subject(backbone, match(store, [source.summary], backbone.card))

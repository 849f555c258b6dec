"""Which backbones to evaluate on, and which entries of the store belong to them and to the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfm.backbones.build import Backbone
from sfm.backbones.spec import parse_spec
from sfm.errors import InputError
from sfm.eval.config import EVERY, EvaluateConfig
from sfm.eval.part import Part, part_of
from sfm.eval.synthetic import DistilledRun, RunRecord
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_selection import NotExtractedError, filter_summaries, select_entry
from sfm.stats_store.extract_command import format_extract_command
from sfm.stats_store.store import Entry, Store

Load = Callable[[str, int | None], Backbone]
"""Loads the backbone of a spec at an input size, or gives the one loaded before."""


@dataclass(frozen=True)
class Subject:
    """A backbone, and the statistics of the run's classes through it."""

    backbone: Backbone
    part: Part


def source_part(store: Store, summaries: Sequence[Summary], run: DistilledRun, directory: Path) -> Part:
    """Open the entry that a run was distilled from, and find the run's classes in it.

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
    part = part_of(store.open_entry(found[0]), run.class_ids, directory)
    if (record.backbone.hash, record.image_size) != (part.entry.backbone.hash, found[0].image_size):
        raise InputError(
            f"{directory / 'run.json'} names another backbone than the entry that the run was distilled from"
        )
    return part


def find_subjects(
    config: EvaluateConfig,
    record: RunRecord,
    store: Store,
    summaries: Sequence[Summary],
    source: Part,
    load: Load,
) -> tuple[list[Subject], list[str]]:
    """Load the backbones to evaluate on, and open their entries of the very data the run was distilled from.

    Same data is same fingerprint and same role. Of several variants of an entry, the one with the options of
    the run's own entry is taken. Of ``all`` backbones, those that cannot be had here are left out.

    Returns
    -------
    list of Subject
    list of str
        What was left out, and why.

    Raises
    ------
    InputError
        If there is no such entry, several fit, a backbone is not the one of its entry, or there are no
        held-out features.
    """
    own = source.entry.summary
    comparable = [s for s in summaries if s.fingerprint == own.fingerprint and s.role == own.role]
    subjects: dict[str, Subject] = {}
    notes: list[str] = []
    for spec, asked in specs_of(config, record, comparable):
        try:
            subject = subject_of(spec, config, record, store, comparable, source, load)
        except InputError as error:
            if asked:
                raise
            notes.append(f"{spec} is left out: {error}.")
        else:
            subjects.setdefault(subject.backbone.card.hash, subject)
    return list(subjects.values()), notes


def specs_of(
    config: EvaluateConfig, record: RunRecord, comparable: Sequence[Summary]
) -> list[tuple[str, bool]]:
    """Return the specs to evaluate on, and whether each was asked for by its name.

    ``all`` is the one distilled on, as its run names it, and the others of the store as it names them, in the
    order of their names: the same columns for every run.
    """
    named = list(dict.fromkeys(spec for spec in config.backbone if spec != EVERY))
    if EVERY not in config.backbone:
        return [(spec, True) for spec in named or [record.config.backbone]]
    stored = {s.backbone: s.backbone for s in comparable if s.backbone_hash != record.backbone.hash}
    stored[record.backbone.spec] = record.config.backbone
    every = [stored[name] for name in sorted(stored)]
    return [(spec, spec in (*named, record.config.backbone)) for spec in dict.fromkeys([*every, *named])]


def subject_of(
    spec: str,
    config: EvaluateConfig,
    record: RunRecord,
    store: Store,
    comparable: Sequence[Summary],
    source: Part,
    load: Load,
) -> Subject:
    """Load one backbone and open its entry; errors as of :func:`find_subjects`."""
    own = source.entry.summary
    dataset = own.dataset + ("@tuning" if own.role == "tuning" else "")
    model = parse_spec(spec).model
    as_distilled = any(s.model == model and s.image_size == record.image_size for s in comparable)
    size = config.image_size or (record.image_size if as_distilled else None)
    try:
        candidates = filter_summaries(comparable, dataset=dataset, model=model, image_size=size)
    except NotExtractedError as error:
        line = format_extract_command(store, [own], spec, config.image_size or record.image_size)
        raise InputError(f"{error}; to add it: {line}") from None
    backbone = load(spec, candidates[0].image_size)
    alike = [s for s in candidates if s.backbone_hash == backbone.card.hash and s.options == own.options]
    entry = select_entry(store, alike or candidates, backbone.card)
    require_held_out(entry)
    return Subject(backbone, Part(entry, source.classes))


def require_held_out(entry: Entry) -> None:
    """Refuse an entry without held-out features."""
    if entry.dataset.test_samples == 0 or "test/feature" not in entry:
        raise InputError(
            f"the entry of {entry.dataset.name} through {entry.backbone.spec} has no held-out features to "
            f"evaluate on: extract from a source with a test split"
        )


def find_teacher(
    record: RunRecord, store: Store, source: Part, subjects: Sequence[Subject], load: Load
) -> Subject:
    """Return the backbone distilled on with its entry: a subject's if it is one of them, else load it.

    Raises
    ------
    InputError
        If the backbone that the run's spec names here is not the one distilled on.
    """
    for subject in subjects:
        if subject.backbone.card.hash == source.entry.backbone.hash:
            return Subject(subject.backbone, source)
    backbone = load(record.config.backbone, record.image_size)
    return Subject(backbone, Part(select_entry(store, [source.entry.summary], backbone.card), source.classes))

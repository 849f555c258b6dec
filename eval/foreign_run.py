"""Evaluate images of another program: make a directory of them that everything else reads like a run.

The images are read by a function that the front passes in: this room cannot open a dataset. They are matched
to the classes of an entry, resized to its canvas, and written to the folder of their evaluation, so that what
is scored is what a report shows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from sfm.backbones.spec import make_spec_weights_path_absolute, parse_spec
from sfm.errors import InputError
from sfm.eval.config import ALL_BACKBONES, EvaluateConfig, Mode
from sfm.eval.distilled_run import (
    ClassRecord,
    ClassRecords,
    DistillationBackbone,
    DistilledRun,
    ForeignRecord,
    RunRecord,
    format_images_per_class,
    read_distilled_run,
    read_foreign_record,
)
from sfm.eval.foreign_classes import match_class_labels
from sfm.eval.output_files import create_folder_atomically, translate_write_errors, write_output
from sfm.eval.result import NoteText
from sfm.eval.run_directory import CLASSES_FILE, FOREIGN_RECORD_FILE, IMAGE_FOLDER
from sfm.foreign_images import ForeignImages, ReadForeignImages
from sfm.paths import list_without_hidden_and_system_files, resolve_links
from sfm.stats_store.cards import Summary
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.entry_selection import (
    describe_entries,
    find_named_summaries_or_raise,
    select_model_summaries_of_one_size,
)
from sfm.stats_store.store import Entry, Store
from sfm.text import escape_non_utf8, format_words_as_list

TEACHERLESS_MODES: frozenset[Mode] = frozenset({"linear"})
"""Modes that need neither a backbone distilled on nor labels that came with the images."""

LABELLED_MODES: frozenset[Mode] = frozenset({"soft"})
"""Modes that need soft labels, which images of other programs lack here."""

CANVAS_SCALE = (8, 7)
"""Side of a canvas over that of a backbone's input, as `sfm distill` has it by default."""


@dataclass(frozen=True)
class ComparableEntries:
    """The entries of one dataset and role in a store.

    Attributes
    ----------
    dataset : str
        As an entry of it is asked for: ``NAME`` or ``NAME@tuning``.
    summaries : list of Summary
        All of the same fingerprint and role.
    pinned : list of Summary
        Those of them that ``--dataset NAME@DIGEST`` names, or all.
    """

    dataset: str
    summaries: list[Summary]
    pinned: list[Summary]


@dataclass(frozen=True)
class ForeignRun:
    """Images of another program, ready to be evaluated.

    Attributes
    ----------
    run : DistilledRun
    folder : Path
        Where they are, or are to be written.
    is_written : bool
    config : EvaluateConfig
        With the modes that these images allow.
    notes : list of NoteText
        What was done to the images, and what is left out.
    has_new_record : bool
        Whether the folder is there, and its record is to be written anew.
    """

    run: DistilledRun
    folder: Path
    is_written: bool
    config: EvaluateConfig
    notes: list[NoteText]
    has_new_record: bool = False


def prepare_foreign_run(
    config: EvaluateConfig,
    store: Store,
    summaries: Sequence[Summary],
    sibling_records: Sequence[RunRecord],
    read_foreign_images: ReadForeignImages,
) -> ForeignRun:
    """Read images of another program, and match them to the entry that they are scored against.

    Nothing is written. If they were evaluated before, the folder of that evaluation says which canvas and
    which entry they had; rows of both commands then add up.

    Parameters
    ----------
    config : EvaluateConfig
    store : Store
    summaries : sequence of Summary
        Of all entries of the store.
    sibling_records : sequence of RunRecord
        Of runs that are evaluated by the same command: they name the dataset if nothing else does.
    read_foreign_images : callable
        Reads and resizes the images.

    Raises
    ------
    InputError
        If the images cannot be read or matched, no entry or several fit, no requested mode is possible, or
        the folder holds something else.
    """
    if config.out is not None and config.out.suffix == ".json":
        raise InputError(
            f"--out {config.out} is one file: {config.run} is no run directory, give a folder for its images "
            f"and results"
        )
    folder = config.result_path.parent
    if (folder / FOREIGN_RECORD_FILE).exists():
        return reopen_foreign_run(config, folder, store, summaries, read_foreign_images)
    require_unused_folder(folder)
    comparable = find_comparable_entries(config, summaries, sibling_records)
    specs = config.distilled_on or [choose_reference_spec(config, comparable)]
    backbones = open_distillation_backbones(config, store, comparable, specs)
    (first,) = (s for s in comparable.summaries if s.entry_digest == backbones[0].entry_digest)
    canvas = compute_canvas_pixels(max(backbone.image_size for backbone in backbones))
    images = read_foreign_images(config.run, canvas)
    run = make_foreign_run_of_entry(config, images, store.open_entry(first), backbones, canvas, store.url)
    return limit_modes(ForeignRun(run, folder, False, config, list_reading_notes(run)))


def require_path_exists(path: Path) -> None:
    """Refuse a path at which there is neither a run nor anything else.

    Raises
    ------
    InputError
        If there is nothing.
    """
    if not path.exists():
        raise InputError(
            f"no run directory at {path}, and no images: give the --out of a `sfm distill`, or images of "
            f"another program"
        )


def reopen_foreign_run(
    config: EvaluateConfig,
    folder: Path,
    store: Store,
    summaries: Sequence[Summary],
    read_foreign_images: ReadForeignImages,
) -> ForeignRun:
    """Return images that were evaluated before; refuse others than those.

    Raises
    ------
    InputError
        If they are others, or the command says something else of them than the earlier one did.
    """
    record = read_foreign_record(folder)
    if read_foreign_images(config.run, record.canvas).source_digest != record.source_digest:
        raise InputError(
            f"{folder} holds the evaluation of other images than those in {config.run}: give another --out, "
            f"or delete it"
        )
    return open_foreign_run_directory(config, folder, read_distilled_run(folder), store, summaries)


def open_foreign_run_directory(
    config: EvaluateConfig, folder: Path, run: DistilledRun, store: Store, summaries: Sequence[Summary]
) -> ForeignRun:
    """Return images that were evaluated before, from the folder of that evaluation.

    If nobody said then which backbone they were distilled on, this command may say it.

    Raises
    ------
    InputError
        If the command says something else of them than the earlier one did.
    """
    record = run.record
    assert isinstance(record, ForeignRecord)
    require_matching_record(record, config, folder)
    has_new_record = bool(config.distilled_on) and not record.knows_backbones
    if has_new_record:
        same_data = [
            s
            for s in summaries
            if (s.dataset, s.fingerprint) == (record.dataset, record.fingerprint)
            and s.role == find_role(summaries, record)
        ]
        comparable = ComparableEntries(name_entries(same_data[0]), same_data, same_data)
        backbones = open_distillation_backbones(config, store, comparable, config.distilled_on)
        first = backbones[0]
        update = {
            "backbones": backbones,
            "backbone": first.backbone,
            "entry_digest": first.entry_digest,
            "image_size": first.image_size,
            "distilled_on_known": True,
        }
        run = replace(run, record=record.model_copy(update=update))
    return limit_modes(
        ForeignRun(run, folder, True, config, list_reading_notes(run), has_new_record=has_new_record)
    )


def find_role(summaries: Sequence[Summary], record: ForeignRecord) -> str:
    """Return the role of the entry that images were scored against.

    Raises
    ------
    InputError
        If the store does not hold it.
    """
    for summary in summaries:
        if summary.entry_digest == record.entry_digest:
            return summary.role
    raise InputError(
        f"the store does not hold the entry {record.dataset}@{record.entry_digest[:12]} that these images "
        f"were scored against: give another --out"
    )


def list_reading_notes(run: DistilledRun) -> list[NoteText]:
    """Return the notes of a run about how its images were read."""
    return list(run.record.notes) if isinstance(run.record, ForeignRecord) else []


def require_matching_record(record: ForeignRecord, config: EvaluateConfig, folder: Path) -> None:
    """Refuse options that contradict an earlier evaluation of the same images.

    Raises
    ------
    InputError
        If they do.
    """
    name = config.dataset.partition("@")[0] if config.dataset else record.dataset
    if name != record.dataset and config.dataset != record.dataset:
        raise InputError(
            f"{folder} holds an evaluation against {record.dataset}, not {config.dataset}: give another --out"
        )
    known = sorted(backbone.spec for backbone in record.backbones) if record.knows_backbones else []
    asked = sorted(map(make_spec_weights_path_absolute, config.distilled_on))
    if asked and known and asked != known:
        raise InputError(
            f"{folder} says that these images were distilled on {' and '.join(known)}, and --distilled-on "
            f"{' and '.join(asked)}: give another --out, or delete it"
        )


def require_unused_folder(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises
    ------
    InputError
        If it does, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give another --out")
    held = list_without_hidden_and_system_files(folder) if folder.is_dir() else []
    if held:
        raise InputError(
            f"{folder} holds something else than an evaluation of these images ({held[0].name}): give "
            f"another --out"
        )


def find_comparable_entries(
    config: EvaluateConfig, summaries: Sequence[Summary], sibling_records: Sequence[RunRecord]
) -> ComparableEntries:
    """Find the entries that images are scored against: those named, those of a run beside them, or the only.

    Raises
    ------
    InputError
        If there are none, or several datasets; lists them.
    """
    sibling_digests = {b.entry_digest for record in sibling_records for b in record.backbones}
    if config.dataset:
        named = find_named_summaries_or_raise(summaries, config.dataset)
    elif sibling_digests:
        named = [s for s in summaries if s.entry_digest in sibling_digests]
    else:
        named = [s for s in summaries if s.role == "full"]
    keys = {(s.dataset, s.fingerprint, s.role) for s in named}
    if not named:
        raise InputError("the store holds no entry to score these images against: name it with --dataset")
    if len(keys) > 1:
        problem = (
            "several entries fit, pin one as NAME@DIGEST" if config.dataset else "name one with --dataset"
        )
        raise InputError(
            f"{config.run} can be scored against several datasets of the store, {problem}: "
            f"{describe_entries(named)}"
        )
    ((dataset, fingerprint, role),) = keys
    return ComparableEntries(
        name_entries(named[0]),
        [s for s in summaries if (s.dataset, s.fingerprint, s.role) == (dataset, fingerprint, role)],
        named,
    )


def name_entries(summary: Summary) -> str:
    """Return the name under which the entries of a dataset and role are asked for."""
    return f"{summary.dataset}@tuning" if summary.role == "tuning" else summary.dataset


def choose_reference_spec(config: EvaluateConfig, comparable: ComparableEntries) -> str:
    """Return the backbone whose entry says which classes and samples there are, where none is named.

    Raises
    ------
    InputError
        If none is asked for and the store holds several.
    """
    named = [spec for spec in config.backbone if spec != ALL_BACKBONES]
    stored = sorted({s.backbone for s in comparable.summaries})
    if named:
        return named[0]
    if len(stored) > 1 and ALL_BACKBONES not in config.backbone:
        raise InputError(
            f"name the backbones to evaluate {config.run} on: --backbone {' or '.join(stored)}, or "
            f"--backbone {ALL_BACKBONES}"
        )
    return stored[0]


def select_entry_summary(comparable: ComparableEntries, spec: str, image_size: int | None) -> Summary:
    """Return the one entry of a backbone among comparable ones.

    Raises
    ------
    InputError
        If there is none, or several fit; lists them.
    """
    model = parse_spec(spec).model
    has_pinned = any(s.model == model for s in comparable.pinned)
    candidates = select_model_summaries_of_one_size(
        comparable.pinned if has_pinned else comparable.summaries,
        dataset=comparable.dataset,
        model=model,
        image_size=image_size,
    )
    if len(candidates) > 1:
        raise InputError(f"several entries fit, pin one as NAME@DIGEST: {describe_entries(candidates)}")
    return candidates[0]


def open_distillation_backbones(
    config: EvaluateConfig, store: Store, comparable: ComparableEntries, specs: Sequence[str]
) -> list[DistillationBackbone]:
    """Return backbones, with the digests of their entries, as the record of a run names them.

    Raises
    ------
    InputError
        If a backbone is named twice, has no entry, or several fit.
    """
    for spec in specs:
        if list(specs).count(spec) > 1:
            raise InputError(f"--distilled-on {spec} is given more than once: name every backbone once")
    entries = [
        (spec, store.open_entry(select_entry_summary(comparable, spec, config.image_size))) for spec in specs
    ]
    return [
        DistillationBackbone(
            backbone=entry.backbone,
            spec=make_spec_weights_path_absolute(spec),
            entry_digest=entry.summary.entry_digest,
            image_size=entry.summary.image_size,
        )
        for spec, entry in entries
    ]


def compute_canvas_pixels(image_size: int) -> int:
    """Return the side of a canvas for an input size, as `sfm distill` chooses it by default.

    Examples
    --------
    >>> compute_canvas_pixels(224), compute_canvas_pixels(32)
    (256, 37)
    """
    numerator, denominator = CANVAS_SCALE
    return round(image_size * numerator / denominator)


def make_foreign_run_of_entry(
    config: EvaluateConfig,
    images: ForeignImages,
    entry: Entry,
    backbones: list[DistillationBackbone],
    canvas_pixels: int,
    store_url: str,
) -> DistilledRun:
    """Return foreign images as a run: sorted by class, with the record that `images.json` will hold.

    Raises
    ------
    InputError
        If their labels are not classes of the entry.
    """
    ids, names = entry.dataset.class_ids, entry.dataset.class_names
    labels = list(dict.fromkeys(images.class_labels))
    matched = match_class_labels(labels, ids, names, str(config.run), entry.dataset.name)
    class_indices = sorted(matched.index_by_label.values())
    position = {index: position for position, index in enumerate(class_indices)}
    unsorted = np.array([position[matched.index_by_label[label]] for label in images.class_labels])
    order = np.argsort(unsorted, kind="stable")
    pixels = images.pixels[order]
    counts: list[int] = np.bincount(unsorted).tolist()
    missing = [ids[i] for i in range(len(ids)) if i not in position]
    notes = [*images.notes, *([matched.note] if matched.note else [])]
    if missing:
        shown = ", ".join(missing[:8]) + (" and others" if len(missing) > 8 else "")
        notes.append(f"Classes without images: {shown}.")
    if min(counts) < max(counts):
        notes.append(f"Images: {format_images_per_class(counts)}.")
    record = ForeignRecord(
        command="evaluate",
        store=escape_non_utf8(store_url),
        entry_digest=entry.summary.entry_digest,
        fingerprint=entry.summary.fingerprint,
        dataset=entry.dataset.name,
        backbone=entry.backbone,
        image_size=entry.summary.image_size,
        canvas=canvas_pixels,
        ipc=max(counts),
        images=compute_array_digest(pixels),
        backbones=backbones,
        source=escape_non_utf8(str(resolve_links(config.run))),
        source_digest=images.source_digest,
        images_per_class=counts,
        distilled_on_known=bool(config.distilled_on),
        notes=notes,
    )
    run = DistilledRun(
        record,
        [ids[i] for i in class_indices],
        [names[i] for i in class_indices],
        [],
        pixels,
        np.repeat(np.arange(len(counts)), counts),
    )
    return replace(run, image_files=list_image_paths(run, config.result_path.parent))


def limit_modes(foreign: ForeignRun) -> ForeignRun:
    """Return a run whose config has the modes that its images allow; notes name the others.

    Raises
    ------
    InputError
        If none is left; says what is lacking.
    """
    modes = list(dict.fromkeys(foreign.config.mode))
    unlabelled = [mode for mode in modes if mode in LABELLED_MODES]
    without_teacher = [
        mode
        for mode in modes
        if not foreign.run.record.knows_backbones and mode not in TEACHERLESS_MODES | LABELLED_MODES
    ]
    kept = [mode for mode in modes if mode not in (*unlabelled, *without_teacher)]
    reasons = []
    if without_teacher:
        reasons.append(
            f"{format_words_as_list(without_teacher)}: it is unknown which backbone these images were "
            f"distilled on; name it with --distilled-on"
        )
    if unlabelled:
        reasons.append(f"{format_words_as_list(unlabelled)}: no soft labels came with these images")
    if not kept:
        raise InputError(f"{foreign.config.run} cannot be evaluated by mode {'; nor by '.join(reasons)}")
    notes = [*foreign.notes, *(f"Left out: {reason}." for reason in reasons)]
    return replace(foreign, config=foreign.config.model_copy(update={"mode": kept}), notes=notes)


def list_image_paths(run: DistilledRun, folder: Path) -> list[Path]:
    """Return where the images of a run are in its folder: ``images/<index>_<class>/<i>.png``."""
    class_width = len(str(len(run.class_ids) - 1))
    paths = []
    for index, (name, count) in enumerate(zip(run.class_names, run.images_per_class, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:48].strip("-")
        class_folder = folder / IMAGE_FOLDER / f"{index:0{class_width}d}_{slug}".rstrip("_")
        image_width = len(str(count - 1))
        paths += [class_folder / f"{i:0{image_width}d}.png" for i in range(count)]
    return paths


def write_foreign_run(foreign: ForeignRun) -> None:
    """Write what is new of the images and their record to the folder of their evaluation.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    run, folder = foreign.run, foreign.folder
    if not foreign.is_written:
        write_images_and_classes(run, folder)
    if not foreign.is_written or foreign.has_new_record:
        # Last: a folder with this file is complete.
        write_output(folder / FOREIGN_RECORD_FILE, run.record.model_dump_json(indent=1).encode())


def write_images_and_classes(run: DistilledRun, folder: Path) -> None:
    """Write ``images/`` and ``classes.json`` to a new or empty folder.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    classes = [
        ClassRecord(index=index, class_id=class_id, name=name)
        for index, (class_id, name) in enumerate(zip(run.class_ids, run.class_names, strict=True))
    ]
    with translate_write_errors(folder, "; give --out to put the result elsewhere"):
        folder.mkdir(parents=True, exist_ok=True)
    with create_folder_atomically(folder) as partial:
        for path, pixels in zip(list_image_paths(run, partial), run.pixels, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        (partial / CLASSES_FILE).write_bytes(TypeAdapter(ClassRecords).dump_json(classes, indent=1))

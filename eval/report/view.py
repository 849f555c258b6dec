"""What a report says, in the order it says it: from what was read to what the template shows."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from sfm.eval.findings import NO_BETTER, warnings_of
from sfm.eval.report.charts import Bar, Kind, bar_chart, loss_chart
from sfm.eval.report.classes import ByClass, Confusions, by_class, confusions
from sfm.eval.report.figures import (
    Figure,
    figures_of,
    headline,
    how_of,
    in_words,
    inherited_elsewhere,
    label_of,
    most_thorough,
    recovered,
)
from sfm.eval.report.headings import group_titles, page_title, subjects
from sfm.eval.report.read import ReportedRun, Sheet
from sfm.eval.report.tables import Cell, Grid, backbones_of, comparison, matrices
from sfm.eval.report.words import (
    IMAGES,
    MODES,
    NOT_KNOWN,
    command_line,
    duration,
    evaluate_again,
    many,
    percent,
    size,
)
from sfm.eval.result import Evaluation, Row, is_own
from sfm.stats_store.cards import ExtractionCard

MOST_CLASSES, MOST_PER_CLASS, MOST_PICTURES = 100, 10, 400
"""How many classes are shown, how many images of each, and how many images in all."""

MOST_INHERITED = 3
"""How many other backbones are at the top."""

MOST_BESIDE = 6
"""Images of a class in one line."""

QUALITY = 90
"""Of WebP: at this, images look as they are, at a quarter of a PNG's size."""


@dataclass(frozen=True)
class Fact:
    """A figure, what it is of, and what belongs to it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An image of a report; `title` names it when it is shown alone."""

    source: str
    alt: str
    caption: str
    title: str
    real: bool = False


@dataclass(frozen=True)
class Shelf:
    """The images of one class."""

    name: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """The images of all runs of one dataset, by class."""

    dataset: str
    shelves: list[Shelf]
    tiles: int
    captions: bool
    notes: list[str]


@dataclass(frozen=True)
class Line:
    """One row of a table of accuracies; figures in percent."""

    label: str
    kind: Kind
    top1: str
    top5: str
    recovered: str


@dataclass(frozen=True)
class Block:
    """The rows of one backbone."""

    backbone: str
    lines: list[Line]


@dataclass(frozen=True)
class Accuracies:
    """The figures of one run."""

    run: str
    blocks: list[Block]
    seeds: str
    chart: Markup
    notes: list[str]


@dataclass(frozen=True)
class Course:
    """How the images of one run came to be."""

    run: str
    growth: list[tuple[str, str]]
    growth_classes: str
    chart: Markup | None


@dataclass(frozen=True)
class Origin:
    """Where the images and figures of one run come from."""

    run: str
    facts: list[Fact]
    commands: list[str]


@dataclass(frozen=True)
class Glance:
    """A run in four figures."""

    run: str
    subject: str
    facts: list[Fact]
    warnings: list[str]


@dataclass(frozen=True)
class Report:
    """Everything the template shows; what is empty is left out."""

    title: str
    made_by: str
    several: bool
    glances: list[Glance]
    galleries: list[Gallery]
    comparisons: list[Grid]
    accuracies: list[Accuracies]
    classes: list[ByClass]
    modes: list[tuple[str, str]]
    matrices: list[Grid]
    confusions: list[Confusions]
    courses: list[Course]
    costs: Grid
    origins: list[Origin]


def report_of(runs: Sequence[ReportedRun]) -> Report:
    """Put together what is to be said of runs, at least one."""
    evaluated = [(r.name, r.evaluation) for r in runs if r.evaluation]
    used = {how_of(row) for _, evaluation in evaluated for row in figures_of(evaluation)}
    several = len(runs) > 1
    groups = by_dataset(runs)
    titled = list(zip(groups, group_titles(groups), strict=True))
    return Report(
        title=page_title(runs),
        made_by=f"sfm-distill {version('sfm-distill')}",
        several=several,
        glances=[glance(run, told) for run, told in zip(runs, subjects(runs), strict=True)],
        galleries=[gallery(alike, title) for alike, title in titled],
        comparisons=[comparison(alike, title) for alike, title in titled if evaluations(alike) > 1],
        accuracies=[accuracies(name, evaluation) for name, evaluation in evaluated],
        modes=[(mode, text) for mode, text in MODES.items() if mode in used],
        classes=[found for run in runs if (found := by_class(run, named=several))],
        matrices=[grid for alike, title in titled for grid in matrices(alike, title)],
        confusions=[c for run in runs if (c := confusions(run, named=several))],
        courses=[course(run, loss_bounds(runs)) for run in runs if run.history or run.growth],
        costs=costs(runs),
        origins=[origin(run) for run in runs],
    )


def by_dataset(runs: Iterable[ReportedRun]) -> list[list[ReportedRun]]:
    """Put runs together whose images and figures can be compared: of the same classes of the same data."""
    groups: dict[tuple[str, tuple[str, ...]], list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault((run.run.record.fingerprint, tuple(run.run.class_ids)), []).append(run)
    return list(groups.values())


def evaluations(runs: Sequence[ReportedRun]) -> int:
    """Count the runs that were evaluated."""
    return sum(run.evaluation is not None for run in runs)


def glance(run: ReportedRun, subject: str) -> Glance:
    """Say the most important of a run."""
    record, details = run.run.record, run.details
    per_class = f"{record.ipc:,} per class"
    real = f", made from {many(details.train_samples, 'real image')}" if details.train_samples else ""
    facts = [Fact("Distilled images", f"{len(run.run.files):,}", per_class + real)]
    if run.evaluation:
        facts += accuracy_facts(run.evaluation)
    facts.append(Fact("Size", size(run.image_bytes), "as PNG files"))
    if details.wall_seconds is not None:
        memory = f", {size(details.peak_memory_bytes)} of memory" if details.peak_memory_bytes else ""
        facts.append(Fact("Made in", duration(details.wall_seconds), f"{details.device}{memory}"))
    return Glance(run.name, subject, facts, warnings(run))


def accuracy_facts(evaluation: Evaluation) -> list[Fact]:
    """Say what the images are worth: on the backbone distilled on, and inherited on others."""
    row = headline(evaluation)
    if row is None:
        size = evaluation.provenance.distilled_at
        own = evaluation.provenance.distilled_on + (f" at {size} px" if size else "")
        missing = f"linear on {own}: evaluate with --mode linear"
        found = [Fact("Top-1 accuracy", "not measured", missing)]
    else:
        found = [Fact("Top-1 accuracy", f"{percent(row.top1_mean)} %", in_words(row, evaluation))]
    for other in inherited_elsewhere(evaluation)[:MOST_INHERITED]:
        note = in_words(other, evaluation)
        found.append(Fact("Top-1, inherited", f"{percent(other.top1_mean)} %", note))
    return found


def warnings(run: ReportedRun) -> list[str]:
    """Say what a reader has to know before believing the figures."""
    found = []
    edited = run.details.images is not None and run.digest != run.details.images
    if edited:
        found.append(
            "The images are not those that were distilled: some were edited since. Here they are shown as "
            "they are now."
        )
    if run.evaluation is None:
        command = command_line("evaluate", str(run.directory), {"store": run.run.record.store})
        found.append(f"There are no figures yet. To have them: {command}")
    elif run.evaluation.provenance.images != run.digest:
        command = evaluate_again(run.directory, run.evaluation.config)
        found.append(
            f"The figures are of other images: some were changed since they were evaluated. Evaluate again: "
            f"{command}"
        )
    elif edited:
        found.append("The figures are of the edited images.")
    if run.evaluation and run.evaluation.provenance.role == "tuning":
        found.append("The figures are for tuning: of a part of the training split, not of held-out data.")
    if run.evaluation:
        found += warnings_of(most_thorough(run.evaluation.rows))
    return found


def gallery(runs: Sequence[ReportedRun], title: str) -> Gallery:
    """Show the images of runs of one dataset by class, with real ones beside them where there are any."""
    first = runs[0].run
    classes = min(MOST_CLASSES, len(first.class_ids))
    room = max(1, MOST_PICTURES // (classes * len(runs)))
    shown = [min(MOST_PER_CLASS, room, run.run.record.ipc) for run in runs]
    several = len(runs) > 1
    beside = [neighbours(run) for run in runs]
    shelves = []
    for c in range(classes):
        pictures = []
        for run, count, real in zip(runs, shown, beside, strict=True):
            label = run.name if several else "distilled"
            pictures += distilled_pictures(run, c, count, label, real)
        if not any(real is not None for real in beside):
            pictures += typical_picture(runs, c)
        shelves.append(Shelf(first.class_names[c], pictures))
    notes = []
    if classes < len(first.class_ids):
        notes.append(f"The first {classes} of {len(first.class_ids):,} classes.")
    for run, count in zip(runs, shown, strict=True):
        if count < run.run.record.ipc:
            whose = f" of {run.name}" if several else ""
            notes.append(f"The first {count} of {run.run.record.ipc} images per class{whose}.")
    real_shown = any(picture.real for shelf in shelves for picture in shelf.pictures)
    if any(real is not None for real in beside):
        notes.append(
            "“Nearest real”: the stored real image of the class whose feature is nearest to that of the "
            "distilled one at its left. Few are stored and none is taken twice, so it need not look alike."
        )
    elif real_shown:
        notes.append("“Real”: the stored real image that is nearest to the mean of its class.")
    tiles = min(MOST_BESIDE, max(len(shelf.pictures) for shelf in shelves))
    return Gallery(title, shelves, tiles, several or real_shown, notes)


def distilled_pictures(
    run: ReportedRun, c: int, count: int, label: str, real: npt.NDArray[np.uint8] | None
) -> list[Picture]:
    """Return the first images of a class, each followed by the real one nearest to it, if that is known."""
    ipc, name = run.run.record.ipc, run.run.class_names[c]
    pictures = []
    for i in range(count):
        caption = f"{label} {i + 1}" if ipc > 1 else label
        title = f"{name}: {caption}"
        pixels = run.run.pixels[c * ipc + i]
        pictures.append(Picture(picture(pixels), f"Distilled image of {title}", caption, title))
        if real is not None:
            title = f"{name}: the real image nearest to {caption}"
            source = picture(real[c, i])
            pictures.append(Picture(source, f"Real image of {title}", "nearest real", title, real=True))
    return pictures


def neighbours(run: ReportedRun) -> npt.NDArray[np.uint8] | None:
    """Return the real image nearest to every distilled one, if it was looked for and is stored.

    Returns
    -------
    ndarray of uint8, shape (class, image, height, width, 3), or None
    """
    if run.behind is None or run.behind.exemplars is None or run.evaluation is None:
        return None
    provenance = run.evaluation.provenance
    found = [row for row in run.evaluation.rows if row.chosen]
    own = [row for row in found if is_own(row, provenance)] or found
    if not own or provenance.images != run.digest:
        return None
    places = np.array(own[0].chosen)
    chosen: npt.NDArray[np.uint8] = run.behind.exemplars[np.arange(len(places))[:, None], places]
    return chosen


def typical_picture(runs: Sequence[ReportedRun], c: int) -> list[Picture]:
    """Return the real image nearest to the mean of a class, if one is stored."""
    for run in runs:
        if run.behind and run.behind.exemplars is not None and run.behind.nearest is not None:
            title = f"{run.run.class_names[c]}: the real image nearest to the class mean"
            source = picture(run.behind.exemplars[c, run.behind.nearest[c]])
            return [Picture(source, f"Real image of {title}", "real", title, real=True)]
    return []


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels of shape (height, width, 3) as a URL that needs no network."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def kind_of(row: Figure) -> Kind:
    """Say what a classifier was made of."""
    kinds: dict[str, Kind] = {"distilled": "distilled", "none": "no images", "all real": "all real"}
    return kinds.get(row.images, "few real")


def accuracies(name: str, evaluation: Evaluation) -> Accuracies:
    """Tabulate and draw the figures of a run."""
    rows = figures_of(evaluation)
    blocks, groups = [], []
    for key, backbone in backbones_of(rows).items():
        own = [row for row in rows if (row.backbone, row.image_size) == key]
        own.sort(key=lambda row: (list(IMAGES).index(row.images), list(MODES).index(how_of(row))))
        blocks.append(Block(backbone, [line(row, evaluation) for row in own]))
        groups.append((backbone, [bar(row, evaluation) for row in own]))
    told = "; ".join(
        f"{backbone}: " + ", ".join(f"{one.label} {one.value:.1f}" for one in bars)
        for backbone, bars in groups
    )
    repeated = sorted({row.seeds for row in evaluation.rows if row.seeds > 1})
    return Accuracies(
        run=name,
        blocks=blocks,
        seeds=" or ".join(map(str, repeated)),
        chart=bar_chart(groups, f"Bar chart of the top-1 accuracies of {name} in percent. {told}."),
        notes=[note for note in evaluation.notes if not note.startswith(NO_BETTER)],
    )


def line(row: Figure, evaluation: Evaluation) -> Line:
    """Write a row of figures."""
    if isinstance(row, Row):
        spread = (row.top1_std, row.top5_std) if row.seeds > 1 else (None, None)
        top1 = percent(row.top1_mean, spread[0])
        top5 = NOT_KNOWN if row.top5_mean is None else percent(row.top5_mean, spread[1])
    else:
        top1, top5 = percent(row.top1), NOT_KNOWN if row.top5 is None else percent(row.top5)
    share = recovered(row, evaluation)
    return Line(
        label_of(row, evaluation), kind_of(row), top1, top5, NOT_KNOWN if share is None else percent(share)
    )


def bar(row: Figure, evaluation: Evaluation) -> Bar:
    """Draw a row of figures."""
    if isinstance(row, Row):
        spread = 100 * row.top1_std if row.seeds > 1 else None
        return Bar(label_of(row, evaluation), 100 * row.top1_mean, spread, kind_of(row))
    return Bar(label_of(row, evaluation), 100 * row.top1, None, kind_of(row))


def loss_bounds(runs: Sequence[ReportedRun]) -> tuple[float, float]:
    """Return the least and the largest loss of all runs, a little widened."""
    every = [step.loss for run in runs for step in run.history]
    if not every:
        return 0.0, 1.0
    room = 0.05 * (max(every) - min(every)) or 0.05
    return min(every) - room, max(every) + room


def course(run: ReportedRun, bounds: tuple[float, float]) -> Course:
    """Show how the images grew, and how the loss fell."""
    chart = None
    if run.history:
        last = run.history[-1]
        levels = ", ".join(dict.fromkeys(str(step.resolution) for step in run.history))
        told = (
            f"Line chart of the loss of {run.name}: {run.history[0].loss:.3g} at the first step, "
            f"{last.loss:.3g} at step {last.step:,}. The pyramid's finest level grew over {levels} pixels."
        )
        chart = loss_chart(run.history, bounds, told)
    resolution = {step.step: step.resolution for step in run.history}
    shown = len(run.run.class_names[:10])
    return Course(
        run=run.name,
        growth=[(sheet_caption(sheet, resolution), picture(sheet.pixels)) for sheet in run.growth],
        growth_classes=", ".join(run.run.class_names[:shown]),
        chart=chart,
    )


def sheet_caption(sheet: Sheet, resolution: dict[int, int]) -> str:
    """Say when a sheet was drawn, and how fine the pyramid was."""
    level = f"{resolution[sheet.step]} px, " if sheet.step in resolution else ""
    return f"{level}step {sheet.step:,}"


def costs(runs: Sequence[ReportedRun]) -> Grid:
    """Say what the images, and the figures, cost; rows that no run knows are left out."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        record, details, behind = run.run.record, run.details, run.behind
        count, real = len(run.run.files), details.train_samples
        evaluation = run.evaluation
        # What is recorded is of all classes; a run of some of them takes part of it.
        whole = behind is not None and real == behind.part.entry.dataset.train_samples
        raw = behind.part.entry.extraction.train_bytes if behind and whole else None
        decoded = real * 3 * record.image_size**2 if real else None
        told = {
            "Distilled images": f"{count:,}",
            "Files of the distilled images (PNG)": size(run.image_bytes),
            "Real training images": f"{real:,}" if real else NOT_KNOWN,
            "Real images per distilled one": f"{real / count:,.0f}" if real else NOT_KNOWN,
            "Files of the real images, as they were read": size(raw),
            "Bytes of real images per distilled byte": f"{raw / run.image_bytes:,.1f}" if raw else NOT_KNOWN,
            "Real images, decoded at the input size": size(decoded),
            "Statistics in the store": size(behind.stored_bytes if behind else None),
            "Extracting them": extraction_time(behind.part.entry.extraction) if behind else NOT_KNOWN,
            "Distilling": duration(details.wall_seconds),
            "Steps": f"{run.history[-1].step:,}" if run.history else NOT_KNOWN,
            "Peak memory": size(details.peak_memory_bytes),
            "Device": details.device or NOT_KNOWN,
            "Evaluating": duration(evaluating_seconds(evaluation) if evaluation else None),
        }
        for label, value in told.items():
            rows.setdefault(label, []).append(value)
    kept = [
        (label, [Cell(value, None) for value in values])
        for label, values in rows.items()
        if set(values) != {NOT_KNOWN}
    ]
    return Grid("What it took", "", [run.name for run in runs], kept)


def evaluating_seconds(evaluation: Evaluation) -> float:
    """Return what all commands took that figures come from."""
    return evaluation.provenance.seconds + sum(one.seconds for one in evaluation.earlier)


def extraction_time(card: ExtractionCard) -> str:
    """Return the wall time of the pass over the images and of the statistics after it."""
    if card.options.get("origin") == "merged":
        return duration(card.seconds)
    if card.statistics_seconds is None:
        return f"{duration(card.seconds)} for the pass over the images; the statistics were not timed"
    whole, after = card.seconds + card.statistics_seconds, duration(card.statistics_seconds)
    return f"{duration(whole)}: pass over the images {duration(card.seconds)}, statistics {after}"


def origin(run: ReportedRun) -> Origin:
    """Say where images and figures come from, and how to make them again."""
    record, details, evaluation = run.run.record, run.details, run.evaluation
    facts = [
        Fact("Store", record.store),
        Fact("Entry", f"{record.dataset}@{record.entry_digest}"),
        Fact("Data fingerprint", record.fingerprint),
        Fact("Licence of the data", details.licence or ""),
        Fact("Backbone", f"{record.backbone.spec}, hash {record.backbone.hash}"),
        Fact("Images", run.digest, edited_or_not(run)),
        Fact("Seed", "" if details.seed is None else str(details.seed)),
        Fact("Device", details.device or ""),
        Fact("Distilled with", versions(details.versions)),
    ]
    commands = [distill_command(run)]
    if evaluation:
        for entry in evaluation.provenance.entries:
            facts.append(
                Fact(
                    f"Evaluated on {entry.backbone}",
                    f"entry {entry.entry_digest}, backbone hash {entry.backbone_hash}",
                    many(entry.held_out_samples, "held-out image"),
                )
            )
        facts.append(Fact("Evaluated with", versions(evaluation.provenance.versions)))
        for config in (*(one.config for one in reversed(evaluation.earlier)), evaluation.config):
            options = {name: value for name, value in config.items() if name != "run"}
            commands.append(command_line("evaluate", str(run.directory), options))
    return Origin(run.name, [fact for fact in facts if fact.value], commands)


def edited_or_not(run: ReportedRun) -> str:
    """Say whether the images are those that were distilled."""
    if run.details.images is None:
        return "run.json does not say which were distilled"
    return "as distilled" if run.digest == run.details.images else f"distilled were {run.details.images}"


def versions(found: dict[str, str]) -> str:
    """Write versions on one line."""
    return ", ".join(f"{name} {number}" for name, number in found.items())


def distill_command(run: ReportedRun) -> str:
    """Write the command that makes the images again, from the very entry they were made from."""
    record = run.run.record
    if isinstance(run.details.config.get("classes"), list):
        # No option takes a list of classes; run.json holds it.
        dataset = f"{record.dataset}@{record.entry_digest[:12]}"
        again = {"config": run.directory / "run.json", "dataset": dataset, "out": f"{run.directory}-again"}
        return command_line(
            "distill", None, {**again, "store": record.store, "backbone": record.config.backbone}
        )
    asked = {name: value for name, value in run.details.config.items() if name not in ("resume", "out")}
    pinned = {
        "store": record.store,
        "backbone": record.config.backbone,
        "image_size": record.image_size,
        "dataset": f"{record.dataset}@{record.entry_digest[:12]}",
    }
    return command_line("distill", None, {**pinned, **asked, **pinned, "out": f"{run.directory}-again"})

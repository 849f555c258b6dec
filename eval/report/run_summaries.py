"""The summary of each run at the top of a report: a few facts and the warnings."""

from dataclasses import dataclass

from sfm.eval.caveats import list_random_baseline_warnings
from sfm.eval.distilled_labels import describe_how_to_add_soft_labels
from sfm.eval.distilled_run import ForeignRecord, format_images_per_class
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.reproduction_commands import make_evaluate_command
from sfm.eval.report.row_selection import (
    describe_row_versus_real_images,
    find_headline_row_of_source,
    list_linear_rows,
    list_unseen_inherit_rows,
    select_longest_trained_rows,
)
from sfm.eval.report.text_format import (
    format_count_with_noun,
    format_decimal_bytes,
    format_sfm_command,
    format_wall_time,
)
from sfm.eval.result import Evaluation
from sfm.text import format_percent

MAX_UNSEEN_FACTS = 3
"""Number of unseen backbones in a summary."""


@dataclass(frozen=True)
class LabelledFact:
    """A labelled value with a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class RunSummary:
    """The most important facts of one run."""

    run_name: str
    description: str
    facts: list[LabelledFact]
    warnings: list[str]


def make_run_summary(run: ReportedRun, description: str) -> RunSummary:
    """Return number, accuracy, size and cost of a run's images, with warnings."""
    record, details = run.distilled.record, run.details
    note = format_images_per_class(run.distilled.images_per_class)
    if isinstance(record, ForeignRecord):
        note += ", made by another program"
    if details.train_samples:
        note += f", made from {format_count_with_noun(details.train_samples, 'real image')}"
    facts = [LabelledFact("Distilled images", f"{len(run.distilled.image_files):,}", note)]
    if run.evaluation:
        facts += list_accuracy_facts(run.evaluation)
    facts.append(make_size_fact(run))
    if details.wall_seconds is not None:
        peak = details.peak_memory_bytes
        memory = f", {format_decimal_bytes(peak)} of memory" if peak else ""
        facts.append(
            LabelledFact("Made in", format_wall_time(details.wall_seconds), f"{details.device}{memory}")
        )
    return RunSummary(run.name, description, facts, list_run_warnings(run))


def make_size_fact(run: ReportedRun) -> LabelledFact:
    """Return the size of the distilled set: of its images, and of its soft labels if it has any."""
    note = "as PNG files" + (", resized" if isinstance(run.distilled.record, ForeignRecord) else "")
    if run.label_file_bytes:
        images, labels = map(format_decimal_bytes, (run.image_file_bytes, run.label_file_bytes))
        note = f"PNG files {images}, soft labels {labels}"
    return LabelledFact("Size", format_decimal_bytes(run.image_file_bytes + run.label_file_bytes), note)


def list_accuracy_facts(evaluation: Evaluation) -> list[LabelledFact]:
    """Return the accuracies on the backbones distilled on, and the inherited ones on unseen backbones."""
    facts = []
    for source in evaluation.provenance.source_entries:
        headline = find_headline_row_of_source(evaluation, source)
        if headline is None:
            backbone = source.backbone + (f" at {source.image_size} px" if source.image_size else "")
            note = f"linear on {backbone}: evaluate with --mode linear"
            facts.append(LabelledFact("Top-1 accuracy", "not measured", note))
        else:
            note = describe_row_versus_real_images(headline, evaluation)
            facts.append(LabelledFact("Top-1 accuracy", f"{format_percent(headline.top1_mean)} %", note))
    if not evaluation.provenance.distilled_on_known:
        for row in list_linear_rows(evaluation)[:MAX_UNSEEN_FACTS]:
            note = f"{describe_row_versus_real_images(row, evaluation)}; distilled on an unknown backbone"
            facts.append(LabelledFact("Top-1 accuracy", f"{format_percent(row.top1_mean)} %", note))
        return facts
    for row in list_unseen_inherit_rows(evaluation)[:MAX_UNSEEN_FACTS]:
        note = describe_row_versus_real_images(row, evaluation)
        facts.append(LabelledFact("Top-1, unseen", f"{format_percent(row.top1_mean)} %", note))
    return facts


def list_run_warnings(run: ReportedRun) -> list[str]:
    """Return the warnings about the accuracies of a run."""
    warnings = []
    is_edited = run.details.images is not None and run.pixel_digest != run.details.images
    if is_edited:
        warnings.append(
            "The images are not those that were distilled: some were edited since. Here they are shown as "
            "they are now."
        )
    if run.has_labels_of_other_images:
        warnings.append(
            "The soft labels are of other images than these: make them again "
            f"{describe_how_to_add_soft_labels(run.directory, run.distilled.record)}."
        )
    if run.evaluation is None:
        command = format_sfm_command("evaluate", str(run.directory), {"store": run.distilled.record.store})
        warnings.append(f"There are no figures yet. To measure them: {command}")
    elif run.evaluation.provenance.images != run.pixel_digest:
        command = make_evaluate_command(run.directory, run.evaluation.config)
        warnings.append(
            f"The figures are of other images: some were changed since they were evaluated. Evaluate again: "
            f"{command}"
        )
    elif is_edited:
        warnings.append("The figures are of the edited images.")
    if run.evaluation and run.evaluation.provenance.role == "tuning":
        warnings.append("The figures are for tuning: on a part of the training split, not on held-out data.")
    if run.evaluation:
        warnings += list_random_baseline_warnings(select_longest_trained_rows(run.evaluation.rows))
    return warnings

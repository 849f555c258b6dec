"""Costs and provenance of runs in a report: time, memory, sizes, sources, and commands to reproduce them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfm.eval.distilled_run import DistillationBackbone, ForeignRecord
from sfm.eval.report.comparison_tables import LabelledCells, ReportTable, TableCell
from sfm.eval.report.reported_runs import ReportedRun, SourceData
from sfm.eval.report.reproduction_commands import make_distill_command
from sfm.eval.report.run_summaries import LabelledFact
from sfm.eval.report.text_format import (
    UNKNOWN,
    format_count_with_noun,
    format_decimal_bytes,
    format_sfm_command,
    format_wall_time,
)
from sfm.eval.result import Evaluation
from sfm.stats_store.cards import ExtractionCard


@dataclass(frozen=True)
class ProvenanceSection:
    """The provenance of the images and accuracies of one run."""

    run_name: str
    facts: list[LabelledFact]
    commands: list[str]


def make_cost_table(runs: Sequence[ReportedRun]) -> ReportTable:
    """Return a table of the costs of images and accuracies; empty rows are left out."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        for label, value in describe_run_costs_by_label(run).items():
            rows.setdefault(label, []).append(value)
    table_rows = [
        LabelledCells(label, [TableCell(value, None) for value in values])
        for label, values in rows.items()
        if set(values) != {UNKNOWN}
    ]
    return ReportTable("Cost", "", [run.name for run in runs], table_rows)


def describe_run_costs_by_label(run: ReportedRun) -> dict[str, str]:
    """Return sizes and times of a run by label."""
    record, details, evaluation = run.distilled.record, run.details, run.evaluation
    image_count, real_count = len(run.distilled.image_files), details.train_samples
    source_data = run.source_data
    distilled_bytes = run.image_file_bytes + run.label_file_bytes
    real_bytes = None
    if source_data:
        entry = source_data.first_statistics.entry
        # The entry records bytes of all classes; a run of some classes used part of them.
        if real_count == entry.dataset.train_samples:
            real_bytes = entry.extraction.train_bytes
    decoded_bytes = real_count * 3 * record.image_size**2 if real_count else None
    return {
        "Distilled images": f"{image_count:,}",
        "Files of the distilled images (PNG)": format_decimal_bytes(run.image_file_bytes),
        "Their soft labels": format_decimal_bytes(run.label_file_bytes or None),
        "Real training images": f"{real_count:,}" if real_count else UNKNOWN,
        "Real images per distilled one": f"{real_count / image_count:,.0f}" if real_count else UNKNOWN,
        "Files of the real images, as they were read": format_decimal_bytes(real_bytes),
        "Bytes of real images per distilled byte": f"{real_bytes / distilled_bytes:,.1f}"
        if real_bytes
        else UNKNOWN,
        "Real images, decoded at the input size": format_decimal_bytes(decoded_bytes),
        "Statistics in the store": format_decimal_bytes(
            source_data.total_entry_bytes if source_data else None
        ),
        "Extracting them": describe_extraction_times(source_data) if source_data else UNKNOWN,
        "Distilling": format_wall_time(details.wall_seconds),
        "Steps": f"{run.loss_history[-1].step:,}" if run.loss_history else UNKNOWN,
        "Peak memory": format_decimal_bytes(details.peak_memory_bytes),
        "Device": details.device or UNKNOWN,
        "Evaluating": format_wall_time(sum_evaluation_seconds(evaluation) if evaluation else None),
    }


def sum_evaluation_seconds(evaluation: Evaluation) -> float:
    """Return the wall time of all commands that accuracies come from."""
    return evaluation.provenance.seconds + sum(command.seconds for command in evaluation.earlier)


def describe_extraction_times(source_data: SourceData) -> str:
    """Return the wall time of extracting a run's entries, by backbone if there are several."""
    entries = [statistics.entry for statistics in source_data.all_statistics]
    if len(entries) == 1:
        return describe_extraction_time(entries[0].extraction)
    return "; ".join(f"{e.backbone.spec}: {describe_extraction_time(e.extraction)}" for e in entries)


def describe_extraction_time(card: ExtractionCard) -> str:
    """Return the wall time of the pass over the images and of the statistics after it."""
    if card.options.get("origin") == "merged":
        return format_wall_time(card.seconds)
    pass_time = format_wall_time(card.seconds)
    if card.statistics_seconds is None:
        return f"{pass_time} for the pass over the images; the statistics were not timed"
    total = format_wall_time(card.seconds + card.statistics_seconds)
    statistics_time = format_wall_time(card.statistics_seconds)
    return f"{total}: pass over the images {pass_time}, statistics {statistics_time}"


def make_provenance_section(run: ReportedRun) -> ProvenanceSection:
    """Return the provenance of images and accuracies, and the commands that reproduce them."""
    record, details, evaluation = run.distilled.record, run.details, run.evaluation
    foreign_record = record if isinstance(record, ForeignRecord) else None
    facts = [
        LabelledFact("Made by another program, read from", foreign_record.source if foreign_record else ""),
        LabelledFact("Distilled on", "" if record.knows_backbones else "unknown"),
        LabelledFact("Store", record.store),
        *(LabelledFact("Entry", f"{record.dataset}@{b.entry_digest}") for b in record.backbones),
        LabelledFact("Data fingerprint", record.fingerprint),
        LabelledFact("Licence of the data", details.licence or ""),
        *(
            LabelledFact(
                "Backbone", f"{b.backbone.spec}, hash {b.backbone.hash}", describe_loss_weight_unless_one(b)
            )
            for b in record.backbones
        ),
        LabelledFact("Images", run.pixel_digest, describe_image_edits(run)),
        LabelledFact("Seed", "" if details.seed is None else str(details.seed)),
        LabelledFact("Device", details.device or ""),
        LabelledFact("Distilled with", format_versions(details.versions)),
    ]
    commands = [] if foreign_record else [make_distill_command(run)]
    if evaluation:
        for entry in evaluation.provenance.entries:
            facts.append(
                LabelledFact(
                    f"Evaluated on {entry.backbone}",
                    f"entry {entry.entry_digest}, backbone hash {entry.backbone_hash}",
                    format_count_with_noun(entry.held_out_samples, "held-out image"),
                )
            )
        facts.append(LabelledFact("Evaluated with", format_versions(evaluation.provenance.versions)))
        earlier_configs = [command.config for command in reversed(evaluation.earlier)]
        for config in (*earlier_configs, evaluation.config):
            options = {name: value for name, value in config.items() if name != "run"}
            images = foreign_record.source if foreign_record else str(run.directory)
            commands.append(format_sfm_command("evaluate", images, options))
    return ProvenanceSection(run.name, [fact for fact in facts if fact.value], commands)


def describe_loss_weight_unless_one(distillation_backbone: DistillationBackbone) -> str:
    """Return the weight of a backbone's loss, unless it is 1."""
    weight = distillation_backbone.weight
    return "" if weight == 1 else f"weight {weight:g}"


def describe_image_edits(run: ReportedRun) -> str:
    """Return whether the images are those that were distilled."""
    if run.details.images is None:
        return "run.json does not say which were distilled"
    return (
        "as distilled" if run.pixel_digest == run.details.images else f"distilled were {run.details.images}"
    )


def format_versions(versions: Mapping[str, str]) -> str:
    """Return names and versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())

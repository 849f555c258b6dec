"""The content of a report: everything that its template shows, section by section."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from sfm.eval.report.accuracy_section import AccuracySection, make_accuracy_section
from sfm.eval.report.class_tables import (
    ClassAccuracyTable,
    ConfusionTable,
    make_class_accuracy_table,
    make_confusion_table,
)
from sfm.eval.report.comparison_tables import (
    ReportTable,
    make_backbone_matrix_tables,
    make_comparison_table,
    make_score_table,
)
from sfm.eval.report.gallery import Gallery, make_gallery
from sfm.eval.report.headings import (
    describe_runs_with_differing_options,
    make_dataset_group_titles,
    make_page_title,
)
from sfm.eval.report.provenance import ProvenanceSection, make_cost_table, make_provenance_section
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.row_selection import get_mode_or_full_data_classifier, list_result_rows
from sfm.eval.report.run_summaries import RunSummary, make_run_summary
from sfm.eval.report.text_format import MODE_DESCRIPTIONS
from sfm.eval.report.training_curves import TrainingCurve, compute_loss_axis_limits, make_training_curve


@dataclass(frozen=True)
class ReportContent:
    """Everything the template shows; empty sections are left out."""

    title: str
    program_with_version: str
    has_several_runs: bool
    run_summaries: list[RunSummary]
    galleries: list[Gallery]
    comparison_tables: list[ReportTable]
    accuracy_sections: list[AccuracySection]
    class_tables: list[ClassAccuracyTable]
    mode_descriptions: list[tuple[str, str]]
    matrix_tables: list[ReportTable]
    confusion_tables: list[ConfusionTable]
    training_curves: list[TrainingCurve]
    cost_table: ReportTable
    provenance_sections: list[ProvenanceSection]


def make_report_content(runs: Sequence[ReportedRun]) -> ReportContent:
    """Return the content of a report on runs, at least one."""
    evaluations = [(run.name, run.evaluation) for run in runs if run.evaluation]
    modes = {
        get_mode_or_full_data_classifier(row)
        for _, evaluation in evaluations
        for row in list_result_rows(evaluation)
    }
    has_several_runs = len(runs) > 1
    groups = group_runs_by_data_and_classes(runs)
    titled_groups = list(zip(groups, make_dataset_group_titles(groups), strict=True))
    bounds = compute_loss_axis_limits(runs)
    class_tables = [make_class_accuracy_table(run, with_run_name=has_several_runs) for run in runs]
    confusions = [make_confusion_table(run, with_run_name=has_several_runs) for run in runs]
    return ReportContent(
        title=make_page_title(runs),
        program_with_version=f"sfm-distill {version('sfm-distill')}",
        has_several_runs=has_several_runs,
        run_summaries=[
            make_run_summary(run, text)
            for run, text in zip(runs, describe_runs_with_differing_options(runs), strict=True)
        ],
        galleries=[make_gallery(group, title) for group, title in titled_groups],
        comparison_tables=[
            table
            for group, title in titled_groups
            for table in (make_comparison_table(group, title), make_score_table(group, title))
            if table and count_evaluated_runs(group) > 1
        ],
        accuracy_sections=[make_accuracy_section(name, evaluation) for name, evaluation in evaluations],
        mode_descriptions=[(mode, text) for mode, text in MODE_DESCRIPTIONS.items() if mode in modes],
        class_tables=[table for table in class_tables if table],
        matrix_tables=[
            table for group, title in titled_groups for table in make_backbone_matrix_tables(group, title)
        ],
        confusion_tables=[table for table in confusions if table],
        training_curves=[
            make_training_curve(run, bounds) for run in runs if run.loss_history or run.growth_sheets
        ],
        cost_table=make_cost_table(runs),
        provenance_sections=[make_provenance_section(run) for run in runs],
    )


def group_runs_by_data_and_classes(runs: Iterable[ReportedRun]) -> list[list[ReportedRun]]:
    """Group runs that can be compared: of the same classes of the same data."""
    groups: dict[tuple[str, tuple[str, ...]], list[ReportedRun]] = {}
    for run in runs:
        key = run.distilled.record.fingerprint, tuple(run.distilled.class_ids)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def count_evaluated_runs(runs: Sequence[ReportedRun]) -> int:
    """Return the number of runs that were evaluated."""
    return sum(run.evaluation is not None for run in runs)

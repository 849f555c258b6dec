"""The training curves of a run: the loss over the steps, and the growth of the pyramid."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sfm.eval.report.charts import draw_loss_chart
from sfm.eval.report.gallery import encode_webp_data_url
from sfm.eval.report.reported_runs import GrowthSheet, ReportedRun

MAX_SHEET_CLASSES = 10
"""Classes that a growth sheet shows, one image of each."""


@dataclass(frozen=True)
class TrainingCurve:
    """Loss chart and growth sheets of one run."""

    run_name: str
    captions_and_growth_urls: list[tuple[str, str]]
    growth_class_names: str
    loss_chart: Markup | None


def compute_loss_axis_limits(runs: Sequence[ReportedRun]) -> tuple[float, float]:
    """Return the smallest and the largest loss of all runs, with a margin."""
    losses = [point.loss for run in runs for point in run.loss_history]
    if not losses:
        return 0.0, 1.0
    margin = 0.05 * (max(losses) - min(losses)) or 0.05
    return min(losses) - margin, max(losses) + margin


def make_training_curve(run: ReportedRun, loss_axis_limits: tuple[float, float]) -> TrainingCurve:
    """Return the loss chart and the growth sheets of a run."""
    chart = None
    if run.loss_history:
        last = run.loss_history[-1]
        levels = ", ".join(dict.fromkeys(str(point.resolution) for point in run.loss_history))
        description = (
            f"Line chart of the loss of {run.name}: {run.loss_history[0].loss:.3g} at the first step, "
            f"{last.loss:.3g} at step {last.step:,}. The pyramid's finest level grew over {levels} pixels."
        )
        chart = draw_loss_chart(run.loss_history, loss_axis_limits, description)
    resolutions = {point.step: point.resolution for point in run.loss_history}
    return TrainingCurve(
        run_name=run.name,
        captions_and_growth_urls=[
            (make_growth_sheet_caption(sheet, resolutions), encode_webp_data_url(sheet.pixels))
            for sheet in run.growth_sheets
        ],
        growth_class_names=", ".join(run.distilled.class_names[:MAX_SHEET_CLASSES]),
        loss_chart=chart,
    )


def make_growth_sheet_caption(growth_sheet: GrowthSheet, resolution_by_step: dict[int, int]) -> str:
    """Return the step of a growth sheet, with the resolution of the pyramid where the history has it."""
    level = f"{resolution_by_step[growth_sheet.step]} px, " if growth_sheet.step in resolution_by_step else ""
    return f"{level}step {growth_sheet.step:,}"

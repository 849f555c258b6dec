"""The accuracies of one run in a report: a table and a bar chart."""

from dataclasses import dataclass

from markupsafe import Markup

from sfm.eval.caveats import (
    EARLIER_TRAINING,
    LABEL_ROBUST_SCORE_NOTE,
    NOT_BETTER_THAN_RANDOM,
    UNKNOWN_BACKBONE_NOTE,
    UNSEEN_BACKBONE_NOTE,
    list_earlier_training_notes,
)
from sfm.eval.report.charts import AccuracyBar, BarKind, draw_bar_chart
from sfm.eval.report.comparison_tables import make_backbone_labels
from sfm.eval.report.row_selection import (
    compute_recovered_fraction,
    get_mode_or_full_data_classifier,
    list_result_rows,
    make_row_label,
)
from sfm.eval.report.text_format import IMAGE_SET_LABELS, MODE_DESCRIPTIONS
from sfm.eval.result import AccuracyRow, Evaluation, ResultRow, is_row_on_distillation_backbone
from sfm.text import format_percent


@dataclass(frozen=True)
class AccuracyLine:
    """One line of a table of accuracies, in percent."""

    label: str
    bar_kind: BarKind
    top1_percent: str
    top5_percent: str
    recovered_percent: str
    score_percent: str


@dataclass(frozen=True)
class BackboneAccuracyLines:
    """The lines of one backbone."""

    backbone: str
    lines: list[AccuracyLine]


@dataclass(frozen=True)
class AccuracyBlock:
    """The backbones distilled on, or the unseen ones; without a title where all were distilled on."""

    title: str
    backbone_groups: list[BackboneAccuracyLines]


@dataclass(frozen=True)
class AccuracySection:
    """The accuracies of one run."""

    run_name: str
    blocks: list[AccuracyBlock]
    seed_counts_text: str
    chart: Markup
    has_scores: bool
    notes: list[str]


def make_accuracy_section(run_name: str, evaluation: Evaluation) -> AccuracySection:
    """Return the table and the bar chart of a run's accuracies, by backbone; unseen ones come last."""
    rows = list_result_rows(evaluation)
    own_groups: list[BackboneAccuracyLines] = []
    unseen_groups: list[BackboneAccuracyLines] = []
    unknown_groups: list[BackboneAccuracyLines] = []
    own_bars, unseen_bars = [], []
    for key, backbone in make_backbone_labels(rows).items():
        backbone_rows = [row for row in rows if (row.backbone, row.image_size) == key]
        backbone_rows.sort(key=get_row_sort_key)
        lines = BackboneAccuracyLines(
            backbone, [make_accuracy_line(row, evaluation) for row in backbone_rows]
        )
        bars = [make_accuracy_bar(row, evaluation) for row in backbone_rows]
        if not evaluation.provenance.distilled_on_known:
            unknown_groups.append(lines)
            own_bars.append((backbone, bars))
        elif is_row_on_distillation_backbone(backbone_rows[0], evaluation.provenance):
            own_groups.append(lines)
            own_bars.append((backbone, bars))
        else:
            unseen_groups.append(lines)
            unseen_bars.append((f"{backbone} (unseen)", bars))
    bar_groups = [*own_bars, *unseen_bars]
    blocks = [
        AccuracyBlock("Distilled on" if unseen_groups else "", own_groups),
        AccuracyBlock("Unseen backbones", unseen_groups),
        AccuracyBlock("Unknown whether distilled on", unknown_groups),
    ]
    description = "; ".join(
        f"{backbone}: " + ", ".join(f"{bar.label} {bar.percent:.1f}" for bar in bars)
        for backbone, bars in bar_groups
    )
    alt = f"Bar chart of the top-1 accuracies of {run_name} in percent. {description}."
    has_scores = any(row.label_robust_score is not None for row in evaluation.rows)
    seed_counts = sorted({row.seeds for row in evaluation.rows if row.seeds > 1})
    return AccuracySection(
        run_name=run_name,
        blocks=[block for block in blocks if block.backbone_groups],
        seed_counts_text=" or ".join(map(str, seed_counts)),
        chart=draw_bar_chart(bar_groups, alt),
        has_scores=has_scores,
        notes=[
            *([UNSEEN_BACKBONE_NOTE] if unseen_groups else []),
            *([UNKNOWN_BACKBONE_NOTE] if unknown_groups else []),
            *([LABEL_ROBUST_SCORE_NOTE] if has_scores else []),
            *(
                note
                for note in evaluation.notes
                if not note.startswith((NOT_BETTER_THAN_RANDOM, EARLIER_TRAINING))
            ),
            # Files of earlier versions cannot hold this note.
            *list_earlier_training_notes(evaluation.rows),
        ],
    )


def get_row_sort_key(row: ResultRow) -> tuple[int, int]:
    """Return the position of a row in a table: by image set, then by classifier."""
    kind = get_mode_or_full_data_classifier(row)
    return list(IMAGE_SET_LABELS).index(row.images), list(MODE_DESCRIPTIONS).index(kind)


def get_bar_kind(row: ResultRow) -> BarKind:
    """Return the kind of images that a classifier was trained on, as charts mark it."""
    kinds: dict[str, BarKind] = {"distilled": "distilled", "none": "no images", "all real": "all real"}
    return kinds.get(row.images, "few real")


def make_accuracy_line(row: ResultRow, evaluation: Evaluation) -> AccuracyLine:
    """Return the table line of a row."""
    if isinstance(row, AccuracyRow):
        top1_std, top5_std = (row.top1_std, row.top5_std) if row.seeds > 1 else (None, None)
        top1, top5 = format_percent(row.top1_mean, top1_std), format_percent(row.top5_mean, top5_std)
    else:
        top1, top5 = format_percent(row.top1), format_percent(row.top5)
    recovered = format_percent(compute_recovered_fraction(row, evaluation))
    score = format_percent(row.label_robust_score if isinstance(row, AccuracyRow) else None)
    return AccuracyLine(make_row_label(row, evaluation), get_bar_kind(row), top1, top5, recovered, score)


def make_accuracy_bar(row: ResultRow, evaluation: Evaluation) -> AccuracyBar:
    """Return the chart bar of a row."""
    label, kind = make_row_label(row, evaluation), get_bar_kind(row)
    if isinstance(row, AccuracyRow):
        return AccuracyBar(label, 100 * row.top1_mean, 100 * row.top1_std if row.seeds > 1 else None, kind)
    return AccuracyBar(label, 100 * row.top1, None, kind)

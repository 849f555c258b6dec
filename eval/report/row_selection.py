"""Select and label the rows that a report shows; no row is selected for its accuracy."""

from collections.abc import Sequence

from sfm.eval.caveats import OWN_BACKBONE_BIASED_MODES, find_random_baseline
from sfm.eval.report.text_format import IMAGE_SET_LABELS
from sfm.eval.result import (
    AccuracyRow,
    Evaluation,
    FullDataRow,
    ResultRow,
    SourceEntryRecord,
    is_row_of_earlier_training,
    is_row_on_distillation_backbone,
)
from sfm.text import format_percent


def list_result_rows(evaluation: Evaluation) -> list[ResultRow]:
    """Return all rows of an evaluation, those of all real images last."""
    return [*evaluation.rows, *evaluation.full_data]


def get_mode_or_full_data_classifier(row: ResultRow) -> str:
    """Return the mode of a row, or the classifier of all real images."""
    return row.mode if isinstance(row, AccuracyRow) else row.classifier


def make_row_label(row: ResultRow, evaluation: Evaluation) -> str:
    """Return a row's label: image set and classifier, and its protocol where rows differ in it.

    Inheritance on a backbone distilled on is marked: its accuracy says little about the images.
    """
    label = f"{IMAGE_SET_LABELS[row.images]}, {get_mode_or_full_data_classifier(row)}"
    if not isinstance(row, AccuracyRow):
        return label
    if row.mode in OWN_BACKBONE_BIASED_MODES and is_row_on_distillation_backbone(row, evaluation.provenance):
        label += " (own backbone)"
    if is_row_of_earlier_training(row):
        label += " (earlier training)"
    protocol = describe_differing_options(
        row,
        [
            other
            for other in evaluation.rows
            if get_key_without_training_options(other) == get_key_without_training_options(row)
        ],
    )
    return f"{label} ({protocol})" if protocol else label


def get_key_without_training_options(row: AccuracyRow) -> tuple[str, str, int, str]:
    """Return the values in which rows agree that differ in protocol only."""
    return row.images, row.backbone, row.image_size, row.mode


def describe_differing_options(row: AccuracyRow, compared_rows: Sequence[AccuracyRow]) -> str:
    """Return the parts of a row's protocol in which rows differ: "20 epochs, 2 seeds"."""
    values_by_name = {
        name: [getattr(other, name) for other in compared_rows]
        for name in ("epochs", "seeds", "views", "seed", "projector_init")
    }
    parts = []
    for name, values in values_by_name.items():
        value = getattr(row, name)
        if len(set(values)) > 1 and value is not None:
            forms = {"seed": f"seed {value}", "projector_init": f"projector from {value} start"}
            parts.append(forms.get(name, f"{value} {name}"))
    return ", ".join(parts)


def select_longest_trained_rows(rows: Sequence[AccuracyRow]) -> list[AccuracyRow]:
    """Return one of the rows that differ in protocol only: of most epochs, then most seeds, then last."""
    selected: dict[tuple[str, str, int, str], AccuracyRow] = {}
    for row in rows:
        other = selected.setdefault(get_key_without_training_options(row), row)
        if (row.epochs or 0, row.seeds) > (other.epochs or 0, other.seeds):
            selected[get_key_without_training_options(row)] = row
    return list(selected.values())


def find_headline_row(evaluation: Evaluation) -> AccuracyRow | None:
    """Return the row of `linear` on the first backbone distilled on that has one."""
    rows = [
        find_headline_row_of_source(evaluation, source) for source in evaluation.provenance.source_entries
    ]
    return next((row for row in rows if row is not None), None)


def find_headline_row_of_source(evaluation: Evaluation, source: SourceEntryRecord) -> AccuracyRow | None:
    """Return the row of `linear` on one backbone distilled on.

    The choice is fixed: taking the best row would select on held-out data.
    """
    for row in select_longest_trained_rows(evaluation.rows):
        if (row.images, row.mode) == ("distilled", "linear") and source.has_backbone_of(row):
            return row
    return None


def list_linear_rows(evaluation: Evaluation) -> list[AccuracyRow]:
    """Return the rows of `linear` of the distilled images, on any backbone."""
    return [
        row
        for row in select_longest_trained_rows(evaluation.rows)
        if (row.images, row.mode) == ("distilled", "linear")
    ]


def list_unseen_inherit_rows(evaluation: Evaluation) -> list[AccuracyRow]:
    """Return the rows of `inherit` on backbones that the images were not distilled on, if that is known."""
    if not evaluation.provenance.distilled_on_known:
        return []
    return [
        row
        for row in select_longest_trained_rows(evaluation.rows)
        if (row.images, row.mode) == ("distilled", "inherit")
        and not is_row_on_distillation_backbone(row, evaluation.provenance)
    ]


def find_row_shown_in_detail(evaluation: Evaluation) -> AccuracyRow | None:
    """Return the row whose classes and confusions are shown: the headline row, or a substitute."""
    distilled = [row for row in select_longest_trained_rows(evaluation.rows) if row.images == "distilled"]
    unbiased = [row for row in distilled if row.mode not in OWN_BACKBONE_BIASED_MODES]
    candidates = [
        find_headline_row(evaluation),
        *unbiased,
        *list_unseen_inherit_rows(evaluation),
        *distilled,
    ]
    return next((row for row in candidates if row is not None), None)


def find_linear_full_data_row(row: ResultRow, evaluation: Evaluation) -> FullDataRow | None:
    """Return the row of the linear classifier of all real images through the same backbone."""
    for full in evaluation.full_data:
        same_backbone = (full.backbone, full.image_size) == (row.backbone, row.image_size)
        if same_backbone and full.classifier == "linear":
            return full
    return None


def compute_recovered_fraction(row: ResultRow, evaluation: Evaluation) -> float | None:
    """Return top-1 as a fraction of that of all real images through the same backbone; None if unknown."""
    full = find_linear_full_data_row(row, evaluation)
    top1 = row.top1_mean if isinstance(row, AccuracyRow) else row.top1
    return top1 / full.top1 if full and full.top1 > 0 else None


def describe_row_versus_real_images(row: AccuracyRow, evaluation: Evaluation) -> str:
    """Return mode and backbone of a row, and how it compares with all and with random real images."""
    recovered, baseline = (
        compute_recovered_fraction(row, evaluation),
        find_random_baseline(row, evaluation.rows),
    )
    own_specs = [source.backbone for source in evaluation.provenance.source_entries]
    is_resized = row.backbone in own_specs and not is_row_on_distillation_backbone(row, evaluation.provenance)
    shows_size = is_resized or own_specs.count(row.backbone) > 1
    text = f"{row.mode} on {row.backbone}" + (f" at {row.image_size} px" if shows_size else "")
    if recovered is not None and recovered > 1:
        text += ": more than the classifier of all real images, see the notes below"
    elif recovered is not None:
        text += f": {format_percent(recovered)} % of what all real images give"
    if baseline is not None:
        text += f"; as many random real ones: {format_percent(baseline.top1_mean)} %"
    return text

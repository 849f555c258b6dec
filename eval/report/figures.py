"""Which figures of an evaluation stand first, and how rows are told apart; none is chosen for being good."""

from collections.abc import Sequence

from sfm.eval.findings import READ_ELSEWHERE, random_beside
from sfm.eval.report.words import IMAGES, percent
from sfm.eval.result import Evaluation, FullData, Row, is_own

Figure = Row | FullData


def figures_of(evaluation: Evaluation) -> list[Figure]:
    """Return all figures of an evaluation."""
    return [*evaluation.rows, *evaluation.full_data]


def how_of(row: Figure) -> str:
    """Say what was trained."""
    return row.mode if isinstance(row, Row) else row.classifier


def label_of(row: Figure, evaluation: Evaluation) -> str:
    """Name a row by what was trained on, and how; and by its protocol where others of that name differ in it.

    Inheritance on the backbone distilled on is marked: its figure is hardly the images'.
    """
    label = f"{IMAGES[row.images]}, {how_of(row)}"
    if not isinstance(row, Row):
        return label
    if row.mode in READ_ELSEWHERE and is_own(row, evaluation.provenance):
        label += " (own backbone)"
    told = protocol(row, [other for other in evaluation.rows if place_of(other) == place_of(row)])
    return f"{label} ({told})" if told else label


def place_of(row: Row) -> tuple[str, str, int, str]:
    """Return what rows share that differ in protocol only."""
    return row.images, row.backbone, row.image_size, row.mode


def protocol(row: Row, rows: Sequence[Row]) -> str:
    """Say how a row was trained, as far as rows differ in it: "20 epochs, 2 seeds"."""
    told = {name: [getattr(other, name) for other in rows] for name in ("epochs", "seeds", "views", "seed")}
    parts = []
    for name, values in told.items():
        own = getattr(row, name)
        if len(set(values)) > 1 and own is not None:
            parts.append(f"seed {own}" if name == "seed" else f"{own} {name}")
    return ", ".join(parts)


def most_thorough(rows: Sequence[Row]) -> list[Row]:
    """Keep one of the rows that differ in protocol only: of the most epochs, then seeds, then the latest."""
    kept: dict[tuple[str, str, int, str], Row] = {}
    for row in rows:
        other = kept.setdefault(place_of(row), row)
        if (row.epochs or 0, row.seeds) > (other.epochs or 0, other.seeds):
            kept[place_of(row)] = row
    return list(kept.values())


def headline(evaluation: Evaluation) -> Row | None:
    """Return the row that says most plainly what the images are worth: `linear` on the backbone distilled on.

    Fixed, not the best, which would be a choice on held-out data.
    """
    for row in most_thorough(evaluation.rows):
        if (row.images, row.mode) == ("distilled", "linear") and is_own(row, evaluation.provenance):
            return row
    return None


def inherited_elsewhere(evaluation: Evaluation) -> list[Row]:
    """Return the rows of `inherit` on other backbones than the one distilled on."""
    return [
        row
        for row in most_thorough(evaluation.rows)
        if (row.images, row.mode) == ("distilled", "inherit") and not is_own(row, evaluation.provenance)
    ]


def shown_in_detail(evaluation: Evaluation) -> Row | None:
    """Return the row whose classes and confusions are shown: the headline, or what comes nearest to it."""
    distilled = [row for row in most_thorough(evaluation.rows) if row.images == "distilled"]
    elsewhere = [row for row in distilled if row.mode not in READ_ELSEWHERE]
    found = [headline(evaluation), *elsewhere, *inherited_elsewhere(evaluation), *distilled]
    return next((row for row in found if row is not None), None)


def full_data_of(row: Figure, evaluation: Evaluation) -> FullData | None:
    """Return the classifier of all real images through the same backbone."""
    for full in evaluation.full_data:
        same = (full.backbone, full.image_size) == (row.backbone, row.image_size)
        if same and full.classifier == "linear":
            return full
    return None


def recovered(row: Figure, evaluation: Evaluation) -> float | None:
    """Return top-1 as a fraction of that of all real images through the same backbone, if that is known."""
    full = full_data_of(row, evaluation)
    top1 = row.top1_mean if isinstance(row, Row) else row.top1
    return top1 / full.top1 if full and full.top1 > 0 else None


def in_words(row: Row, evaluation: Evaluation) -> str:
    """Say what a figure is of, and what stands beside it."""
    share, real = recovered(row, evaluation), random_beside(row, evaluation.rows)
    resized = row.backbone == evaluation.provenance.distilled_on and not is_own(row, evaluation.provenance)
    text = f"{row.mode} on {row.backbone}" + (f" at {row.image_size} px" if resized else "")
    if share is not None and share > 1:
        text += ": more than the classifier of all real images, see the notes below"
    elif share is not None:
        text += f": {percent(share)} % of what all real images give"
    if real is not None:
        text += f"; as many random real ones: {percent(real.top1_mean)} %"
    return text

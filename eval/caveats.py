"""Caveats: warnings and notes that qualify accuracies."""

from collections.abc import Sequence

from sfm.eval.config import VIEWS_BY_SEED_MODES
from sfm.eval.result import AccuracyRow, EntryRecord, FullDataRow, is_row_of_earlier_training

OWN_BACKBONE_BIASED_MODES = frozenset({"inherit", "inherit-ridge", "stage"})
"""Modes that show the store's classifier more than the images on the backbone distilled on."""

NOT_BETTER_THAN_RANDOM = "The distilled images are no better than as many real ones picked at random"
"""Start of a warning."""

ABOVE_FULL_DATA = "Above 100 % of full data"
"""Start of the note about rows above the classifier of all real images."""

UNSEEN_BACKBONE_NOTE = (
    "Unseen: the images were not distilled on these backbones. For a backbone that no store holds, only "
    "images can help: class means and classifiers of all real images come from a store."
)

UNSEEN_CELL_NOTE = "In parentheses: unseen, that run was not distilled on this backbone."
"""Note below a table of several runs."""

UNKNOWN_BACKBONE_NOTE = (
    "Unknown: nobody said which backbone these images were distilled on, so any of these may be it, and none "
    "counts as unseen. Name it with --distilled-on."
)

LABEL_ROBUST_SCORE_NOTE = (
    "LRS: label-robust score of DD-Ranking (arXiv 2505.13300), in percent, with hard labels: it compares "
    "`linear` with as many random real images, and with all real ones."
)

SOFT_LABELS_KNOW_REAL_IMAGES = "Rows of mode soft are trained on soft labels too"
"""Start of the note about labels."""

EARLIER_TRAINING = "Measured by an earlier version, before joint and stage were the published trainings"
"""Start of the note about rows of `joint` and `stage` of earlier versions."""

CAVEAT_STARTS = (NOT_BETTER_THAN_RANDOM, ABOVE_FULL_DATA, SOFT_LABELS_KNOW_REAL_IMAGES, EARLIER_TRAINING)
"""Starts of all sentences that follow from rows."""

FRESH_HEAD_MODES = ("linear", "soft")
"""Modes that real images have rows of."""


def format_top1_percent(row: AccuracyRow) -> str:
    """Return a row's top-1 accuracy in percent, with its deviation where there are several seeds."""
    deviation = f" ± {100 * row.top1_std:.1f}" if row.seeds > 1 else ""
    return f"{100 * row.top1_mean:.1f}{deviation} %"


def list_caveats(
    rows: Sequence[AccuracyRow], full_data_rows: Sequence[FullDataRow], entry_records: Sequence[EntryRecord]
) -> list[str]:
    """Return all caveats that follow from accuracies."""
    return [
        *list_random_baseline_warnings(rows),
        *list_soft_label_notes(rows),
        *list_above_full_data_notes(rows, full_data_rows, entry_records),
        *list_earlier_training_notes(rows),
    ]


def list_random_baseline_warnings(rows: Sequence[AccuracyRow]) -> list[str]:
    """Return a sentence for every backbone and mode where random real images do as well as distilled ones.

    Both are trained on with the same protocol, seeds and number of images; real ones in mode `linear`,
    or in `soft` where the distilled ones are.
    """
    warnings = []
    for row in rows:
        baseline = find_random_baseline(row, rows) if row.images == "distilled" else None
        if baseline is not None and row.top1_mean <= baseline.top1_mean:
            warnings.append(
                f"{NOT_BETTER_THAN_RANDOM}: through {row.backbone} at {row.image_size} px, {row.mode}, they "
                f"reach {format_top1_percent(row)}, random real ones {format_top1_percent(baseline)}."
            )
    return list(dict.fromkeys(warnings))


def find_random_baseline(row: AccuracyRow, candidate_rows: Sequence[AccuracyRow]) -> AccuracyRow | None:
    """Return the row of random real images through the same backbone to compare another row with.

    That is one of the same protocol; for modes that real images have no rows of,
    otherwise the one of mode `linear` of the most epochs.
    """
    baseline_mode = row.mode if row.mode in FRESH_HEAD_MODES else "linear"
    random_rows = [
        other
        for other in candidate_rows
        if (other.images, other.mode) == ("random", baseline_mode)
        and (other.backbone, other.image_size) == (row.backbone, row.image_size)
        and other.backbone_hash in (None, row.backbone_hash)
    ]
    same_protocol = [other for other in random_rows if has_same_training_options(other, row)]
    candidates = same_protocol if row.mode == baseline_mode else same_protocol or random_rows
    return max(candidates, key=lambda other: (other.epochs or 0, other.seeds), default=None)


def has_same_training_options(baseline: AccuracyRow, row: AccuracyRow) -> bool:
    """Return whether two rows have the same protocol; views count where both train a head on them."""
    have_same_options = (baseline.epochs, baseline.seed, baseline.seeds) == (row.epochs, row.seed, row.seeds)
    return have_same_options and (baseline.views == row.views or row.mode not in VIEWS_BY_SEED_MODES)


def list_soft_label_notes(rows: Sequence[AccuracyRow]) -> list[str]:
    """Return a sentence about the labels of rows of mode ``soft``: their origin and their size."""
    records = dict.fromkeys(row.labels for row in rows if row.labels)
    return [
        f"{SOFT_LABELS_KNOW_REAL_IMAGES}, from the classifier of all real images through {labels.backbone} "
        f"({labels.views} views, temperature {labels.temperature:g}; {labels.bytes:,} bytes for the "
        f"distilled images). Real images have such labels, too: compare soft rows with soft rows, and with "
        f"linear."
        for labels in records
    ]


def list_earlier_training_notes(rows: Sequence[AccuracyRow]) -> list[str]:
    """Return a sentence about rows of `joint` and `stage` whose training was another one, if any."""
    earlier = [f"{row.mode} on {row.backbone}" for row in rows if is_row_of_earlier_training(row)]
    if not earlier:
        return []
    return [
        f"{EARLIER_TRAINING}: {', '.join(dict.fromkeys(earlier))}. Their projector started at zero and was "
        f"trained on the labels, at ten times the learning rate; evaluate again to replace them."
    ]


def list_above_full_data_notes(
    rows: Sequence[AccuracyRow], full_data_rows: Sequence[FullDataRow], entry_records: Sequence[EntryRecord]
) -> list[str]:
    """Return a sentence for every backbone with a row above the classifier of all real images."""
    train_per_class = {(e.backbone, e.image_size): e.train_per_class for e in entry_records}
    sentences = []
    for full in full_data_rows:
        if full.classifier != "linear":
            continue
        backbone = (full.backbone, full.image_size)
        better_rows = [
            f"{r.mode} {format_top1_percent(r)}"
            for r in rows
            if (r.backbone, r.image_size) == backbone and r.top1_mean > full.top1
        ]
        better_rows += [
            f"{f.classifier} {100 * f.top1:.1f} %"
            for f in full_data_rows
            if (f.backbone, f.image_size) == backbone and f.top1 > full.top1
        ]
        if better_rows:
            count = train_per_class.get(backbone)
            trained_on = f", which learned from {count:,.0f} images per class" if count else ""
            sentences.append(
                f"{ABOVE_FULL_DATA}, through {full.backbone} at {full.image_size} px: "
                f"{', '.join(dict.fromkeys(better_rows))}; the classifier of all real images has "
                f"{100 * full.top1:.1f} %{trained_on}. It is no upper bound: on few images, class means can "
                f"be the better classifier. See docs/evaluation.md."
            )
    return sentences

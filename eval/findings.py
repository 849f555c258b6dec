"""What figures say against the images, or against themselves: sentences that stand beside them."""

from collections.abc import Sequence

from sfm.eval.result import EntryRecord, FullData, Row

READ_ELSEWHERE = frozenset({"inherit", "inherit-ridge"})
"""Modes that show the store's classifier more than the images on the backbone distilled on."""

NO_BETTER = "The distilled images are no better than as many real ones picked at random"
"""How a warning begins."""

ABOVE_FULL_DATA = "Above 100 % of full data"
"""How the sentence begins that names what beats the classifier of all real images."""


def say(row: Row) -> str:
    """Write a row's top-1 accuracy in percent, with its deviation where it was repeated."""
    spread = f" ± {100 * row.top1_std:.1f}" if row.seeds > 1 else ""
    return f"{100 * row.top1_mean:.1f}{spread} %"


def findings(rows: Sequence[Row], full_data: Sequence[FullData], entries: Sequence[EntryRecord]) -> list[str]:
    """Return all that figures say against the images, or against themselves."""
    return [*warnings_of(rows), *above_full_data(rows, full_data, entries)]


def warnings_of(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for every backbone and mode where random real images do as well as distilled ones.

    Both are trained on with the same protocol, seeds and number of images; real ones in mode `linear`.
    """
    found = []
    for row in rows:
        real = random_beside(row, rows) if row.images == "distilled" else None
        if real is not None and row.top1_mean <= real.top1_mean:
            found.append(
                f"{NO_BETTER}: through {row.backbone} at {row.image_size} px, {row.mode}, they reach "
                f"{say(row)}, random real ones {say(real)}."
            )
    return list(dict.fromkeys(found))


def random_beside(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row of random real images through the same backbone that another row is to be held against.

    That is one of the same protocol; for other modes than `linear` otherwise the one of the most epochs.
    """
    same = [
        real
        for real in rows
        if real.images == "random"
        and (real.backbone, real.image_size) == (row.backbone, row.image_size)
        and real.backbone_hash in (None, row.backbone_hash)
    ]
    alike = [real for real in same if measured_alike(real, row)]
    found = alike if row.mode == "linear" else alike or same
    return max(found, key=lambda real: (real.epochs or 0, real.seeds), default=None)


def measured_alike(real: Row, row: Row) -> bool:
    """Return whether two rows have the same protocol; views count where both train a head on them."""
    same = (real.epochs, real.seed, real.seeds) == (row.epochs, row.seed, row.seeds)
    return same and (real.views == row.views or row.mode not in ("linear", "kd"))


def above_full_data(
    rows: Sequence[Row], full_data: Sequence[FullData], entries: Sequence[EntryRecord]
) -> list[str]:
    """Return a sentence for every backbone on which something beats the classifier of all real images."""
    per_class = {(e.backbone, e.image_size): e.train_per_class for e in entries}
    found = []
    for full in full_data:
        if full.classifier != "linear":
            continue
        same = (full.backbone, full.image_size)
        better = [
            f"{r.mode} {say(r)}"
            for r in rows
            if (r.backbone, r.image_size) == same and r.top1_mean > full.top1
        ]
        better += [
            f"{f.classifier} {100 * f.top1:.1f} %"
            for f in full_data
            if (f.backbone, f.image_size) == same and f.top1 > full.top1
        ]
        if better:
            count = per_class.get(same)
            learned = f", which learned from {count:,.0f} images per class" if count else ""
            found.append(
                f"{ABOVE_FULL_DATA}, through {full.backbone} at {full.image_size} px: "
                f"{', '.join(dict.fromkeys(better))}; the classifier of all real images has "
                f"{100 * full.top1:.1f} %{learned}. It is no upper bound: on few images, class means can "
                f"be the better classifier. See docs/evaluation.md."
            )
    return found

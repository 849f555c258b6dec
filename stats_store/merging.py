"""The entry of a union of datasets, from the entries of its parts: no image is seen."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from sfm.backbones.card import describe_backbone_differences
from sfm.errors import DamageError, InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.stats_store.accuracy import top_accuracies
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, FileCounts
from sfm.stats_store.digest import BLOCK_ROWS, canonical, sha256
from sfm.stats_store.discriminant import linear_discriminant
from sfm.stats_store.merged_rendering import (
    add_marks,
    common_rendering,
    rendering_notes,
    require_one_rendering,
)
from sfm.stats_store.moments import Moments, among, merge, no_moments
from sfm.stats_store.publish import Draft, Published, publish
from sfm.stats_store.schema import generic, sub_classes
from sfm.stats_store.select import described
from sfm.stats_store.store import Entry, Store
from sfm.stats_store.values import diagonal_problem

MOMENTS = ("train/count", "train/mean", "train/scatter_diagonal", "train/within_scatter")
ALIKE = ("precision", "views")
"""Options of an extraction that shape every feature: parts that differ in them have no common features."""


@dataclass(frozen=True)
class Rows:
    """Features and labels of one split over all parts; memory holds one block, read when it is asked for.

    Iterating yields (features, labels): float32 (n, D) and int32 (n,), labels of the union.

    Attributes
    ----------
    split : {"train", "test"}
    parts : tuple of Entry
    positions : tuple of ndarray of int
        Per part, where each of its classes is in the union.
    """

    split: str
    parts: tuple[Entry, ...]
    positions: tuple[npt.NDArray[np.intp], ...]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
        start = 0
        labels = self.labels()
        for part in self.parts:
            total = part.array(f"{self.split}/feature").shape[0]
            for row in range(0, total, BLOCK_ROWS):
                rows = part.read(f"{self.split}/feature", slice(row, min(row + BLOCK_ROWS, total)))
                yield rows.astype(np.float32), labels[start : start + len(rows)]
                start += len(rows)

    def labels(self) -> npt.NDArray[np.int32]:
        """Return the labels of all rows, in order."""
        own = [
            position[part.read(f"{self.split}/label")]
            for part, position in zip(self.parts, self.positions, strict=True)
        ]
        return np.concatenate(own).astype(np.int32)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The widest type that a part stores its features in."""
        return np.result_type(*(part.array(f"{self.split}/feature").dtype for part in self.parts))

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the features in blocks of exactly ``BLOCK_ROWS``, but for the last."""
        waiting = np.zeros((0, self.parts[0].backbone.features), dtype=self.dtype)
        for rows, _ in self:
            waiting = np.concatenate([waiting, rows.astype(self.dtype)])
            if len(waiting) >= BLOCK_ROWS:
                yield waiting[:BLOCK_ROWS]
                waiting = waiting[BLOCK_ROWS:]
        if len(waiting):
            yield waiting


@dataclass(frozen=True)
class Trained:
    """A linear classifier of raw features, ``logits = feature @ weight.T + bias``, and how it was made."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    solver: str
    l2: float
    iterations: int
    converged: bool


Trainer = Callable[[Rows, Moments], Trained]
"""Trains the classifier of an entry on its training features."""


@dataclass(frozen=True)
class Pooled:
    """The parts of a union, and where their classes are in it.

    Attributes
    ----------
    parts : tuple of Entry
        In an order that depends on their content alone.
    class_ids, class_names : list of str
        Of the union, sorted by class id.
    positions : tuple of ndarray of int
        Per part, where each of its classes is in the union.
    """

    parts: tuple[Entry, ...]
    class_ids: list[str]
    class_names: list[str]
    positions: tuple[npt.NDArray[np.intp], ...]

    def rows(self, split: str) -> Rows | None:
        """Return the features of a split; None unless every part stores them."""
        if all(f"{split}/feature" in part and f"{split}/label" in part for part in self.parts):
            return Rows(split, self.parts, self.positions)
        return None

    def sub_classes(self) -> list[int]:
        """Return the numbers of sub-class centres that every part stores."""
        return sorted(set.intersection(*map(sub_classes_of, self.parts)))


def sub_classes_of(part: Entry) -> set[int]:
    """Return the numbers of sub-class centres that an entry stores."""
    return {k for name in part.names() if generic(name) == "train/centre_count" and (k := sub_classes(name))}


@dataclass(frozen=True)
class Merged:
    """What a merge published, and what a user should know about it."""

    published: Published
    notes: list[str]


def merge_entries(
    target: Store,
    parts: Sequence[Entry],
    name: str,
    trainer: Trainer | None = None,
    *,
    replace: bool = False,
    progress: ProgressCallback = no_progress,
) -> Merged:
    """Publish the entry of the union of disjoint datasets, from the entries of these datasets.

    Counts, means and scatters are those of the pooled data, up to rounding. Sub-class centres are clustered
    again from the parts' centres, weighted by their counts. Held-out features, and training features where
    every part stores them, are put one after the other. The classifier is trained on the training features,
    or is the linear discriminant of the merged moments. Exemplars are left out: they are images, and number
    samples of sources that the union does not have.

    Parameters
    ----------
    target : Store
        Where to publish.
    parts : sequence of Entry
        Two or more, in any order; the result does not depend on it.
    name : str
        Of the union.
    trainer : callable, optional
        Without it the classifier is the linear discriminant, whatever the parts store.
    replace : bool
        Publish the next generation if this very union is there already.
    progress : callable, optional

    Raises
    ------
    DamageError
        If a part is not what was published.
    InputError
        If the parts share data, differ in backbone, role or options that shape features, or lack moments.
    """
    began = time.perf_counter()
    require_mergeable(parts)
    union = united(parts)
    train, test = union.rows("train"), union.rows("test")
    progress(Progress("merge", 0, 4, "steps"))
    with threadpool_limits(limits=1):  # parallel sums differ from run to run
        moments = merged_moments(union)
        progress(Progress("merge", 1, 4, "steps"))
        centres = {k: merged_centres(union, k) for k in union.sub_classes()}
    progress(Progress("merge", 2, 4, "steps"))
    trained = train is not None and trainer is not None
    classifier = trainer(train, moments) if train and trainer else closed_form(moments)
    progress(Progress("merge", 3, 4, "steps"))
    top1, top5 = top_accuracies(test, classifier.weight, classifier.bias) if test else (None, None)
    draft = Draft(target)
    try:
        write(draft, moments, centres, classifier, [rows for rows in (train, test) if rows])
        published = publish(
            draft,
            union.parts[0].backbone,
            dataset_card(union, name, int(moments.count.sum()), len(test.labels()) if test else 0),
            ExtractionCard(
                options=options_of(union, trained, centres),
                role=union.parts[0].extraction.role,
                versions={package: version(package) for package in ("sfm-distill", "numpy", "scikit-learn")},
                device="cpu",
                threads=1,
                seconds=time.perf_counter() - began,
                images_per_second=0.0,
                skipped=[sample for part in union.parts for sample in part.extraction.skipped],
                **add_marks(union.parts),
                files=added_files([part.extraction.files for part in union.parts]),
            ),
            ClassifierCard(
                solver=classifier.solver,
                l2=classifier.l2,
                iterations=classifier.iterations,
                converged=classifier.converged,
                held_out_top1=top1,
                held_out_top5=top5,
            ),
            replace=replace,
        )
    except ValidationError as error:
        draft.discard()
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the union is larger than an entry may be: {where}: {first['msg']}") from error
    except BaseException:
        draft.discard()
        raise
    progress(Progress("merge", 4, 4, "steps"))
    return Merged(published, notes_on(union, classifier))


def write(
    draft: Draft,
    moments: Moments,
    centres: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]],
    classifier: Trained,
    splits: Sequence[Rows],
) -> None:
    """Write the arrays of a union."""
    draft.write("train/count", moments.count)
    draft.write("train/mean", moments.mean)
    draft.write("train/scatter_diagonal", moments.scatter_diagonal)
    draft.write("train/within_scatter", moments.within_scatter)
    for k, (centre, count) in centres.items():
        draft.write(f"train/centre_{k}", centre)
        draft.write(f"train/centre_count_{k}", count)
    draft.write("classifier/weight", classifier.weight)
    draft.write("classifier/bias", classifier.bias)
    for rows in splits:
        labels = rows.labels()
        shape = (len(labels), moments.mean.shape[1])
        draft.write_blocks(f"{rows.split}/feature", rows.blocks(), shape, rows.dtype)
        draft.write(f"{rows.split}/label", labels)


def require_mergeable(parts: Sequence[Entry]) -> None:
    """Refuse parts that share data, or whose features are not of one kind.

    Raises
    ------
    InputError
        Says which parts, and why.
    """
    if len(parts) < 2:
        raise InputError("a merge needs two parts or more")
    first = parts[0]
    for part in parts:
        which = f"{described(first.summary)} and {described(part.summary)}"
        if part.backbone.hash != first.backbone.hash:
            differing = " and ".join(describe_backbone_differences(first.backbone, part.backbone))
            raise InputError(f"{which} are of different backbones: they differ in {differing}")
        if part.extraction.role != first.extraction.role:
            raise InputError(f"{which} have different roles: {first.extraction.role}, {part.extraction.role}")
        for option in ALIKE:
            own, other = part.extraction.options.get(option), first.extraction.options.get(option)
            if own != other:
                raise InputError(f"{which} were extracted with different {option}: {other}, {own}")
        lacking = [array for array in MOMENTS if array not in part]
        if lacking:
            raise InputError(f"{described(part.summary)} cannot be merged: it holds no {', '.join(lacking)}")
    require_one_rendering(parts)
    times = Counter(leaf for part in parts for leaf in part.dataset.leaves)
    shared = [leaf for leaf, number in times.items() if number > 1]
    if shared:
        holders = [described(part.summary) for part in parts if shared[0] in part.dataset.leaves]
        raise InputError(
            f"the parts share data: the dataset {shared[0][:12]} is in {' and in '.join(holders)}; merge "
            f"every dataset once"
        )


def united(parts: Sequence[Entry]) -> Pooled:
    """Order the parts, and find where their classes are in the union."""
    ordered = tuple(sorted(parts, key=lambda part: (part.dataset.fingerprint, part.summary.entry_digest)))
    names: dict[str, str] = {}
    for part in ordered:
        for class_id, class_name in zip(part.dataset.class_ids, part.dataset.class_names, strict=True):
            names.setdefault(class_id, class_name)
    ids = sorted(names)
    place = {class_id: i for i, class_id in enumerate(ids)}
    positions = tuple(np.array([place[i] for i in part.dataset.class_ids], dtype=np.intp) for part in ordered)
    return Pooled(ordered, ids, [names[i] for i in ids], positions)


def merged_moments(union: Pooled) -> Moments:
    """Return the moments of the pooled data (design, section 4)."""
    total = no_moments(len(union.class_ids), union.parts[0].backbone.features)
    for part, position in zip(union.parts, union.positions, strict=True):
        own = Moments(*(part.read(name) for name in MOMENTS))
        if problem := diagonal_problem(np.diagonal(own.within_scatter), own.scatter_diagonal):
            raise DamageError(f"damaged array runs/{part.commit.run}/train/within_scatter: {problem}")
        total = merge(total, among(own, position, len(union.class_ids)))
    return total


def merged_centres(union: Pooled, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Cluster the parts' sub-class centres, each weighted by the number of its samples.

    A class that only one part has keeps its centres.

    Returns
    -------
    centre : ndarray of float32, shape (C, k, D)
    count : ndarray of int64, shape (C, k)
        Largest first. Rows that a small class cannot fill are NaN with count 0.
    """
    classes, features = len(union.class_ids), union.parts[0].backbone.features
    centre = np.full((classes, k, features), np.nan, dtype=np.float32)
    count = np.zeros((classes, k), dtype=np.int64)
    held = [(part.read(f"train/centre_{k}"), part.read(f"train/centre_count_{k}")) for part in union.parts]
    where = [{int(c): i for i, c in enumerate(position)} for position in union.positions]
    for c in range(classes):
        own = [(rows[at[c]], n[at[c]]) for (rows, n), at in zip(held, where, strict=True) if c in at]
        points = np.concatenate([rows[n > 0] for rows, n in own]).astype(np.float64)
        weights = np.concatenate([n[n > 0] for _, n in own])
        found, sizes = weighted_k_means(points, weights, k)
        centre[c, : len(found)], count[c, : len(found)] = found, sizes
    return centre, count


def weighted_k_means(
    points: npt.NDArray[np.float64], weights: npt.NDArray[np.int64], k: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return at most k centres of weighted points and the weight of each, heaviest first.

    Up to k points are their own centres.
    """
    cluster = np.arange(len(points))
    if len(points) > k:
        with warnings.catch_warnings():
            # Points that coincide leave clusters empty: they drop out below.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = KMeans(k, n_init=4, random_state=0, algorithm="lloyd")
            cluster = model.fit(points, sample_weight=weights).labels_
    sizes = np.array([weights[cluster == j].sum() for j in range(min(k, len(points)))], dtype=np.int64)
    order = [j for j in np.argsort(-sizes, kind="stable") if sizes[j] > 0]
    centres = [weights[cluster == j] @ points[cluster == j] / sizes[j] for j in order]
    return np.array(centres).reshape(len(order), points.shape[1]), sizes[order]


def closed_form(moments: Moments) -> Trained:
    """Return the linear discriminant of the moments."""
    found = linear_discriminant(moments)
    solver = f"linear discriminant in closed form from merged moments, shrinkage {found.shrinkage:.4g}"
    return Trained(found.weight, found.bias, solver, l2=0.0, iterations=0, converged=True)


def options_of(union: Pooled, trained: bool, centres: dict[int, Any]) -> dict[str, Any]:
    """Return everything besides backbone and data that shapes the arrays; its digest is in the key."""
    options = union.parts[0].extraction.options
    return {
        "origin": "merged",
        "role": union.parts[0].extraction.role,
        "parts": sorted(part.summary.entry_digest for part in union.parts),
        "classifier": "trained" if trained else "linear discriminant",
        "sub_classes": sorted(centres),
        **{name: options[name] for name in ALIKE if name in options},
        **common_rendering(union.parts),
    }


def added_files(parts: Sequence[FileCounts | None]) -> FileCounts | None:
    """Return what became of the files of all parts; None if one does not say."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    unused = sum((Counter(part.unused) for part in known), Counter[str]())
    return FileCounts(
        found=sum(part.found for part in known), used=sum(part.used for part in known), unused=dict(unused)
    )


def dataset_card(union: Pooled, name: str, train: int, test: int) -> DatasetCard:
    """Say which images the entry is of."""
    cards = [part.dataset for part in union.parts]
    leaves = sorted(leaf for card in cards for leaf in card.leaves)
    return DatasetCard(
        name=name,
        class_ids=union.class_ids,
        class_names=union.class_names,
        train_samples=train,
        test_samples=test,
        fingerprint=sha256(canonical(leaves)),
        leaves=leaves,
        licence="; ".join(sorted({card.licence for card in cards})),
        source="merged from " + ", ".join(sorted(described(part.summary) for part in union.parts)),
    )


def notes_on(union: Pooled, classifier: Trained) -> list[str]:
    """Return what the parts hold and the union does not, and where its classifier is from."""
    notes = [f"classifier: {classifier.solver}"]
    for split, what in (("train", "training features"), ("test", "held-out features")):
        lacking = [described(p.summary) for p in union.parts if f"{split}/feature" not in p]
        if 0 < len(lacking) < len(union.parts):
            notes.append(f"no {what}: {'; '.join(lacking)} holds none")
    dropped = sorted(set.union(*map(sub_classes_of, union.parts)) - set(union.sub_classes()))
    if dropped:
        notes.append(f"no {', '.join(map(str, dropped))} sub-class centres: not every part holds them")
    notes += rendering_notes(union.parts)
    if any("exemplar/image" in part for part in union.parts):
        notes.append("exemplars are not merged: they are images, and stay where they are")
    return notes

"""Values that cannot be statistics of a dataset are found, by whoever reads them; all others pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy_entries import CLASSES, FEATURES, make_backbone_card

from sfm.errors import DamageError
from sfm.pipeline.block_moments import compute_moments
from sfm.pipeline.sub_class_centres import find_nearest_centres
from sfm.stats_store.array_values import ArrayConsistencyCheck, find_value_problem
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, Summary
from sfm.stats_store.class_moments import merge_moments
from sfm.stats_store.digests import compute_sha256
from sfm.stats_store.entry_merge import merge_entries
from sfm.stats_store.merge_inputs import MOMENT_ARRAYS
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import Store, open_or_create_store
from sfm.stats_store.verification import verify_entries

NAN, INF = float("nan"), float("inf")


def make_dataset_card(train: int, test: int = 0, name: str = "toy") -> DatasetCard:
    ids = [f"n{i}" for i in range(CLASSES)]
    return DatasetCard(
        name=name,
        class_ids=ids,
        class_names=ids,
        train_samples=train,
        test_samples=test,
        fingerprint=compute_sha256(name.encode()),
        leaves=[compute_sha256(name.encode())],
    )


def make_valid_arrays(features: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return all arrays of the entry of some samples, each of which is held out as well."""
    moments = compute_moments(features, labels, CLASSES)
    place = np.full((CLASSES, 2, FEATURES), [[[0.0], [9.0]]])
    nearest = np.array(
        [
            find_nearest_centres(row[None], place[label])[0]
            for row, label in zip(features, labels, strict=True)
        ]
    )
    count = np.array([[np.sum((labels == c) & (nearest == k)) for k in (0, 1)] for c in range(CLASSES)])
    centre = np.full(place.shape, np.nan, np.float32)
    for c, k in np.argwhere(count):
        centre[c, k] = features[(labels == c) & (nearest == k)].mean(axis=0)
    return {
        **dict(zip(MOMENT_ARRAYS, vars(moments).values(), strict=True)),
        "train/centre_2": centre,
        "train/centre_count_2": count,
        "classifier/weight": np.ones((CLASSES, FEATURES), np.float32),
        "classifier/bias": np.zeros(CLASSES, np.float32),
        "test/feature": features,
        "test/label": labels,
        "train/feature": features.astype(np.float16),
        "train/label": labels,
        "exemplar/role": np.array([[1, 0]] * (CLASSES - 1) + [[1, 255]], np.uint8),
        "exemplar/sample": np.array([[0, 1]] * (CLASSES - 1) + [[0, -1]]),
    }


SAMPLES = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, (n, FEATURES), elements=st.floats(-100, 100, width=16)),
        arrays(np.int32, n, elements=st.integers(0, CLASSES - 1)),
    )
)


def find_problems(found: dict[str, np.ndarray], dataset: DatasetCard, rows: int = 100) -> list[str]:
    """Return all that is wrong with the arrays of an entry, read some rows at a time."""
    comparison, problems = ArrayConsistencyCheck(), []
    for name, array in found.items():
        for start in range(0, len(array), rows):
            part = array[start : start + rows]
            problems.append(find_value_problem(name, part, dataset))
            comparison.add_rows(name, part, start)
    return [*filter(None, problems), *comparison.find_contradictions_by_array().values()]


@given(SAMPLES, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_valid_arrays_pass_value_checks_in_chunks_of_any_size(samples: Any, rows: int) -> None:
    features, labels = samples
    assert find_problems(make_valid_arrays(features, labels), make_dataset_card(len(labels)), rows) == []


@given(SAMPLES, SAMPLES)
@settings(max_examples=40, deadline=None)
def test_merged_moments_pass_value_checks(one: Any, other: Any) -> None:
    union = merge_moments(*(compute_moments(features, labels, CLASSES) for features, labels in (one, other)))
    found = dict(zip(MOMENT_ARRAYS, vars(union).values(), strict=True))
    assert find_problems(found, make_dataset_card(len(one[1]) + len(other[1]))) == []


def set_value(place: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return change


def add_value(place: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: set_value(place, array[place] + value)(array)


BAD = [
    ("train/count", set_value(1, -1), "counts from -1"),
    ("train/count", set_value(1, 2**63 - 1), "counts from"),
    ("train/count", add_value(0, 1), "13 samples, the dataset has 12 training samples"),
    ("train/count", set_value(0, 0), "9 samples, the dataset has 12"),
    ("train/mean", set_value((1, 2), NAN), "1 of 24 values is not finite"),
    ("train/mean", set_value((1, 2), -INF), "1 of 24 values is not finite"),
    ("train/mean", set_value(slice(2), NAN), "12 of 24 values are not finite"),
    ("train/scatter_diagonal", set_value((0, 0), -1e-30), "a sum of squares is negative"),
    ("train/scatter_diagonal", set_value((0, 0), NAN), "not finite"),
    ("train/within_scatter", np.negative, "a sum of squares on its diagonal is negative"),
    ("train/within_scatter", set_value((0, 1), 1e9), "it is not symmetric"),
    ("train/within_scatter", set_value((FEATURES - 1, 0), 1e9), "it is not symmetric"),
    ("train/within_scatter", set_value((0, 1), INF), "not finite"),
    ("train/within_scatter", lambda array: 2 * array, "its diagonal is not the sum of"),
    ("train/centre_2", set_value((0, 0, 0), NAN), "1 sub-classes have samples and no finite centre"),
    ("train/centre_2", set_value((0, 0), INF), "1 sub-classes have samples and no finite centre"),
    ("train/centre_count_2", set_value((0, 0), -1), "counts from -1 to"),
    ("train/centre_count_2", set_value((0, 0), 2**62), "counts from"),
    ("train/centre_count_2", set_value((0, 0), 2**63 - 1), "counts from"),
    ("train/centre_count_2", add_value((0, 0), 1), "more samples than 1 classes have"),
    ("classifier/weight", set_value((0, 0), NAN), "not finite"),
    ("classifier/bias", set_value(0, INF), "not finite"),
    ("test/feature", set_value((0, 0), NAN), "not finite"),
    ("test/label", set_value(0, -1), "labels from -1 to 3 of 4 classes"),
    ("test/label", set_value(0, CLASSES), "labels from 0 to 4 of 4 classes"),
    ("test/label", set_value(0, 2**31 - 1), "labels from"),
    ("train/feature", set_value((0, 0), INF), "not finite"),
    ("train/label", set_value(0, 99), "labels from"),
    ("exemplar/role", set_value((0, 0), 7), "roles other than 0, 1, 255"),
    ("exemplar/sample", set_value((0, 0), -2), "sample -2"),
]
IDS = [f"{name}: {reason}" for name, _, reason in BAD]


def make_twelve_samples() -> dict[str, np.ndarray]:
    """Three samples of each class, of which one is near the second centre."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), 3)
    features = rng.standard_normal((len(labels), FEATURES)) + np.tile([0, 0, 9], CLASSES)[:, None]
    return make_valid_arrays(features.astype(np.float32), labels)


@pytest.mark.parametrize(("name", "change", "reason"), BAD, ids=IDS)
def test_invalid_array_value_is_reported(
    name: str, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    found = make_twelve_samples()
    assert find_problems(found, make_dataset_card(12)) == []
    assert reason in find_problems(found | {name: change(found[name])}, make_dataset_card(12))[0]


def test_large_finite_values_pass_value_checks() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        most = np.full((3, FEATURES), np.finfo(dtype).max, dtype)
        assert find_value_problem("test/feature", most, make_dataset_card(3)) is None
        assert find_value_problem("test/feature", -most, make_dataset_card(3)) is None


def publish_arrays(store: Store, found: dict[str, np.ndarray], name: str) -> Summary:
    draft = Draft(store)
    for array, values in found.items():
        if not array.startswith("exemplar/"):
            draft.write_array(array, values)
    extraction = ExtractionCard(
        options={}, role="full", versions={}, device="cpu", threads=1, seconds=0.0, images_per_second=0.0
    )
    classifier = ClassifierCard(
        solver="none", l2=0.0, iterations=0, converged=True, held_out_top1=None, held_out_top5=None
    )
    return publish_draft(
        draft, make_backbone_card(), make_dataset_card(12, 12, name), extraction, classifier
    ).summary


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_or_create_store(str(tmp_path / "store"))


PUBLISHED = {name: bad for bad in reversed(BAD) if not (name := bad[0]).startswith("exemplar/")}
PUBLISHED["both scatters"] = next(bad for bad in BAD if bad[2].startswith("its diagonal"))


@pytest.mark.parametrize(("name", "change", "reason"), PUBLISHED.values(), ids=PUBLISHED)
def test_invalid_array_is_refused_by_read_verify_and_merge(
    store: Store, name: str, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    found = make_twelve_samples()
    good = publish_arrays(store, found, "good")
    bad = publish_arrays(store, found | {name: change(found[name])}, "bad")
    entry = store.open_entry(bad)
    (line,) = verify_entries(store, [bad])[0].problems
    assert line.startswith(f"damaged array runs/{entry.commit.run}/{name}: ")
    assert reason in line
    if not reason.startswith("its diagonal"):  # only where both are at hand
        with pytest.raises(DamageError, match=f"damaged array runs/{entry.commit.run}/{name}: "):
            entry.read_array(name)
    if name.startswith(("classifier/", "train/feature", "train/label")):
        return  # not merged: without a trainer the union has a classifier in closed form
    for parts in ([bad, good], [good, bad]):
        with pytest.raises(DamageError, match=f"damaged array runs/{entry.commit.run}/{name}: "):
            merge_entries(store, [store.open_entry(part) for part in parts], "union")
    assert {s.dataset for s in store.list_summaries()} == {"good", "bad"}


def test_value_checks_cover_the_rows_being_read(store: Store) -> None:
    found = make_twelve_samples()
    bad = publish_arrays(
        store, found | {"test/feature": set_value((11, 0), NAN)(found["test/feature"])}, "bad"
    )
    entry = store.open_entry(bad)
    assert np.array_equal(entry.read_array("test/feature", slice(0, 6)), found["test/feature"][:6])
    with pytest.raises(DamageError, match="1 of 36 values is not finite"):
        entry.read_array("test/feature", slice(6, 12))


def test_entry_with_a_class_without_training_samples_verifies(store: Store) -> None:
    features, labels = np.ones((12, FEATURES), np.float32), np.repeat(np.arange(3, dtype=np.int32), 4)
    summary = publish_arrays(store, make_valid_arrays(features, labels), "lone")
    assert [v.problems for v in verify_entries(store)] == [[]]
    assert store.open_entry(summary).read_array("train/count").tolist() == [4, 4, 4, 0]

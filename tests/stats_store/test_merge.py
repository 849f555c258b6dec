"""Merging: the entry of a union from the entries of its parts, as if the data had been pooled."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from toy_entries import make_backbone_card

from sfm.errors import DamageError, InputError
from sfm.pipeline.block_moments import compute_moments
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, FileCounts
from sfm.stats_store.class_moments import (
    ClassMoments,
    expand_moments_to_class_union,
    make_empty_moments,
    merge_moments,
)
from sfm.stats_store.discriminant import compute_oas_shrinkage, fit_linear_discriminant
from sfm.stats_store.entry_merge import MergeResult, merge_entries
from sfm.stats_store.merge_inputs import MOMENT_ARRAYS
from sfm.stats_store.merged_statistics import compute_cluster_centres_and_weights
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import Entry, Store, open_or_create_store
from sfm.stats_store.verification import verify_entries

FEATURES = 6


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and class ids of some samples."""

    features: np.ndarray
    labels: np.ndarray
    ids: list[str]

    def moments(self) -> ClassMoments:
        return compute_moments(self.features, self.labels, len(self.ids))


def make_data(seed: int, samples: int = 60, classes: int = 5, shift: float = 10.0) -> LabelledFeatures:
    """Features far from zero, where sums of squares would lose digits."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, samples)).astype(np.int32)
    means = rng.standard_normal((classes, FEATURES)) * 2 + shift
    features = means[labels] + rng.standard_normal((samples, FEATURES))
    return LabelledFeatures(features.astype(np.float32), labels, [f"c{i}" for i in range(classes)])


def select_samples(whole: LabelledFeatures, rows: np.ndarray) -> LabelledFeatures:
    """The samples a team has; it knows only the classes that it has samples of."""
    known = np.unique(whole.labels[rows])
    labels = np.searchsorted(known, whole.labels[rows]).astype(np.int32)
    return LabelledFeatures(whole.features[rows], labels, [whole.ids[c] for c in known])


def publish_part(store: Store, own: LabelledFeatures, leaf: str, **words) -> Entry:
    """Publish the entry of some samples; `words` change what it holds."""
    moments, dtype = own.moments(), words.get("dtype", np.float16)
    draft = Draft(store)
    for name, array in zip(MOMENT_ARRAYS, vars(moments).values(), strict=True):
        draft.write_array(name, array)
    draft.write_array("classifier/weight", np.zeros((len(own.ids), FEATURES), dtype=np.float32))
    draft.write_array("classifier/bias", np.zeros(len(own.ids), dtype=np.float32))
    for k in words.get("sub_classes", (2,)):
        centre = np.full((len(own.ids), k, FEATURES), np.nan, dtype=np.float32)
        count = np.zeros((len(own.ids), k), dtype=np.int64)
        for c in range(len(own.ids)):
            rows = own.features[own.labels == c]
            for j, group in enumerate(g for g in np.array_split(rows, k) if len(g)):
                centre[c, j], count[c, j] = group.mean(axis=0), len(group)
        draft.write_array(f"train/centre_{k}", centre)
        draft.write_array(f"train/centre_count_{k}", count)
    for split in words.get("splits", ("test",)):
        draft.write_array(f"{split}/feature", own.features.astype(dtype))
        draft.write_array(f"{split}/label", own.labels)
    if words.get("exemplars"):
        draft.write_array("exemplar/image", np.zeros((len(own.ids), 1, 96, 96, 3), dtype=np.uint8))
    done = publish_draft(
        draft,
        words.get("backbone", make_backbone_card()),
        DatasetCard(
            name=words.get("name", "part"),
            class_ids=own.ids,
            class_names=[f"{i} of {leaf}" for i in own.ids],
            train_samples=len(own.labels),
            test_samples=len(own.labels),
            fingerprint=leaf,
            leaves=[leaf],
            licence=words.get("licence", "CC0"),
        ),
        ExtractionCard(
            options={"origin": "extracted", "precision": words.get("precision", "float32"), "views": 1}
            | {name: words[name] for name in ("background", "white") if name in words},
            role=words.get("role", "full"),
            versions={},
            device="cpu",
            threads=1,
            seconds=0.0,
            images_per_second=0.0,
            composited=words.get("composited"),
            files=words.get("files"),
        ),
        ClassifierCard(
            solver="none", l2=0, iterations=0, converged=True, held_out_top1=0.5, held_out_top5=None
        ),
    )
    return store.open_entry(done.summary)


def open_merged_entry(store: Store, merged: MergeResult) -> Entry:
    return store.open_entry(merged.publish_result.summary)


def make_memory_store() -> Store:
    return open_or_create_store(MemoryStore())


@pytest.fixture
def store() -> Store:
    """An empty store in memory."""
    return make_memory_store()


def assert_moments(entry: Entry, whole: LabelledFeatures) -> None:
    """Equal to those of the pooled data to 1e-9 of the scale of each array."""
    pooled = whole.moments()
    present = [whole.ids.index(i) for i in entry.dataset.class_ids]
    assert (np.delete(pooled.count, present) == 0).all()
    np.testing.assert_array_equal(entry.read_array("train/count"), pooled.count[present])
    for name, expected in (
        ("train/mean", pooled.mean[present]),
        ("train/scatter_diagonal", pooled.scatter_diagonal[present]),
        ("train/within_scatter", pooled.within_scatter),
    ):
        assert entry.read_array(name).dtype == np.float64
        np.testing.assert_allclose(
            entry.read_array(name), expected, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(expected).max())
        )


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 3), min_size=60, max_size=60),
    st.permutations(range(4)),
)
def test_merged_moments_match_the_pooled_data(seed, owners, order):
    whole = make_data(seed)
    total = make_empty_moments(5, FEATURES)
    for owner in order:
        own = select_samples(whole, np.flatnonzero(np.array(owners) == owner))
        position = np.array([whole.ids.index(i) for i in own.ids], dtype=np.intp)
        total = merge_moments(total, expand_moments_to_class_union(own.moments(), position, 5))
    pooled = whole.moments()
    np.testing.assert_array_equal(total.count, pooled.count)
    for name in ("mean", "scatter_diagonal", "within_scatter"):
        expected = getattr(pooled, name)
        np.testing.assert_allclose(
            getattr(total, name), expected, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(expected).max())
        )


@settings(max_examples=8)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2), min_size=60, max_size=60).filter(lambda owners: len(set(owners)) == 3),
    st.permutations(range(3)),
)
def test_merged_entry_moments_match_the_pooled_data_for_any_split_and_order(seed, owners, order):
    store, whole = make_memory_store(), make_data(seed)
    parts = [
        publish_part(store, select_samples(whole, np.flatnonzero(np.array(owners) == i)), f"{i}" * 64)
        for i in order
    ]
    flat = open_merged_entry(store, merge_entries(store, parts, "all"))
    assert_moments(flat, whole)
    two = open_merged_entry(store, merge_entries(store, parts[:2], "two"))
    nested = open_merged_entry(store, merge_entries(store, [parts[2], two], "nested"))
    assert_moments(nested, whole)
    assert nested.dataset.fingerprint == flat.dataset.fingerprint
    assert nested.dataset.leaves == flat.dataset.leaves == ["0" * 64, "1" * 64, "2" * 64]


def test_owner_of_one_part_can_subtract_it_from_the_union(store):
    whole, a, b = publish_two_halves(store)
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    total, mine = union.read_array("train/count"), np.zeros(5, dtype=np.int64)
    mean = np.zeros((5, FEATURES))
    place = [whole.ids.index(i) for i in a.dataset.class_ids]
    mine[place], mean[place] = a.read_array("train/count"), a.read_array("train/mean")
    others = total - mine
    left = np.flatnonzero(others)
    found = (total[:, None] * union.read_array("train/mean") - mine[:, None] * mean)[left] / others[
        left, None
    ]
    assert [whole.ids[c] for c in left] == b.dataset.class_ids
    np.testing.assert_allclose(found, b.read_array("train/mean"), rtol=1e-9)


def publish_two_halves(store: Store, **words) -> tuple[LabelledFeatures, Entry, Entry]:
    """A dataset, and the entries of two teams who have half of it each; each has a class of its own."""
    whole = make_data(3)
    mine = (np.arange(60) % 2 == 0) & (whole.labels != 4) | (whole.labels == 0)
    return (
        whole,
        publish_part(store, select_samples(whole, np.flatnonzero(mine)), "a" * 64, **words),
        publish_part(store, select_samples(whole, np.flatnonzero(~mine)), "b" * 64, **words),
    )


def test_merge_is_independent_of_the_order_of_the_parts(store):
    _, a, b = publish_two_halves(store, splits=("test", "train"), sub_classes=(2, 3))
    one = merge_entries(store, [a, b], "all").publish_result
    other = merge_entries(make_memory_store(), [b, a], "all").publish_result
    assert one.outcome == other.outcome == "published"
    assert one.summary.entry_digest == other.summary.entry_digest
    assert merge_entries(store, [b, a], "all").publish_result.outcome == "already there"


def test_merge_unites_classes_by_id_and_keeps_the_first_display_name(store):
    whole, a, b = publish_two_halves(store)
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    assert a.dataset.class_ids == ["c0", "c1", "c2", "c3"]
    assert b.dataset.class_ids == ["c1", "c2", "c3", "c4"]
    assert union.dataset.class_ids == whole.ids
    assert [name[-1] for name in union.dataset.class_names] == ["a", "a", "a", "a", "b"]


def test_merged_entry_verifies_and_records_its_parts(store):
    _, a, b = publish_two_halves(store, licence="CC-BY")
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    assert all(v.is_sound for v in verify_entries(store))
    assert union.dataset.train_samples == 60
    assert union.dataset.test_samples == 60
    assert union.dataset.licence == "CC-BY"
    assert union.extraction.options["origin"] == "merged"
    assert union.extraction.options["parts"] == sorted([a.summary.entry_digest, b.summary.entry_digest])
    assert union.summary.fingerprint not in (a.summary.fingerprint, b.summary.fingerprint)


def test_merge_concatenates_held_out_features_with_labels_of_the_union(store):
    whole, a, b = publish_two_halves(store)
    union = open_merged_entry(store, merge_entries(store, [b, a], "all"))
    features, labels = union.read_array("test/feature"), union.read_array("test/label")
    assert features.dtype == np.float16
    assert labels.dtype == np.int32
    rows = {(tuple(f), i) for f, i in zip(features.tolist(), labels.tolist(), strict=True)}
    expected = zip(whole.features.astype(np.float16).tolist(), whole.labels.tolist(), strict=True)
    assert rows == {(tuple(f), i) for f, i in expected}
    assert len(labels) == 60


def test_merged_held_out_features_are_float32_if_those_of_any_part_are(store):
    whole = make_data(3)
    a = publish_part(store, select_samples(whole, np.arange(30)), "a" * 64, dtype=np.float16)
    b = publish_part(store, select_samples(whole, np.arange(30, 60)), "b" * 64, dtype=np.float32)
    features = open_merged_entry(store, merge_entries(store, [a, b], "all")).read_array("test/feature")
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[30:], whole.features[30:])


def test_merge_concatenates_features_longer_than_a_block(store):
    whole = make_data(5, samples=9000)
    cut = [np.arange(5000), np.arange(5000, 9000)]
    parts = [publish_part(store, select_samples(whole, rows), f"{i}" * 64) for i, rows in enumerate(cut)]
    union = open_merged_entry(store, merge_entries(store, parts, "all"))
    np.testing.assert_array_equal(union.read_array("test/feature"), whole.features.astype(np.float16))
    np.testing.assert_array_equal(union.read_array("test/label"), whole.labels)


def test_merge_with_a_part_without_held_out_features_drops_them_with_a_note(store):
    whole = make_data(3)
    a = publish_part(store, select_samples(whole, np.arange(30)), "a" * 64, splits=())
    b = publish_part(store, select_samples(whole, np.arange(30, 60)), "b" * 64)
    merged = merge_entries(store, [a, b], "all")
    union = open_merged_entry(store, merged)
    assert "test/feature" not in union
    assert union.dataset.test_samples == 0
    assert union.classifier.held_out_top1 is None
    assert any(note.startswith("no held-out features: part@") for note in merged.notes)


def test_merge_beyond_the_limits_of_a_card_is_refused_and_writes_nothing(store):
    most = FileCounts(found=10**15, used=1)
    parts = [publish_part(store, make_data(seed), f"{seed}" * 64, files=most) for seed in (1, 2)]
    before = len(store.objects.list().collect())
    with pytest.raises(InputError, match=r"larger than an entry may be: found: "):
        merge_entries(store, parts, "u")
    assert len(store.objects.list().collect()) == before


def test_exemplars_are_not_merged(store):
    _, a, b = publish_two_halves(store, exemplars=True)
    merged = merge_entries(store, [a, b], "all")
    assert not [n for n in open_merged_entry(store, merged).list_array_names() if n.startswith("exemplar")]
    assert any("exemplars are not merged" in note for note in merged.notes)


def test_merged_sub_class_centres_preserve_class_means_and_counts(store):
    whole, a, b = publish_two_halves(store, sub_classes=(2, 3))
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    for k in (2, 3):
        centre, count = union.read_array(f"train/centre_{k}"), union.read_array(f"train/centre_count_{k}")
        assert (np.diff(count, axis=1) <= 0).all()
        np.testing.assert_array_equal(count.sum(axis=1), whole.moments().count)
        mean = np.nansum(centre * count[:, :, None], axis=1) / count.sum(axis=1)[:, None]
        np.testing.assert_allclose(mean, whole.moments().mean, rtol=1e-5)


def test_merge_keeps_the_centres_of_a_class_of_a_single_part(store):
    _, a, b = publish_two_halves(store)
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    kept = a.read_array("train/centre_2")[0]
    order = np.argsort(-a.read_array("train/centre_count_2")[0], kind="stable")
    np.testing.assert_array_equal(union.read_array("train/centre_2")[0], kept[order])


def test_merge_keeps_only_sub_class_numbers_common_to_all_parts(store):
    whole = make_data(3)
    a = publish_part(store, select_samples(whole, np.arange(30)), "a" * 64, sub_classes=(2, 3))
    b = publish_part(store, select_samples(whole, np.arange(30, 60)), "b" * 64, sub_classes=(2,))
    merged = merge_entries(store, [a, b], "all")
    assert [n for n in open_merged_entry(store, merged).list_array_names() if "centre" in n] == [
        "train/centre_2",
        "train/centre_count_2",
    ]
    assert any(note.startswith("no 3 sub-class centres") for note in merged.notes)


def test_weighted_k_means_equals_k_means_of_repeated_points():
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    centres, sizes = compute_cluster_centres_and_weights(points, np.array([3, 1, 1, 1]), 2)
    np.testing.assert_allclose(centres, [[0.25], [10.5]])
    assert sizes.tolist() == [4, 2]


def test_weighted_k_means_of_identical_points_has_no_empty_cluster():
    centres, sizes = compute_cluster_centres_and_weights(np.ones((5, 2)), np.array([1, 2, 3, 4, 5]), 3)
    assert sizes.sum() == 15
    assert (sizes > 0).all()
    np.testing.assert_allclose(centres, 1.0)


def test_linear_discriminant_gives_gaussian_posteriors_with_shared_covariance():
    moments = make_data(1, samples=400).moments()
    found = fit_linear_discriminant(moments)
    s = moments.within_scatter / (400 - 5)
    sigma = (1 - found.shrinkage) * s + found.shrinkage * np.trace(s) / FEATURES * np.eye(FEATURES)
    x = make_data(1, samples=50).features.astype(np.float64)
    away = x[:, None] - moments.mean
    log = np.log(moments.count / 400) - np.einsum("ncd,de,nce->nc", away, np.linalg.inv(sigma), away) / 2
    expected = log - np.logaddexp.reduce(log, axis=1, keepdims=True)
    logits = x @ found.weight.astype(np.float64).T + found.bias
    np.testing.assert_allclose(
        logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), expected, rtol=1e-3, atol=1e-3
    )


def test_oas_shrinkage_decreases_with_samples_and_is_one_for_isotropic_covariance():
    covariance = np.diag([1.0, 4.0, 16.0])
    found = [compute_oas_shrinkage(covariance, n) for n in (20, 200, 20000)]
    assert 1 > found[0] > found[1] > found[2] > 0
    assert compute_oas_shrinkage(np.eye(3), 10000) == 1.0
    assert compute_oas_shrinkage(np.zeros((3, 3)), 0) == 1.0


def test_linear_discriminant_of_one_sample_per_class_is_nearest_mean():
    features = np.array([[0, 0], [4, 0], [0, 4]], dtype=np.float32)
    found = fit_linear_discriminant(compute_moments(features, np.arange(3, dtype=np.int32), 3))
    logits = np.array([[1.0, 0.5], [3.0, 1.0], [1.0, 2.5]]) @ found.weight.T + found.bias
    assert logits.argmax(axis=1).tolist() == [0, 1, 2]


def test_linear_discriminant_never_predicts_a_class_without_training_samples():
    whole = make_data(1)
    empty = expand_moments_to_class_union(whole.moments(), np.arange(5) + 1, 6)
    found = fit_linear_discriminant(empty)
    assert np.isfinite(found.weight).all()
    assert ((whole.features @ found.weight.T + found.bias).argmax(axis=1) > 0).all()


def test_merged_classifier_card_records_the_solver_and_held_out_accuracy(store):
    whole, a, b = publish_two_halves(store)
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    assert union.classifier.solver.startswith("linear discriminant in closed form")
    features = whole.features.astype(np.float16).astype(np.float32)
    logits = features @ union.read_array("classifier/weight").T + union.read_array("classifier/bias")
    assert union.classifier.held_out_top1 == pytest.approx((logits.argmax(axis=1) == whole.labels).mean())
    assert union.classifier.held_out_top1 > 0.6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"backbone": make_backbone_card(weights_text="other")},
            "of different backbones: they differ in the weights",
        ),
        (
            {"backbone": make_backbone_card(image_size=64)},
            "of different backbones: they differ in the preprocessing",
        ),
        ({"role": "tuning"}, "have different roles: full, tuning"),
        ({"precision": "bfloat16"}, "extracted with different precision: float32, bfloat16"),
    ],
)
def test_merge_of_incompatible_parts_is_refused(store, words, message):
    whole = make_data(3)
    a = publish_part(store, select_samples(whole, np.arange(30)), "a" * 64)
    b = publish_part(store, select_samples(whole, np.arange(30, 60)), "b" * 64, **words)
    with pytest.raises(InputError, match=message):
        merge_entries(store, [a, b], "all")
    assert len(store.list_summaries()) == 2


def publish_three_parts(store: Store, *words: dict[str, object]) -> list[Entry]:
    """Parts of 20 samples each, with what each of them holds."""
    whole, rows = make_data(3), np.arange(60).reshape(3, 20)
    return [
        publish_part(store, select_samples(whole, own), leaf * 64, **own_words)
        for own, leaf, own_words in zip(rows, "abc", words, strict=True)
    ]


def test_composited_parts_over_one_background_merge_with_opaque_ones(store):
    white = {"background": "white", "composited": 5}
    parts = publish_three_parts(store, {"composited": 0}, white, white | {"composited": 2})
    union = open_merged_entry(store, merge_entries(store, parts, "all"))
    assert (union.extraction.options["background"], union.extraction.composited) == ("white", 7)
    opaque = open_merged_entry(
        store, merge_entries(store, parts[:1] + publish_three_parts(store, {}, {}, {})[1:], "opaque")
    )
    assert "background" not in opaque.extraction.options
    assert opaque.extraction.composited is None


def test_merge_of_parts_over_different_backgrounds_is_refused(store):
    parts = publish_three_parts(store, {}, {"background": "white"}, {"background": "black"})
    with pytest.raises(InputError, match="transparent images over different backgrounds: white, black"):
        merge_entries(store, parts, "all")


def test_merge_of_parts_with_different_white_levels_is_refused(store):
    parts = publish_three_parts(store, {}, {"white": 4095}, {"white": 1023})
    with pytest.raises(InputError, match="take different values of deep images for white: 4095, 1023"):
        merge_entries(store, parts, "union")


def test_merge_records_the_white_level_and_notes_parts_without_one(store):
    alike = publish_three_parts(store, *[{"white": 4095, "composited": 0}] * 3)
    merged = merge_entries(store, alike, "alike")
    assert open_merged_entry(store, merged).extraction.options["white"] == 4095
    assert not [note for note in merged.notes if note.startswith("white")]
    mixed = merge_entries(
        make_memory_store(),
        publish_three_parts(make_memory_store(), {"white": 4095}, {"name": "deep"}, {"white": 4095}),
        "m",
    )
    (note,) = [note for note in mixed.notes if note.startswith("white")]
    assert note.startswith("white: deep@")
    assert "names none, other parts take 4095 for it" in note


def test_merge_notes_parts_that_may_have_dropped_transparency(store):
    white = {"background": "white", "composited": 5}
    merged = merge_entries(
        store, publish_three_parts(store, white, {"name": "old"}, {"composited": 0}), "union"
    )
    (note,) = [note for note in merged.notes if note.startswith("transparency")]
    assert note.startswith("transparency: old@")
    assert "may have dropped it, other parts are over white" in note
    assert open_merged_entry(store, merged).extraction.composited is None


def test_merge_of_parts_that_share_data_is_refused_at_any_depth(store):
    whole, a, b = publish_two_halves(store)
    union = open_merged_entry(store, merge_entries(store, [a, b], "all"))
    third = publish_part(store, select_samples(whole, np.arange(9)), "c" * 64, name="third")
    both = open_merged_entry(store, merge_entries(store, [union, third], "both"))
    for parts in ([a, a], [union, a], [both, b], [both, third]):
        with pytest.raises(InputError, match="the parts share data: the dataset"):
            merge_entries(store, parts, "twice")
    with pytest.raises(InputError, match="two parts or more"):
        merge_entries(store, [a], "one")


def test_merge_of_a_damaged_part_raises_damage_error(tmp_path):
    store = open_or_create_store(str(tmp_path))
    _, a, b = publish_two_halves(store)
    chunk = tmp_path / "runs" / a.commit.run / "train" / "mean" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(DamageError, match="train/mean/c/0/0"):
        merge_entries(store, [a, b], "all")
    assert len(store.list_summaries()) == 2


@pytest.fixture(scope="module")
def team_stores(tmp_path_factory, request) -> Path:
    """Two stores of real entries, of two halves of a dataset, and one of the whole, at 32 px."""
    from sfm.pipeline.extract import extract
    from sfm.pipeline.extract_config import ExtractConfig
    from sfm.pipeline.sources import open_source

    root = tmp_path_factory.mktemp("teams")
    source = open_source("builtin:fashion-mnist-6k")
    for split, count in (("train", 24), ("test", 8)):
        part = source.splits[split]
        for label, class_id in ((1, "trouser"), (8, "bag"), (9, "boot")):
            own = np.flatnonzero(part.labels == label)[:count]
            for number, sample in enumerate(part.read(own)):
                team = "mine" if number % 2 else "yours"
                for owner in (team, "pooled"):
                    folder = root / "images" / owner / split / class_id
                    folder.mkdir(parents=True, exist_ok=True)
                    source.decode(sample.data).save(folder / f"{number:03d}.png")
    for owner in ("mine", "yours", "pooled"):
        config = {"sub_classes": (2,), "keep_train_features": True, "image_size": 32, "backbone": ["lite0"]}
        extract(ExtractConfig(source=f"folder:{root / 'images' / owner}", store=str(root / owner), **config))
    return root


@pytest.mark.slow
def test_merge_of_two_stores_matches_extraction_of_the_pooled_images(team_stores, tmp_path):
    from sfm.named_merge import merge_entries_by_name
    from sfm.stats_store.store import open_store

    done = merge_entries_by_name(
        str(tmp_path / "union"),
        [f"{team_stores / 'mine'}#mine", f"{team_stores / 'yours'}#yours"],
        union_name="clothes",
    )
    union = open_store(str(tmp_path / "union")).open_entry(done.publish_result.summary)
    whole = open_store(str(team_stores / "pooled"))
    pooled = whole.open_entry(whole.list_summaries()[0])
    assert union.dataset.class_ids == pooled.dataset.class_ids == ["bag", "boot", "trouser"]
    np.testing.assert_array_equal(union.read_array("train/count"), pooled.read_array("train/count"))
    for name in MOMENT_ARRAYS[1:]:
        scale = np.abs(pooled.read_array(name)).max()
        np.testing.assert_allclose(
            union.read_array(name), pooled.read_array(name), rtol=1e-3, atol=1e-4 * scale
        )
    assert "on the stored training features of all parts" in union.classifier.solver
    assert union.classifier.held_out_top1 == pytest.approx(pooled.classifier.held_out_top1, abs=0.05)
    assert union.read_array("train/feature").shape == pooled.read_array("train/feature").shape


@pytest.mark.slow
def test_a_merged_entry_can_be_distilled(team_stores, tmp_path):
    from sfm.api import DistillConfig, distill
    from sfm.named_merge import merge_entries_by_name

    url = str(tmp_path / "union")
    done = merge_entries_by_name(
        url, [f"{team_stores / 'mine'}#mine", f"{team_stores / 'yours'}#yours"], union_name="clothes"
    )
    run = distill(DistillConfig(store=url, backbone="lite0", dataset="clothes", out=tmp_path / "d", steps=2))
    assert run.record["entry_digest"] == done.publish_result.summary.entry_digest


def test_merge_by_name_reports_missing_parts_missing_stores_and_invalid_names(team_stores, tmp_path):
    from sfm.named_merge import merge_entries_by_name

    with pytest.raises(InputError, match="no dataset 'yours' in the store: the store holds mine@"):
        merge_entries_by_name(str(team_stores / "mine"), ["mine", "yours"])
    with pytest.raises(InputError, match="no store at"):
        merge_entries_by_name(str(tmp_path / "t"), ["nowhere#mine", f"{team_stores / 'yours'}#yours"])
    with pytest.raises(InputError, match="--name"):
        merge_entries_by_name(str(tmp_path / "t"), ["a", "b"], union_name="a@b")

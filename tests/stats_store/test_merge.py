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
from sfm.stats_store.merged_statistics import cluster_weighted_points
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import Entry, Store, open_or_create_store
from sfm.stats_store.verification import verify_entries

FEATURES = 6


@dataclass(frozen=True)
class Data:
    """Features and class ids of some samples."""

    features: np.ndarray
    labels: np.ndarray
    ids: list[str]

    def moments(self) -> ClassMoments:
        return compute_moments(self.features, self.labels, len(self.ids))


def data(seed: int, samples: int = 60, classes: int = 5, shift: float = 10.0) -> Data:
    """Features far from zero, where sums of squares would lose digits."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, samples)).astype(np.int32)
    means = rng.standard_normal((classes, FEATURES)) * 2 + shift
    features = means[labels] + rng.standard_normal((samples, FEATURES))
    return Data(features.astype(np.float32), labels, [f"c{i}" for i in range(classes)])


def some_of(whole: Data, rows: np.ndarray) -> Data:
    """The samples a team has; it knows only the classes that it has samples of."""
    known = np.unique(whole.labels[rows])
    labels = np.searchsorted(known, whole.labels[rows]).astype(np.int32)
    return Data(whole.features[rows], labels, [whole.ids[c] for c in known])


def put_part(store: Store, own: Data, leaf: str, **words) -> Entry:
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


def opened(store: Store, merged: MergeResult) -> Entry:
    return store.open_entry(merged.publish_result.summary)


def memory() -> Store:
    return open_or_create_store(MemoryStore())


@pytest.fixture
def store() -> Store:
    """An empty store in memory."""
    return memory()


def assert_moments(entry: Entry, whole: Data) -> None:
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
def test_moments_of_parts_add_up_to_those_of_the_pooled_data(seed, owners, order):
    whole = data(seed)
    total = make_empty_moments(5, FEATURES)
    for owner in order:
        own = some_of(whole, np.flatnonzero(np.array(owners) == owner))
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
def test_a_merged_entry_holds_the_moments_of_the_pooled_data_for_any_split_and_order(seed, owners, order):
    store, whole = memory(), data(seed)
    parts = [
        put_part(store, some_of(whole, np.flatnonzero(np.array(owners) == i)), f"{i}" * 64) for i in order
    ]
    flat = opened(store, merge_entries(store, parts, "all"))
    assert_moments(flat, whole)
    two = opened(store, merge_entries(store, parts[:2], "two"))
    nested = opened(store, merge_entries(store, [parts[2], two], "nested"))
    assert_moments(nested, whole)
    assert nested.dataset.fingerprint == flat.dataset.fingerprint
    assert nested.dataset.leaves == flat.dataset.leaves == ["0" * 64, "1" * 64, "2" * 64]


def test_whoever_holds_one_part_can_take_it_off_the_union(store):
    whole, a, b = halves(store)
    union = opened(store, merge_entries(store, [a, b], "all"))
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


def halves(store: Store, **words) -> tuple[Data, Entry, Entry]:
    """A dataset, and the entries of two teams who have half of it each; each has a class of its own."""
    whole = data(3)
    mine = (np.arange(60) % 2 == 0) & (whole.labels != 4) | (whole.labels == 0)
    return (
        whole,
        put_part(store, some_of(whole, np.flatnonzero(mine)), "a" * 64, **words),
        put_part(store, some_of(whole, np.flatnonzero(~mine)), "b" * 64, **words),
    )


def test_the_result_does_not_depend_on_the_order_of_the_parts(store):
    _, a, b = halves(store, splits=("test", "train"), sub_classes=(2, 3))
    one = merge_entries(store, [a, b], "all").publish_result
    other = merge_entries(memory(), [b, a], "all").publish_result
    assert one.outcome == other.outcome == "published"
    assert one.summary.entry_digest == other.summary.entry_digest
    assert merge_entries(store, [b, a], "all").publish_result.outcome == "already there"


def test_classes_are_united_by_id_and_keep_the_first_parts_names(store):
    whole, a, b = halves(store)
    union = opened(store, merge_entries(store, [a, b], "all"))
    assert a.dataset.class_ids == ["c0", "c1", "c2", "c3"]
    assert b.dataset.class_ids == ["c1", "c2", "c3", "c4"]
    assert union.dataset.class_ids == whole.ids
    assert [name[-1] for name in union.dataset.class_names] == ["a", "a", "a", "a", "b"]


def test_a_merged_entry_is_an_entry_like_any_other(store):
    _, a, b = halves(store, licence="CC-BY")
    union = opened(store, merge_entries(store, [a, b], "all"))
    assert all(v.is_sound for v in verify_entries(store))
    assert union.dataset.train_samples == 60
    assert union.dataset.test_samples == 60
    assert union.dataset.licence == "CC-BY"
    assert union.extraction.options["origin"] == "merged"
    assert union.extraction.options["parts"] == sorted([a.summary.entry_digest, b.summary.entry_digest])
    assert union.summary.fingerprint not in (a.summary.fingerprint, b.summary.fingerprint)


def test_held_out_features_are_put_one_after_the_other_with_labels_of_the_union(store):
    whole, a, b = halves(store)
    union = opened(store, merge_entries(store, [b, a], "all"))
    features, labels = union.read_array("test/feature"), union.read_array("test/label")
    assert features.dtype == np.float16
    assert labels.dtype == np.int32
    rows = {(tuple(f), i) for f, i in zip(features.tolist(), labels.tolist(), strict=True)}
    expected = zip(whole.features.astype(np.float16).tolist(), whole.labels.tolist(), strict=True)
    assert rows == {(tuple(f), i) for f, i in expected}
    assert len(labels) == 60


def test_held_out_features_are_float32_if_a_part_needs_it(store):
    whole = data(3)
    a = put_part(store, some_of(whole, np.arange(30)), "a" * 64, dtype=np.float16)
    b = put_part(store, some_of(whole, np.arange(30, 60)), "b" * 64, dtype=np.float32)
    features = opened(store, merge_entries(store, [a, b], "all")).read_array("test/feature")
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[30:], whole.features[30:])


def test_features_longer_than_a_block_arrive_whole(store):
    whole = data(5, samples=9000)
    cut = [np.arange(5000), np.arange(5000, 9000)]
    parts = [put_part(store, some_of(whole, rows), f"{i}" * 64) for i, rows in enumerate(cut)]
    union = opened(store, merge_entries(store, parts, "all"))
    np.testing.assert_array_equal(union.read_array("test/feature"), whole.features.astype(np.float16))
    np.testing.assert_array_equal(union.read_array("test/label"), whole.labels)


def test_a_part_without_held_out_features_leaves_the_union_without_any_and_says_so(store):
    whole = data(3)
    a = put_part(store, some_of(whole, np.arange(30)), "a" * 64, splits=())
    b = put_part(store, some_of(whole, np.arange(30, 60)), "b" * 64)
    merged = merge_entries(store, [a, b], "all")
    union = opened(store, merged)
    assert "test/feature" not in union
    assert union.dataset.test_samples == 0
    assert union.classifier.held_out_top1 is None
    assert any(note.startswith("no held-out features: part@") for note in merged.notes)


def test_a_union_that_no_card_can_hold_is_refused_and_leaves_nothing(store):
    most = FileCounts(found=10**15, used=1)
    parts = [put_part(store, data(seed), f"{seed}" * 64, files=most) for seed in (1, 2)]
    before = len(store.objects.list().collect())
    with pytest.raises(InputError, match=r"larger than an entry may be: found: "):
        merge_entries(store, parts, "u")
    assert len(store.objects.list().collect()) == before


def test_exemplars_stay_where_they_are(store):
    _, a, b = halves(store, exemplars=True)
    merged = merge_entries(store, [a, b], "all")
    assert not [n for n in opened(store, merged).list_array_names() if n.startswith("exemplar")]
    assert any("exemplars are not merged" in note for note in merged.notes)


def test_sub_class_centres_keep_the_class_means_and_counts(store):
    whole, a, b = halves(store, sub_classes=(2, 3))
    union = opened(store, merge_entries(store, [a, b], "all"))
    for k in (2, 3):
        centre, count = union.read_array(f"train/centre_{k}"), union.read_array(f"train/centre_count_{k}")
        assert (np.diff(count, axis=1) <= 0).all()
        np.testing.assert_array_equal(count.sum(axis=1), whole.moments().count)
        mean = np.nansum(centre * count[:, :, None], axis=1) / count.sum(axis=1)[:, None]
        np.testing.assert_allclose(mean, whole.moments().mean, rtol=1e-5)


def test_a_class_of_one_part_keeps_its_centres(store):
    _, a, b = halves(store)
    union = opened(store, merge_entries(store, [a, b], "all"))
    kept = a.read_array("train/centre_2")[0]
    order = np.argsort(-a.read_array("train/centre_count_2")[0], kind="stable")
    np.testing.assert_array_equal(union.read_array("train/centre_2")[0], kept[order])


def test_only_numbers_of_centres_that_all_parts_hold_are_merged(store):
    whole = data(3)
    a = put_part(store, some_of(whole, np.arange(30)), "a" * 64, sub_classes=(2, 3))
    b = put_part(store, some_of(whole, np.arange(30, 60)), "b" * 64, sub_classes=(2,))
    merged = merge_entries(store, [a, b], "all")
    assert [n for n in opened(store, merged).list_array_names() if "centre" in n] == [
        "train/centre_2",
        "train/centre_count_2",
    ]
    assert any(note.startswith("no 3 sub-class centres") for note in merged.notes)


def test_weighted_k_means_is_that_of_repeated_points():
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    centres, sizes = cluster_weighted_points(points, np.array([3, 1, 1, 1]), 2)
    np.testing.assert_allclose(centres, [[0.25], [10.5]])
    assert sizes.tolist() == [4, 2]


def test_centres_that_coincide_count_once():
    centres, sizes = cluster_weighted_points(np.ones((5, 2)), np.array([1, 2, 3, 4, 5]), 3)
    assert sizes.sum() == 15
    assert (sizes > 0).all()
    np.testing.assert_allclose(centres, 1.0)


def test_the_discriminant_gives_the_posteriors_of_gaussians_with_one_covariance():
    moments = data(1, samples=400).moments()
    found = fit_linear_discriminant(moments)
    s = moments.within_scatter / (400 - 5)
    sigma = (1 - found.shrinkage) * s + found.shrinkage * np.trace(s) / FEATURES * np.eye(FEATURES)
    x = data(1, samples=50).features.astype(np.float64)
    away = x[:, None] - moments.mean
    log = np.log(moments.count / 400) - np.einsum("ncd,de,nce->nc", away, np.linalg.inv(sigma), away) / 2
    expected = log - np.logaddexp.reduce(log, axis=1, keepdims=True)
    logits = x @ found.weight.astype(np.float64).T + found.bias
    np.testing.assert_allclose(
        logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), expected, rtol=1e-3, atol=1e-3
    )


def test_shrinkage_falls_as_samples_are_added_and_is_whole_without_any_spread():
    covariance = np.diag([1.0, 4.0, 16.0])
    found = [compute_oas_shrinkage(covariance, n) for n in (20, 200, 20000)]
    assert 1 > found[0] > found[1] > found[2] > 0
    assert compute_oas_shrinkage(np.eye(3), 10000) == 1.0
    assert compute_oas_shrinkage(np.zeros((3, 3)), 0) == 1.0


def test_one_sample_per_class_gives_the_nearest_mean():
    features = np.array([[0, 0], [4, 0], [0, 4]], dtype=np.float32)
    found = fit_linear_discriminant(compute_moments(features, np.arange(3, dtype=np.int32), 3))
    logits = np.array([[1.0, 0.5], [3.0, 1.0], [1.0, 2.5]]) @ found.weight.T + found.bias
    assert logits.argmax(axis=1).tolist() == [0, 1, 2]


def test_a_class_without_training_samples_is_never_the_answer():
    whole = data(1)
    empty = expand_moments_to_class_union(whole.moments(), np.arange(5) + 1, 6)
    found = fit_linear_discriminant(empty)
    assert np.isfinite(found.weight).all()
    assert ((whole.features @ found.weight.T + found.bias).argmax(axis=1) > 0).all()


def test_the_card_says_that_the_classifier_is_the_discriminant_and_how_good_it_is(store):
    whole, a, b = halves(store)
    union = opened(store, merge_entries(store, [a, b], "all"))
    assert union.classifier.solver.startswith("linear discriminant in closed form")
    features = whole.features.astype(np.float16).astype(np.float32)
    logits = features @ union.read_array("classifier/weight").T + union.read_array("classifier/bias")
    assert union.classifier.held_out_top1 == pytest.approx((logits.argmax(axis=1) == whole.labels).mean())
    assert union.classifier.held_out_top1 > 0.6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"backbone": make_backbone_card(weights="other")},
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
def test_parts_that_do_not_go_together_are_refused(store, words, message):
    whole = data(3)
    a = put_part(store, some_of(whole, np.arange(30)), "a" * 64)
    b = put_part(store, some_of(whole, np.arange(30, 60)), "b" * 64, **words)
    with pytest.raises(InputError, match=message):
        merge_entries(store, [a, b], "all")
    assert len(store.list_summaries()) == 2


def three(store: Store, *words: dict[str, object]) -> list[Entry]:
    """Parts of 20 samples each, with what each of them holds."""
    whole, rows = data(3), np.arange(60).reshape(3, 20)
    return [
        put_part(store, some_of(whole, own), leaf * 64, **own_words)
        for own, leaf, own_words in zip(rows, "abc", words, strict=True)
    ]


def test_transparent_parts_over_one_background_go_with_opaque_ones(store):
    white = {"background": "white", "composited": 5}
    parts = three(store, {"composited": 0}, white, white | {"composited": 2})
    union = opened(store, merge_entries(store, parts, "all"))
    assert (union.extraction.options["background"], union.extraction.composited) == ("white", 7)
    opaque = opened(store, merge_entries(store, parts[:1] + three(store, {}, {}, {})[1:], "opaque"))
    assert "background" not in opaque.extraction.options
    assert opaque.extraction.composited is None


def test_parts_over_different_backgrounds_are_refused_wherever_they_are(store):
    parts = three(store, {}, {"background": "white"}, {"background": "black"})
    with pytest.raises(InputError, match="transparent images over different backgrounds: white, black"):
        merge_entries(store, parts, "all")


def test_parts_that_take_different_values_for_white_are_refused(store):
    parts = three(store, {}, {"white": 4095}, {"white": 1023})
    with pytest.raises(InputError, match="take different values of deep images for white: 4095, 1023"):
        merge_entries(store, parts, "union")


def test_a_value_for_white_is_recorded_and_parts_without_it_are_named(store):
    alike = three(store, *[{"white": 4095, "composited": 0}] * 3)
    merged = merge_entries(store, alike, "alike")
    assert opened(store, merged).extraction.options["white"] == 4095
    assert not [note for note in merged.notes if note.startswith("white")]
    mixed = merge_entries(memory(), three(memory(), {"white": 4095}, {"name": "deep"}, {"white": 4095}), "m")
    (note,) = [note for note in mixed.notes if note.startswith("white")]
    assert note.startswith("white: deep@")
    assert "names none, other parts take 4095 for it" in note


def test_a_part_that_may_have_dropped_transparency_is_named_beside_composited_ones(store):
    white = {"background": "white", "composited": 5}
    merged = merge_entries(store, three(store, white, {"name": "old"}, {"composited": 0}), "union")
    (note,) = [note for note in merged.notes if note.startswith("transparency")]
    assert note.startswith("transparency: old@")
    assert "may have dropped it, other parts are over white" in note
    assert opened(store, merged).extraction.composited is None


def test_a_shared_leaf_is_refused_however_deep(store):
    whole, a, b = halves(store)
    union = opened(store, merge_entries(store, [a, b], "all"))
    third = put_part(store, some_of(whole, np.arange(9)), "c" * 64, name="third")
    both = opened(store, merge_entries(store, [union, third], "both"))
    for parts in ([a, a], [union, a], [both, b], [both, third]):
        with pytest.raises(InputError, match="the parts share data: the dataset"):
            merge_entries(store, parts, "twice")
    with pytest.raises(InputError, match="two parts or more"):
        merge_entries(store, [a], "one")


def test_a_damaged_part_is_not_merged(tmp_path):
    store = open_or_create_store(str(tmp_path))
    _, a, b = halves(store)
    chunk = tmp_path / "runs" / a.commit.run / "train" / "mean" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(DamageError, match="train/mean/c/0/0"):
        merge_entries(store, [a, b], "all")
    assert len(store.list_summaries()) == 2


@pytest.fixture(scope="module")
def teams(tmp_path_factory, request) -> Path:
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
def test_two_teams_get_the_entry_of_their_pooled_images_without_seeing_each_others(teams, tmp_path):
    from sfm.named_merge import merge_entries_by_name
    from sfm.stats_store.store import open_store

    done = merge_entries_by_name(
        str(tmp_path / "union"), [f"{teams / 'mine'}#mine", f"{teams / 'yours'}#yours"], name="clothes"
    )
    union = open_store(str(tmp_path / "union")).open_entry(done.publish_result.summary)
    whole = open_store(str(teams / "pooled"))
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
def test_a_merged_entry_can_be_distilled(teams, tmp_path):
    from sfm.api import DistillConfig, distill
    from sfm.named_merge import merge_entries_by_name

    url = str(tmp_path / "union")
    done = merge_entries_by_name(url, [f"{teams / 'mine'}#mine", f"{teams / 'yours'}#yours"], name="clothes")
    run = distill(DistillConfig(store=url, backbone="lite0", dataset="clothes", out=tmp_path / "d", steps=2))
    assert run.record["entry_digest"] == done.publish_result.summary.entry_digest


def test_parts_are_found_in_the_target_store_or_refused_in_one_line(teams, tmp_path):
    from sfm.named_merge import merge_entries_by_name

    with pytest.raises(InputError, match="no dataset 'yours' in the store: the store holds mine@"):
        merge_entries_by_name(str(teams / "mine"), ["mine", "yours"])
    with pytest.raises(InputError, match="no store at"):
        merge_entries_by_name(str(tmp_path / "t"), ["nowhere#mine", f"{teams / 'yours'}#yours"])
    with pytest.raises(InputError, match="--name"):
        merge_entries_by_name(str(tmp_path / "t"), ["a", "b"], name="a@b")

"""The linear classifier converges, and is as accurate as scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.pipeline import feature_scaling, logistic
from sfm.pipeline import linear_classifier as module
from sfm.pipeline.block_moments import accumulate_moments, compute_moments
from sfm.pipeline.feature_scaling import (
    compute_feature_scaling,
    convert_classifier_to_raw_features,
    standardise_rows,
)
from sfm.pipeline.folds import make_even_per_class_mask, make_fold_mask, make_validation_masks
from sfm.pipeline.linear_classifier import LinearClassifier, measure_top1_and_top5, train_classifier
from sfm.pipeline.logistic import LogisticFit, compute_loss_and_gradients, fit_logistic
from sfm.pipeline.staged_features import StagedPartition
from sfm.pipeline.staging import Staging
from sfm.pipeline.sub_class_centres import compute_sub_class_centres
from sfm.stats_store.classifier_accuracy import compute_top1_top5_accuracies
from sfm.stats_store.discriminant import fit_linear_discriminant

CPU = torch.device("cpu")


@pytest.fixture
def staged_toy_features(tmp_path):
    """Overlapping Gaussian classes on badly scaled features, staged in two partitions."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 900).astype(np.int32)
    centres = rng.standard_normal((5, 12))
    features = (
        (centres[labels] + 1.2 * rng.standard_normal((900, 12))) * 10.0 ** rng.uniform(-2, 2, 12)
    ).astype(np.float32)
    features[:, 3] = 7.0
    staging, parts = Staging(tmp_path), []
    for number, rows in enumerate((slice(0, 500), slice(500, 600))):
        partition = StagedPartition("train", number, np.arange(900)[rows], labels[rows])
        staging.write_array("toy", partition, features[rows])
        parts.append(partition)
    return staging.open_features("toy", parts), features, labels


def test_logistic_regression_matches_scikit_learn(staged_toy_features):
    train, features, labels = staged_toy_features
    moments = compute_moments(features[:600], labels[:600], 5)
    spread = compute_feature_scaling(moments)
    zero = LogisticFit(torch.zeros(5, 12, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), 0, False)
    ours = fit_logistic(
        standardise_rows([train], 600, spread, CPU), 600, spread, 0.01, zero, CPU, gradient_tolerance=1e-4
    )
    assert ours.converged
    rows = (features[:600].astype(np.float64) - spread.mean.numpy()) / spread.std.numpy()
    theirs = LogisticRegression(C=1 / (0.01 * 600), tol=1e-8, max_iter=5000).fit(rows, labels[:600])
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=2e-3)


def test_a_classifier_is_bit_for_bit_independent_of_the_thread_count(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(6000, dtype=np.int32) % 40
    features = (rng.standard_normal((40, 130))[labels] + rng.standard_normal((6000, 130))).astype(np.float32)
    staging, partition = Staging(tmp_path), StagedPartition("train", 0, np.arange(6000), labels)
    staging.write_array("toy", partition, features)
    train, found = staging.open_features("toy", [partition]), set()
    for threads in (1, 2, 3, 4):
        with limit_cpu_threads(threads):
            moments = accumulate_moments(train, 40, 130)
            trained = train_classifier(train, moments, CPU, l2_path=(1e-1, 1e-2))
        found.add(b"".join(a.tobytes() for a in (moments.within_scatter, trained.weight, trained.bias)))
    assert len(found) == 1


def test_a_classifier_of_standardised_features_is_converted_to_raw_features(staged_toy_features):
    _, features, labels = staged_toy_features
    spread = compute_feature_scaling(compute_moments(features, labels, 5))
    weight, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    raw_weight, raw_bias = convert_classifier_to_raw_features(weight, bias, spread)
    rows = torch.from_numpy(features).double()
    torch.testing.assert_close(
        rows @ raw_weight.T + raw_bias, (rows - spread.mean) / spread.std @ weight.T + bias
    )


def test_a_constant_feature_gets_zero_weight(staged_toy_features):
    train, features, labels = staged_toy_features
    classifier = train_classifier(train, compute_moments(features[:600], labels[:600], 5), CPU)
    assert np.abs(classifier.weight[:, 3]).max() < 1e-6


def test_logistic_regression_gradients_match_autograd(staged_toy_features):
    train, features, labels = staged_toy_features
    spread = compute_feature_scaling(compute_moments(features[:600], labels[:600], 5))
    rows = list(standardise_rows([train], 600, spread, CPU))
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    loss, outer, total = compute_loss_and_gradients(rows, 600, weight, bias, CPU)
    x, y = torch.cat([x for x, _ in rows]).double(), torch.cat([y for _, y in rows])
    weight.requires_grad_(), bias.requires_grad_()
    expected = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(outer, weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, bias.grad, rtol=1e-4, atol=1e-6)


def test_the_scaling_axes_diagonalise_the_standardised_scatter(staged_toy_features):
    _, features, labels = staged_toy_features
    spread = compute_feature_scaling(compute_moments(features, labels, 5))
    rows = (torch.from_numpy(features).double() - spread.mean) / spread.std
    scatter = spread.principal_axes @ torch.diag(spread.axis_variances) @ spread.principal_axes.T
    torch.testing.assert_close(scatter, rows.T @ rows / 900, atol=1e-6, rtol=1e-6)


def test_rows_too_large_to_cache_give_a_bit_for_bit_equal_classifier(staged_toy_features, monkeypatch):
    train, features, labels = staged_toy_features
    moments = compute_moments(features[:600], labels[:600], 5)
    kept = train_classifier(train, moments, CPU)
    monkeypatch.setattr(feature_scaling, "MAX_CACHED_BYTES", 0)
    assert not isinstance(standardise_rows([train], 600, compute_feature_scaling(moments), CPU), list)
    read_again = train_classifier(train, moments, CPU)
    np.testing.assert_array_equal(read_again.weight, kept.weight)
    np.testing.assert_array_equal(read_again.bias, kept.bias)
    assert kept.converged


def test_standardised_blocks_are_no_larger_than_store_blocks(staged_toy_features, monkeypatch):
    train, features, labels = staged_toy_features
    monkeypatch.setattr(feature_scaling, "BLOCK_ROWS", 200)
    spread = compute_feature_scaling(compute_moments(features[:600], labels[:600], 5))
    rows = list(standardise_rows([train], 600, spread, CPU))
    assert [len(y) for _, y in rows] == [200, 200, 100, 100]
    assert torch.cat([y for _, y in rows]).tolist() == labels[:600].tolist()


def test_the_penalty_is_chosen_on_a_subset_and_all_samples_are_fitted(staged_toy_features, monkeypatch):
    train, features, labels = staged_toy_features
    moments = compute_moments(features[:600], labels[:600], 5)
    by_all = train_classifier(train, moments, CPU)
    monkeypatch.setattr(module, "MAX_SELECTION_ROWS", 300)
    monkeypatch.setattr(module, "MIN_SELECTION_ROWS_PER_CLASS", 10)
    by_half = train_classifier(train, moments, CPU)
    assert by_half.converged
    # The penalty is one of the path's, times the share that chose it: the prior stays the same.
    choices = np.array(module.L2_PATH) * 300 / 540
    assert np.isclose(by_half.l2, choices, rtol=0.1).any()
    held = [(features[600:], labels[600:])]
    assert measure_top1_and_top5(held, by_half)[0] >= measure_top1_and_top5(held, by_all)[0] - 0.02


def test_views_equal_to_their_images_do_not_change_the_classifier(staged_toy_features):
    """Least of all the penalty: images that validate are not seen by the fits in their views either."""
    train, features, labels = staged_toy_features
    moments = compute_moments(features[:600], labels[:600], 5)
    alone, twice = train_classifier(train, moments, CPU), train_classifier(train, moments, CPU, [train])
    assert twice.l2 == alone.l2
    np.testing.assert_allclose(
        twice.weight * features.std(axis=0), alone.weight * features.std(axis=0), atol=2e-3
    )


def test_a_fit_at_the_iteration_limit_is_reported_as_not_converged(staged_toy_features, monkeypatch):
    train, features, labels = staged_toy_features
    monkeypatch.setattr(logistic, "MAX_LBFGS_ITERATIONS", 3)
    assert not train_classifier(train, compute_moments(features[:600], labels[:600], 5), CPU).converged


def test_held_out_accuracy_matches_scikit_learn_at_its_best_penalty(fashion_store):
    """On real features: within 3 points on 400 images, where one image is a quarter of a point."""
    from sfm.stats_store.entry_selection import select_only_summary
    from sfm.stats_store.store import open_store

    store = open_store(fashion_store)
    entry = store.open_entry(
        select_only_summary(store.list_summaries(), dataset="fashion-mnist-6k", backbone_spec="lite0")
    )
    tuning = store.open_entry(
        select_only_summary(store.list_summaries(), dataset="fashion-mnist-6k@tuning", backbone_spec="lite0")
    )
    features, labels = entry.read_array("test/feature").astype(np.float64), entry.read_array("test/label")
    rows, targets = tuning.read_array("test/feature").astype(np.float64), tuning.read_array("test/label")
    mean, std = rows.mean(axis=0), rows.std(axis=0) + 1e-6
    best = max(
        LogisticRegression(C=c, max_iter=2000)
        .fit((rows - mean) / std, targets)
        .score((features - mean) / std, labels)
        for c in (1e-4, 1e-3, 1e-2, 1e-1)
    )
    # Ours was trained on three times as many images: it must not be worse than theirs.
    assert entry.classifier.converged
    assert entry.classifier.held_out_top1 >= best - 0.03


def test_top1_and_top5_accuracy_match_their_definition():
    rng = np.random.default_rng(1)
    features, labels = (
        rng.standard_normal((50, 8)).astype(np.float32),
        rng.integers(0, 8, 50).astype(np.int32),
    )

    class Identity:
        weight, bias = np.eye(8, dtype=np.float32), np.zeros(8, dtype=np.float32)

    order = np.argsort(-features, axis=1)
    top1 = np.mean(order[:, 0] == labels)
    top5 = np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)])
    assert measure_top1_and_top5(
        [(features[:20], labels[:20]), (features[20:], labels[20:])], Identity()
    ) == (
        top1,
        top5,
    )


def test_folds_divide_every_class_but_never_hold_out_its_only_sample():
    labels = np.array([0] * 25 + [1] * 3 + [2] + [0] * 5, dtype=np.int32)
    folds = [make_fold_mask(labels, fold, 10) for fold in range(10)]
    assert np.sum(folds, axis=0).tolist() == [1] * 28 + [0] + [1] * 5
    assert [int((fold & (labels == 1)).sum()) for fold in folds] == [1] * 3 + [0] * 7
    assert np.flatnonzero(folds[0]).tolist() == [9, 19, 27, 33]


@pytest.mark.parametrize(
    ("per_class", "folds", "validating"), [(1, 0, 0), (2, 2, 10), (8, 5, 25), (30, 5, 75), (3000, 1, 1500)]
)
def test_few_samples_are_validated_in_several_folds_and_many_in_one(per_class, folds, validating):
    labels = np.arange(5 * per_class, dtype=np.int32) % 5
    found = make_validation_masks(
        labels, module.VALIDATION_FOLDS, module.MIN_VALIDATION_ROWS, module.MAX_FOLDS
    )
    assert (len(found), sum(int(fold.sum()) for fold in found)) == (folds, validating)


def test_penalty_selection_samples_are_balanced_and_evenly_spaced():
    labels = np.array([0] * 8 + [1] * 3 + [2] + [0] * 4, dtype=np.int32)
    marked = make_even_per_class_mask(labels, 4)
    assert np.bincount(labels[marked]).tolist() == [4, 3, 1]
    assert np.flatnonzero(marked & (labels == 0)).tolist() == [2, 5, 12, 15]


def stage_partition(folder, features, labels):
    staging, partition = Staging(folder), StagedPartition("train", 0, np.arange(len(labels)), labels)
    staging.write_array("toy", partition, features)
    return staging.open_features("toy", [partition])


def make_few_informative_features(per_class, seed, classes=5, noise=300):
    """Large features tell the classes apart; small ones are noise, which standardising makes as large."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((classes, 20))
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    told = centres[labels] + rng.standard_normal((len(labels), 20))
    small = 0.05 * rng.standard_normal((len(labels), noise))
    return np.concatenate([told, small], axis=1).astype(np.float32), labels


@pytest.mark.parametrize("per_class", [1, 2, 4, 8])
def test_with_few_samples_the_classifier_is_no_worse_than_the_class_mean(tmp_path, per_class):
    held = [make_few_informative_features(400, seed=99)]
    found, nearest = [], []
    for seed in range(3):
        features, labels = make_few_informative_features(per_class, seed)
        moments = compute_moments(features, labels, 5)
        classifier = train_classifier(stage_partition(tmp_path, features, labels), moments, CPU)
        assert classifier.converged
        assert "one scale for all features" in classifier.solver_description
        # One sample per class: nothing is left to validate on, and nothing is drawn to the class means.
        assert ("towards the nearest class mean" in classifier.solver_description) == (per_class > 1)
        found.append(measure_top1_and_top5(held, classifier)[0])
        mean = moments.mean.astype(np.float32)
        nearest.append(compute_top1_top5_accuracies(held, mean, -np.square(mean).sum(axis=1) / 2)[0])
    assert np.mean(found) >= np.mean(nearest) - 0.02


def test_badly_scaled_features_are_standardised_even_with_few_samples(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(200, dtype=np.int32) % 4
    features = rng.standard_normal((200, 12))
    features[:, :4] += 3 * np.eye(4)[labels]
    features[:, 4:] *= 1e4
    train = stage_partition(tmp_path, features.astype(np.float32), labels)
    classifier = train_classifier(train, compute_moments(features.astype(np.float32), labels, 4), CPU)
    assert "standardised features" in classifier.solver_description
    assert "towards the nearest class mean" not in classifier.solver_description
    assert measure_top1_and_top5(train, classifier)[0] > 0.9


def make_low_rank_features(rng, shape):
    """Few directions, and most features constant, as of a few plain images."""
    rows = np.zeros(shape, dtype=np.float32)
    varying = rng.permutation(shape[1])[: shape[1] // 5]
    rows[:, varying] = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, len(varying)))
    return rows


DEGENERATE = {
    "low rank": make_low_rank_features,
    "constant": lambda rng, shape: np.full(shape, 0.3, dtype=np.float32),
    "zero": lambda rng, shape: np.zeros(shape, dtype=np.float32),
    "one feature varies": lambda rng, shape: np.eye(*shape, dtype=np.float32)[:, [0] * shape[1]] + 1,
    "huge": lambda rng, shape: (1e15 * rng.standard_normal(shape)).astype(np.float32),
    "tiny": lambda rng, shape: (1e-15 * rng.standard_normal(shape)).astype(np.float32),
    "few ones": lambda rng, shape: (rng.random(shape) < 0.02).astype(np.float32),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("per_class", [1, 3, 16])
def test_features_of_any_rank_give_a_classifier_and_centres(tmp_path, kind, per_class):
    labels = np.arange(2 * per_class, dtype=np.int32) % 2
    features = DEGENERATE[kind](np.random.default_rng(1), (len(labels), 256))
    train, moments = stage_partition(tmp_path, features, labels), compute_moments(features, labels, 2)
    classifier = train_classifier(train, moments, CPU)
    assert np.isfinite(classifier.weight).all()
    assert np.isfinite(classifier.bias).all()
    assert 0 <= measure_top1_and_top5(train, classifier)[0] <= 1
    discriminant = fit_linear_discriminant(moments)
    assert np.isfinite(discriminant.weight).all()
    assert np.isfinite(discriminant.bias).all()
    centre, count = compute_sub_class_centres(train, labels, 2, 256, [2], seed=0)[2]
    assert count.sum() == len(labels)
    assert np.isfinite(centre[count > 0]).all()


def test_a_failed_eigendecomposition_does_not_change_the_fit(staged_toy_features, monkeypatch):
    train, features, labels = staged_toy_features
    moments = compute_moments(features[:600], labels[:600], 5)
    spread = compute_feature_scaling(moments)

    def fail(_):
        raise np.linalg.LinAlgError("does not converge")

    monkeypatch.setattr(feature_scaling, "eigendecompose_symmetric", fail)
    plain, zero = compute_feature_scaling(moments), logistic.make_zero_fit(5, 12)
    rows = standardise_rows([train], 600, spread, CPU)
    first, second = (
        fit_logistic(rows, 600, s, 0.1, zero, CPU, gradient_tolerance=1e-4) for s in (spread, plain)
    )
    assert first.converged
    assert second.converged
    torch.testing.assert_close(first.weight, second.weight, atol=1e-3, rtol=0)


def test_a_classifier_with_tied_scores_has_zero_accuracy():
    features, labels = np.zeros((30, 4), np.float32), np.arange(30, dtype=np.int32) % 10
    same = LinearClassifier(np.ones((10, 4), np.float32), np.zeros(10, np.float32), 1.0, 1, True, "toy")
    assert measure_top1_and_top5([(features, labels)], same) == (0.0, 0.0)


def test_accuracy_without_samples_is_none():
    assert measure_top1_and_top5(
        [], LinearClassifier(np.eye(8, dtype=np.float32), np.zeros(8, np.float32), 1.0, 1, True, "toy")
    ) == (None, None)

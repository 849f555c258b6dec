"""The classifier of all real data: converged, and as good as scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sfm.pipeline.classifier import (
    Fit,
    accuracies,
    every_nth,
    fit,
    on_raw_features,
    standardisation,
    train_classifier,
)
from sfm.pipeline.moments import moments_of
from sfm.pipeline.staging import Partition, Staging

CPU = torch.device("cpu")


@pytest.fixture
def toy(tmp_path):
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
        partition = Partition("train", number, np.arange(900)[rows], labels[rows])
        staging.put("toy", partition, features[rows])
        parts.append(partition)
    return staging.staged("toy", parts), features, labels


def test_the_optimum_is_that_of_scikit_learn(toy):
    train, features, labels = toy
    moments = moments_of(features[:600], labels[:600], 5)
    mean, std = standardisation(moments)
    zero = Fit(torch.zeros(5, 12, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), 0, False)
    ours = fit(train, 600, mean, std, 0.01, zero, CPU)
    assert ours.converged
    standardised = (features[:600].astype(np.float64) - mean.numpy()) / std.numpy()
    theirs = LogisticRegression(C=1 / (0.01 * 600), tol=1e-8, max_iter=5000).fit(standardised, labels[:600])
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=2e-3)


def test_a_classifier_of_standardised_features_is_rewritten_for_raw_ones(toy):
    _, features, labels = toy
    mean, std = standardisation(moments_of(features, labels, 5))
    weight, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    raw_weight, raw_bias = on_raw_features(weight, bias, mean, std)
    rows = torch.from_numpy(features).double()
    torch.testing.assert_close(rows @ raw_weight.T + raw_bias, (rows - mean) / std @ weight.T + bias)


def test_a_constant_feature_gets_no_weight(toy):
    train, features, labels = toy
    classifier = train_classifier(train, moments_of(features[:600], labels[:600], 5), CPU)
    assert np.abs(classifier.weight[:, 3]).max() < 1e-6


def test_held_out_accuracy_is_that_of_scikit_learn_at_its_best(fashion_store):
    """On real features: within 3 points on 400 images, where one image is a quarter of a point."""
    from sfm.stats_store.select import only
    from sfm.stats_store.store import open_store

    store = open_store(fashion_store)
    entry = store.open(only(store.summaries(), dataset="fashion-mnist-6k", backbone="lite0"))
    tuning = store.open(only(store.summaries(), dataset="fashion-mnist-6k@tuning", backbone="lite0"))
    features, labels = entry.read("test/feature").astype(np.float64), entry.read("test/label")
    rows, targets = tuning.read("test/feature").astype(np.float64), tuning.read("test/label")
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


def test_accuracies_count_as_the_definition_does():
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
    assert accuracies([(features[:20], labels[:20]), (features[20:], labels[20:])], Identity()) == (
        top1,
        top5,
    )


def test_every_tenth_sample_of_a_class_validates():
    labels = np.array([0] * 25 + [1] * 9 + [0] * 5, dtype=np.int32)
    marked = every_nth(labels, 10)
    assert np.flatnonzero(marked).tolist() == [9, 19, 38]

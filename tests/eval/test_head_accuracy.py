import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from sfm.eval.head_accuracy import (
    LinearHeads,
    compute_accuracy_by_seed,
    compute_summed_confusion_matrix,
    make_nearest_mean_head,
    rank_true_class_from_zero,
)


def make_random_problem(seed: int, classes: int, seeds: int = 2, samples: int = 60, features: int = 7):
    rng = np.random.default_rng(seed)
    heads = LinearHeads(
        torch.from_numpy(rng.normal(size=(seeds, classes, features))),
        torch.from_numpy(rng.normal(size=(seeds, classes))),
    )
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, samples - classes)])
    return heads, torch.from_numpy(rng.normal(size=(samples, features))), torch.from_numpy(labels)


@given(seed=st.integers(0, 1000), classes=st.integers(6, 20))
def test_top1_and_top5_accuracy_match_scikit_learn(seed: int, classes: int) -> None:
    heads, features, labels = make_random_problem(seed, classes)
    found = compute_accuracy_by_seed(heads, features, labels)
    assert found.top5 is not None
    for s in range(2):
        logits = features @ heads.weight[s].T + heads.bias[s]
        assert found.top1[s] == pytest.approx(top_k_accuracy_score(labels, logits, k=1))
        assert found.top5[s] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))


@pytest.mark.parametrize(("classes", "defined"), [(2, False), (4, False), (5, True)])
def test_top5_is_undefined_with_fewer_than_five_classes(classes: int, defined: bool) -> None:
    found = compute_accuracy_by_seed(*make_random_problem(0, classes))
    assert (found.top5 is not None) == defined


def test_tied_logits_count_as_wrong() -> None:
    logits = torch.zeros(3, 10)
    assert rank_true_class_from_zero(logits, torch.tensor([0, 5, 9])).tolist() == [9, 9, 9]


def test_non_finite_heads_raise_an_error() -> None:
    heads, features, labels = make_random_problem(0, 6)
    heads.weight[1, 2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        compute_accuracy_by_seed(heads, features, labels)


def test_accuracy_is_independent_of_the_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_random_problem(3, 6)
    whole = compute_accuracy_by_seed(*problem)
    monkeypatch.setattr("sfm.eval.head_accuracy.MAX_BATCH_SAMPLES", 7)
    assert compute_accuracy_by_seed(*problem) == whole


@given(seed=st.integers(0, 1000), classes=st.integers(2, 12))
def test_the_nearest_class_mean_is_a_linear_classifier(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    means, features = rng.normal(size=(classes, 5)), rng.normal(size=(40, 5))
    head = make_nearest_mean_head(torch.from_numpy(means))
    logits = torch.from_numpy(features) @ head.weight[0].T + head.bias[0]
    distance = np.linalg.norm(features[:, None] - means, axis=2)
    assert (logits.argmax(1).numpy() == distance.argmin(1)).all()


@given(seed=st.integers(0, 1000), classes=st.integers(2, 12))
def test_summed_confusion_matrices_match_scikit_learn(seed: int, classes: int) -> None:
    heads, features, labels = make_random_problem(seed, classes)
    predicted = [(features @ heads.weight[s].T + heads.bias[s]).argmax(1) for s in range(2)]
    expected = sum(confusion_matrix(labels, p, labels=range(classes)) for p in predicted)
    found = compute_summed_confusion_matrix(heads, features, labels)
    assert (found.numpy() == expected).all()
    assert int(found.trace()) == pytest.approx(
        60 * sum(compute_accuracy_by_seed(heads, features, labels).top1)
    )

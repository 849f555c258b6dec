"""One rule for ties: what extraction and merging count is what evaluation counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sfm.eval.head_accuracy import LinearHeads, compute_accuracy_by_seed
from sfm.eval.head_accuracy import rank_true_class_from_zero as ranks_of_tensors
from sfm.stats_store.classifier_accuracy import compute_label_ranks, compute_top1_top5_accuracies

SOME = st.sampled_from([-1.0, 0.0, -0.0, 1.0, 2.5, np.float32(1e30)])
ODD = st.sampled_from([0.0, 1.0, np.nan, np.inf, -np.inf])


@st.composite
def logits_and_labels(draw, elements):
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 7)))
    logits = draw(arrays.arrays(np.float32, shape, elements=elements))
    labels = draw(arrays.arrays(np.int32, shape[0], elements=st.integers(0, shape[1] - 1)))
    return logits, labels


@given(logits_and_labels(SOME))
@settings(max_examples=50)
def test_label_ranks_with_ties_match_evaluation(case):
    logits, labels = case
    expected = ranks_of_tensors(torch.from_numpy(logits), torch.from_numpy(labels).long())
    assert compute_label_ranks(logits, labels).tolist() == expected.tolist()


@given(logits_and_labels(ODD))
@settings(max_examples=50)
def test_non_finite_logits_raise_floating_point_error_as_in_evaluation(case):
    logits, labels = case
    if np.isfinite(logits).all():
        return
    with pytest.raises(FloatingPointError, match="not finite"):
        compute_label_ranks(logits, labels)
    with pytest.raises(FloatingPointError, match="not finite"):
        ranks_of_tensors(torch.from_numpy(logits), torch.from_numpy(labels).long())


@pytest.mark.parametrize("classes", [2, 5, 8])
def test_accuracies_with_ties_match_evaluation(classes):
    rng = np.random.default_rng(classes)
    features = rng.integers(0, 2, (60, 4)).astype(np.float32)
    weight = rng.integers(-1, 2, (classes, 4)).astype(np.float32)
    bias, labels = np.zeros(classes, dtype=np.float32), rng.integers(0, classes, 60)
    heads = LinearHeads(torch.from_numpy(weight)[None], torch.from_numpy(bias)[None])
    told = compute_accuracy_by_seed(heads, torch.from_numpy(features), torch.from_numpy(labels))
    blocks = [(features[:20], labels[:20]), (features[20:], labels[20:])]
    assert compute_top1_top5_accuracies(blocks, weight, bias) == (
        told.top1[0],
        told.top5[0] if told.top5 else None,
    )

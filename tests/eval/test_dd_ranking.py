"""The label-robust score of DD-Ranking."""

import numpy as np
import pytest

from sfm.eval.dd_ranking import compute_label_robust_score


def test_the_score_is_the_published_formula() -> None:
    full, distilled, random = np.random.default_rng(0).uniform(size=3)
    alpha = 0.5 * (distilled - random) - 0.5 * (full - distilled)
    expected = (np.exp(alpha) - np.exp(-1)) / (np.exp(1) - np.exp(-1))
    assert compute_label_robust_score(distilled, random, full) == pytest.approx(expected)


def test_the_score_is_one_at_best_and_zero_at_worst() -> None:
    assert compute_label_robust_score(1, 0, 0) == pytest.approx(1)
    assert compute_label_robust_score(0, 1, 1) == pytest.approx(0)

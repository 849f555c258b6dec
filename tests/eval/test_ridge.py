import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor

from sfm.eval import ridge
from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.ridge import (
    PENALTIES,
    compute_compact_svd,
    compute_left_out_groups_squared_error,
    fit_ridge_projector,
)


def make_problem(
    groups: int, samples: int, features: int, seed: int = 0
) -> tuple[Tensor, Tensor, LinearHeads]:
    """Two backbones' features of the same samples, linearly related but for noise, and a classifier."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Samples of a group lie together, as the views of an image do.
    x = normal(groups, 1, features) + 0.3 * normal(groups, samples, features) + 2
    y = x @ normal(features, 5) + 0.5 * normal(groups, samples, 5) - 1
    return x, y, LinearHeads(normal(1, 3, 5), normal(1, 3))


def fit_sklearn_ridge(x: Tensor, y: Tensor, penalty: float) -> SklearnRidge:
    return SklearnRidge(alpha=penalty).fit(x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy())


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(4, 3, 6), (3, 2, 20), (8, 1, 5)]),
    penalty=st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_left_out_group_error_matches_a_refit_without_the_group(
    seed: int, shape: tuple[int, int, int], penalty: float
) -> None:
    x, y, _ = make_problem(*shape, seed=seed)
    flat, wanted = x.flatten(0, 1), y - y.flatten(0, 1).mean(0)
    left, spectrum, _ = compute_compact_svd(flat - flat.mean(0))
    expected = 0.0
    for g in range(shape[0]):
        others = [i for i in range(shape[0]) if i != g]
        without = fit_sklearn_ridge(x[others], y[others], penalty)
        expected += float(((without.predict(x[g].numpy()) - y[g].numpy()) ** 2).sum())
    assert compute_left_out_groups_squared_error(
        left, spectrum / (spectrum + penalty), wanted
    ) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 4, 5), (5, 2, 30)])
def test_ridge_projector_matches_scikit_learn_at_the_chosen_penalty(
    shape: tuple[int, int, int],
) -> None:
    x, y, classifier = make_problem(*shape)
    found = fit_ridge_projector(x, y, classifier)
    flat = x.flatten(0, 1)
    scale = float((flat - flat.mean(0)).square().sum()) / shape[2]
    plain = fit_sklearn_ridge(x, y, found.relative_penalty * scale)
    torch.testing.assert_close(found.projector.weight[0], torch.from_numpy(plain.coef_))
    torch.testing.assert_close(found.projector.bias[0], torch.from_numpy(plain.intercept_))


def test_the_chosen_penalty_minimises_the_left_out_logit_error() -> None:
    x, y, classifier = make_problem(6, 4, 40)
    flat = x.flatten(0, 1)
    scale = float((flat - flat.mean(0)).square().sum()) / 40
    errors = {}
    for penalty in PENALTIES:
        errors[penalty] = 0.0
        for g in range(6):
            others = [i for i in range(6) if i != g]
            without = fit_sklearn_ridge(x[others], y[others], penalty * scale)
            off = torch.from_numpy(without.predict(x[g].numpy())) - y[g]
            errors[penalty] += float((off @ classifier.weight[0].T).square().sum())
    assert fit_ridge_projector(x, y, classifier).relative_penalty == min(
        errors, key=lambda penalty: errors[penalty]
    )


def test_unrelated_targets_are_given_a_large_penalty() -> None:
    x, y, classifier = make_problem(8, 5, 60)
    related = fit_ridge_projector(x, y, classifier)
    unrelated = fit_ridge_projector(
        x, torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(1)), classifier
    )
    assert unrelated.relative_penalty > related.relative_penalty
    assert unrelated.relative_penalty >= 10


def test_rank_deficient_features_do_not_break_the_ridge_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, classifier = make_problem(5, 4, 6)
    doubled = torch.cat([x, x], dim=2)
    monkeypatch.setattr(ridge, "PENALTIES", (1e-12,))
    once, twice = fit_ridge_projector(x, y, classifier), fit_ridge_projector(doubled, y, classifier)
    projected = [f @ r.projector.weight[0].T + r.projector.bias[0] for f, r in ((x, once), (doubled, twice))]
    torch.testing.assert_close(projected[0], projected[1], rtol=1e-6, atol=1e-6)

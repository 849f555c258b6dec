import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sfm.distill.flow import compute_flow, compute_other_class_means, decoupled_loss, sfm_loss

SIZES = st.integers(2, 6)
VALUES = st.floats(-10, 10, width=32)


@st.composite
def draw_view_features(draw: st.DrawFn) -> np.ndarray:
    """Features of shape (C, K, A, D)."""
    shape = (
        draw(st.integers(2, 5)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6)),
    )
    return draw(arrays(np.float64, shape, elements=VALUES))


def compute_flow_in_loops(own: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Section 5 of the design, one class, one centre and one coordinate at a time."""
    result = np.zeros_like(own)
    for c, k, d in np.ndindex(own.shape):
        total = 0.0
        for j in range(len(means)):
            if j != c:
                total += means[j, d]
        result[c, k, d] = total / (len(means) - 1) - own[c, k, d]
    return result


def compute_centres_and_means(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = np.array([[views.sum(0) / len(views) for views in images] for images in features])
    return own, np.array([images.sum(0) / len(images) for images in own])


@given(draw_view_features())
def test_flow_is_the_mean_of_the_other_classes_minus_the_own_centre(features: np.ndarray) -> None:
    own, means = compute_centres_and_means(features)
    got = compute_flow(torch.from_numpy(own), torch.from_numpy(means)).numpy()
    np.testing.assert_allclose(got, compute_flow_in_loops(own, means), atol=1e-9)


@given(arrays(np.float64, st.tuples(SIZES, SIZES), elements=VALUES))
def test_class_means_and_one_centre_per_class_give_the_same_flow(means: np.ndarray) -> None:
    tensor = torch.from_numpy(means)
    torch.testing.assert_close(compute_flow(tensor, tensor), compute_flow(tensor[:, None], tensor)[:, 0])


@given(arrays(np.float64, st.tuples(SIZES, SIZES), elements=VALUES))
def test_the_flows_of_all_classes_sum_to_zero(means: np.ndarray) -> None:
    tensor = torch.from_numpy(means)
    assert compute_flow(tensor, tensor).sum(0).abs().max() < 1e-9


def test_other_classes_are_weighted_equally_regardless_of_images_per_class() -> None:
    one = torch.randn(4, 1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ten = one.expand(4, 10, 1, 5)
    target = compute_flow(one[:, 0, 0], one[:, 0, 0])
    assert sfm_loss(ten, target[:, None].expand(4, 10, 5)) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(
        compute_other_class_means(ten.mean((1, 2))), compute_other_class_means(one[:, 0, 0])
    )
    assert decoupled_loss(ten, ten[:, :, 0], one[:, 0, 0], own_centres_weight=0.5) == pytest.approx(
        0.0, abs=1e-12
    )


def seeded_randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def compute_reference_flow(features: torch.Tensor) -> torch.Tensor:
    own, means = compute_centres_and_means(features.numpy())
    return torch.from_numpy(compute_flow_in_loops(own, means))


@given(scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_the_loss_is_zero_for_equal_flows_at_any_scale_and_shift(scale: float, shift: float) -> None:
    features = seeded_randn(3, 2, 2, 7)
    assert sfm_loss(scale * features + shift, compute_reference_flow(features)) == pytest.approx(
        0.0, abs=1e-9
    )


@given(scale=st.floats(0.01, 100))
def test_the_loss_is_two_for_opposite_flows(scale: float) -> None:
    features = seeded_randn(3, 2, 2, 7)
    assert sfm_loss(-scale * features, compute_reference_flow(features)) == pytest.approx(2.0, abs=1e-9)


def test_the_loss_is_one_minus_the_cosine_of_the_flattened_flows() -> None:
    features, target = seeded_randn(3, 2, 1, 4), seeded_randn(3, 2, 4)
    ours = compute_reference_flow(features).numpy().ravel()
    theirs = target.numpy().ravel()
    expected = 1 - ours @ theirs / np.sqrt((ours @ ours) * (theirs @ theirs))
    assert sfm_loss(features, target).item() == pytest.approx(expected)


def test_views_are_averaged_before_flows_are_compared() -> None:
    features, target = seeded_randn(3, 2, 4, 5), seeded_randn(3, 2, 5)
    averaged = features.mean(2, keepdim=True)
    torch.testing.assert_close(sfm_loss(features, target), sfm_loss(averaged, target))


def test_images_of_one_class_are_matched_to_their_own_centres() -> None:
    means = seeded_randn(3, 5)
    centres = means[:, None] + torch.stack([seeded_randn(3, 5), -seeded_randn(3, 5)], dim=1)
    target = compute_flow(centres, means)
    assert sfm_loss(centres[:, :, None], target) == pytest.approx(0.0, abs=1e-12)
    assert sfm_loss(centres.flip(1)[:, :, None], target) > 0.01


@given(features=draw_view_features(), alpha=st.floats(0, 1))
def test_the_decoupled_loss_is_a_weighted_sum_of_two_mean_squared_errors(
    features: np.ndarray, alpha: float
) -> None:
    real_own, real_means = (
        seeded_randn(*features.shape[:2], features.shape[3]).numpy(),
        seeded_randn(features.shape[0], features.shape[3]).numpy(),
    )
    own, means = compute_centres_and_means(features)
    zero = np.zeros_like(means)[:, None]
    apart = compute_flow_in_loops(zero, means) - compute_flow_in_loops(zero, real_means)
    expected = alpha * ((own - real_own) ** 2).mean() + (1 - alpha) * (apart**2).mean()
    got = decoupled_loss(
        torch.from_numpy(features), torch.from_numpy(real_own), torch.from_numpy(real_means), alpha
    )
    assert got.item() == pytest.approx(expected, rel=1e-9)

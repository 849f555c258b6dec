import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sfm.eval.config import ProjectorInit
from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.projectors import (
    LinearProjectors,
    compose_projectors_with_classifier,
    compute_projector_gradients,
    init_projectors,
    train_projectors,
)
from sfm.eval.training import BatchSchedule, make_batch_schedule

FEATURES, TARGETS, VIEWS, EPOCHS, SEEDS = 9, 7, 6, 25, 3


def make_problem(images: int) -> tuple[Tensor, Tensor, BatchSchedule]:
    generator = torch.Generator().manual_seed(images)
    view_features = torch.randn(images, VIEWS, FEATURES, generator=generator, dtype=torch.float64)
    target_features = torch.randn(images, VIEWS, TARGETS, generator=generator, dtype=torch.float64)
    return (
        view_features,
        target_features,
        make_batch_schedule(
            3, np.tile(np.arange(images), (SEEDS, 1)), epoch_count=EPOCHS, views_per_image=VIEWS
        ),
    )


def train_plain_projector(
    view_features: Tensor, target_features: Tensor, schedule: BatchSchedule, start: LinearProjectors, s: int
) -> nn.Linear:
    projector = nn.Linear(FEATURES, TARGETS).double()
    with torch.no_grad():
        projector.weight.copy_(start.weight[s])
        projector.bias.copy_(start.bias[s])
    batch = min(100, len(view_features))
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-2 * batch / 256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        for first in range(0, len(view_features), batch):
            images = schedule.image_indices[s, epoch, first : first + batch].long()
            views = schedule.view_indices[s, epoch, first : first + batch].long()
            optimizer.zero_grad()
            mse_loss(projector(view_features[images, views]), target_features[images, views]).backward()
            optimizer.step()
        scheduler.step()
    return projector


def make_zero_start(seeds: int = SEEDS, targets: int = TARGETS, features: int = FEATURES) -> LinearProjectors:
    return init_projectors("zero", 0, seeds, targets, features)


def test_a_zero_start_is_zero() -> None:
    start = make_zero_start()
    assert (start.weight.shape, start.bias.shape) == ((SEEDS, TARGETS, FEATURES), (SEEDS, TARGETS))
    assert not start.weight.any()
    assert not start.bias.any()


def test_the_default_start_has_the_distribution_of_a_torch_linear_layer() -> None:
    start = init_projectors("default", 0, 2, 400, 100)
    torch.manual_seed(0)
    layers = [nn.Linear(100, 400) for _ in range(2)]
    for found, drawn in (
        (start.weight, torch.stack([layer.weight.data for layer in layers])),
        (start.bias, torch.stack([layer.bias.data for layer in layers])),
    ):
        assert found.shape == drawn.shape
        assert found.dtype == drawn.dtype
        # Two samples of one distribution: their largest distance between empirical distribution functions.
        assert ks_2samp(found.flatten().numpy(), drawn.flatten().numpy()).pvalue > 0.01
        assert found.abs().max() <= 0.1


def test_the_default_start_of_a_seed_does_not_depend_on_the_number_of_seeds() -> None:
    few, many = (init_projectors("default", 7, seeds, TARGETS, FEATURES) for seeds in (1, 3))
    assert torch.equal(few.weight[0], many.weight[0])
    assert torch.equal(few.bias[0], many.bias[0])
    assert not torch.equal(many.weight[0], many.weight[1])
    assert not torch.equal(init_projectors("default", 8, 1, TARGETS, FEATURES).weight, few.weight)


@pytest.mark.parametrize(("images", "projector_init"), [(8, "zero"), (130, "zero"), (8, "default")])
def test_batched_projector_training_matches_one_torch_layer_per_seed(
    images: int, projector_init: ProjectorInit
) -> None:
    view_features, target_features, schedule = make_problem(images)
    start = init_projectors(projector_init, 0, SEEDS, TARGETS, FEATURES)
    projectors = train_projectors(view_features, target_features, schedule, start)
    for s in range(SEEDS):
        plain = train_plain_projector(view_features, target_features, schedule, start, s)
        torch.testing.assert_close(projectors.weight[s], plain.weight.data, rtol=0, atol=1e-8)
        torch.testing.assert_close(projectors.bias[s], plain.bias.data, rtol=0, atol=1e-8)


def test_blockwise_projector_training_matches_training_all_targets_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view_features, target_features, schedule = make_problem(8)
    start = init_projectors("default", 0, SEEDS, TARGETS, FEATURES)
    whole = train_projectors(view_features, target_features, schedule, start)
    monkeypatch.setattr("sfm.eval.projectors.MAX_BLOCK_WEIGHTS", 2 * SEEDS * FEATURES)
    calls: list[tuple[int, int]] = []
    parts = train_projectors(
        view_features, target_features, schedule, start, lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=0, atol=1e-12)


def test_projector_gradients_match_autograd() -> None:
    view_features, target_features, _ = make_problem(8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SEEDS, TARGETS, FEATURES, generator=generator).double().requires_grad_()
    bias = torch.randn(SEEDS, TARGETS, generator=generator).double().requires_grad_()
    x, y = view_features[:, :SEEDS].transpose(0, 1), target_features[:, :SEEDS].transpose(0, 1)
    loss = sum(mse_loss(x[s] @ weight[s].T + bias[s], y[s]) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (weight, bias))
    torch.testing.assert_close(
        compute_projector_gradients(weight.detach(), bias.detach(), x, y, TARGETS), expected
    )


def test_projector_training_recovers_a_linear_relation() -> None:
    generator = torch.Generator().manual_seed(0)
    view_features = torch.randn(10, 50, 12, generator=generator)
    relation = torch.randn(5, 12, generator=generator) / 60
    schedule = make_batch_schedule(0, np.tile(np.arange(10), (2, 1)), epoch_count=2000, views_per_image=50)
    projectors = train_projectors(
        view_features, view_features @ relation.T + 0.02, schedule, make_zero_start(2, 5, 12)
    )
    torch.testing.assert_close(projectors.weight, relation.expand(2, -1, -1), rtol=0, atol=1e-3)
    torch.testing.assert_close(projectors.bias, torch.full((2, 5), 0.02), rtol=0, atol=1e-3)


def test_composed_heads_equal_projecting_then_classifying() -> None:
    generator = torch.Generator().manual_seed(0)
    projectors = LinearProjectors(torch.randn(SEEDS, 5, 12, generator=generator), torch.randn(SEEDS, 5))
    classifier = LinearHeads(
        torch.randn(1, 3, 5, generator=generator), torch.randn(1, 3, generator=generator)
    )
    features = torch.randn(20, 12, generator=generator)
    heads = compose_projectors_with_classifier(projectors, classifier)
    for s in range(SEEDS):
        projected = features @ projectors.weight[s].T + projectors.bias[s]
        expected = projected @ classifier.weight[0].T + classifier.bias[0]
        torch.testing.assert_close(
            features @ heads.weight[s].T + heads.bias[s], expected, rtol=1e-4, atol=1e-4
        )

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.projectors import (
    LinearProjectors,
    compose_projectors_with_classifier,
    compute_projector_gradients,
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
    view_features: Tensor, target_features: Tensor, schedule: BatchSchedule, s: int
) -> nn.Linear:
    projector = nn.Linear(FEATURES, TARGETS).double()
    nn.init.zeros_(projector.weight)
    nn.init.zeros_(projector.bias)
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


@pytest.mark.parametrize("images", [8, 130])
def test_batched_projector_training_matches_one_torch_layer_per_seed(images: int) -> None:
    view_features, target_features, schedule = make_problem(images)
    projectors = train_projectors(view_features, target_features, schedule)
    for s in range(SEEDS):
        plain = train_plain_projector(view_features, target_features, schedule, s)
        torch.testing.assert_close(projectors.weight[s], plain.weight.data, rtol=0, atol=1e-8)
        torch.testing.assert_close(projectors.bias[s], plain.bias.data, rtol=0, atol=1e-8)


def test_blockwise_projector_training_matches_training_all_targets_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view_features, target_features, schedule = make_problem(8)
    whole = train_projectors(view_features, target_features, schedule)
    monkeypatch.setattr("sfm.eval.projectors.MAX_BLOCK_WEIGHTS", 2 * SEEDS * FEATURES)
    calls: list[tuple[int, int]] = []
    parts = train_projectors(
        view_features, target_features, schedule, lambda done, total: calls.append((done, total))
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
    projectors = train_projectors(view_features, view_features @ relation.T + 0.02, schedule)
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

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sfm.eval import inherit
from sfm.eval.accuracy import Heads
from sfm.eval.inherit import Projectors, inherited_heads, projector_gradients, train_projectors
from sfm.eval.training import Plan, lay_out

FEATURES, TARGETS, VIEWS, EPOCHS, SEEDS = 9, 7, 6, 25, 3


def problem(images: int) -> tuple[Tensor, Tensor, Plan]:
    generator = torch.Generator().manual_seed(images)
    pool = torch.randn(images, VIEWS, FEATURES, generator=generator, dtype=torch.float64)
    targets = torch.randn(images, VIEWS, TARGETS, generator=generator, dtype=torch.float64)
    return pool, targets, lay_out(3, np.tile(np.arange(images), (SEEDS, 1)), epochs=EPOCHS, views=VIEWS)


def as_written_in_a_text_book(pool: Tensor, targets: Tensor, plan: Plan, s: int) -> nn.Linear:
    projector = nn.Linear(FEATURES, TARGETS).double()
    nn.init.zeros_(projector.weight)
    nn.init.zeros_(projector.bias)
    batch = min(100, len(pool))
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-2 * batch / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        for first in range(0, len(pool), batch):
            images = plan.image[s, epoch, first : first + batch].long()
            views = plan.view[s, epoch, first : first + batch].long()
            optimizer.zero_grad()
            mse_loss(projector(pool[images, views]), targets[images, views]).backward()
            optimizer.step()
        schedule.step()
    return projector


@pytest.mark.parametrize("images", [8, 130])
def test_all_seeds_at_once_train_as_one_plain_linear_layer_after_another(images: int) -> None:
    pool, targets, plan = problem(images)
    projectors = train_projectors(pool, targets, plan)
    for s in range(SEEDS):
        plain = as_written_in_a_text_book(pool, targets, plan, s)
        torch.testing.assert_close(projectors.weight[s], plain.weight.data, rtol=0, atol=1e-8)
        torch.testing.assert_close(projectors.bias[s], plain.bias.data, rtol=0, atol=1e-8)


def test_target_features_trained_block_after_block_are_those_trained_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, targets, plan = problem(8)
    whole = train_projectors(pool, targets, plan)
    monkeypatch.setattr(inherit, "BLOCK_WEIGHTS", 2 * SEEDS * FEATURES)
    told: list[tuple[int, int]] = []
    parts = train_projectors(pool, targets, plan, lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_mean_squared_error() -> None:
    pool, targets, _ = problem(8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SEEDS, TARGETS, FEATURES, generator=generator).double().requires_grad_()
    bias = torch.randn(SEEDS, TARGETS, generator=generator).double().requires_grad_()
    x, y = pool[:, :SEEDS].transpose(0, 1), targets[:, :SEEDS].transpose(0, 1)
    loss = sum(mse_loss(x[s] @ weight[s].T + bias[s], y[s]) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (weight, bias))
    torch.testing.assert_close(projector_gradients(weight.detach(), bias.detach(), x, y, TARGETS), expected)


def test_a_linear_relation_between_backbones_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(10, 50, 12, generator=generator)
    relation = torch.randn(5, 12, generator=generator) / 60
    plan = lay_out(0, np.tile(np.arange(10), (2, 1)), epochs=2000, views=50)
    projectors = train_projectors(pool, pool @ relation.T + 0.02, plan)
    torch.testing.assert_close(projectors.weight, relation.expand(2, -1, -1), rtol=0, atol=1e-3)
    torch.testing.assert_close(projectors.bias, torch.full((2, 5), 0.02), rtol=0, atol=1e-3)


def test_inheriting_is_projecting_then_classifying() -> None:
    generator = torch.Generator().manual_seed(0)
    projectors = Projectors(torch.randn(SEEDS, 5, 12, generator=generator), torch.randn(SEEDS, 5))
    classifier = Heads(torch.randn(1, 3, 5, generator=generator), torch.randn(1, 3, generator=generator))
    features = torch.randn(20, 12, generator=generator)
    heads = inherited_heads(projectors, classifier)
    for s in range(SEEDS):
        projected = features @ projectors.weight[s].T + projectors.bias[s]
        expected = projected @ classifier.weight[0].T + classifier.bias[0]
        torch.testing.assert_close(
            features @ heads.weight[s].T + heads.bias[s], expected, rtol=1e-4, atol=1e-4
        )

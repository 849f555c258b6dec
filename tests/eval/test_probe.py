import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfm.eval.accuracy import Heads, accuracy
from sfm.eval.probe import head_gradients, train_heads
from sfm.eval.training import Plan, Purpose, lay_out, normal

CLASSES, FEATURES, VIEWS, EPOCHS, SEEDS = 4, 9, 6, 25, 3


def problem(images: int) -> tuple[Tensor, Tensor, Plan, Tensor]:
    """A pool of random features, labels, a plan and a start; float64, so that only algebra can differ."""
    generator = torch.Generator().manual_seed(images)
    pool = torch.randn(images, VIEWS, FEATURES, generator=generator, dtype=torch.float64)
    plan = lay_out(3, np.tile(np.arange(images), (SEEDS, 1)), epochs=EPOCHS, views=VIEWS)
    start = normal(3, Purpose.HEAD, (SEEDS, CLASSES, FEATURES), 0.01)
    return pool, torch.arange(images) % CLASSES, plan, start


def as_written_in_a_text_book(pool: Tensor, labels: Tensor, plan: Plan, start: Tensor, s: int) -> nn.Linear:
    """The protocol of one seed, with torch's own layer, loss, optimizer and schedule."""
    head = nn.Linear(FEATURES, CLASSES).double()
    with torch.no_grad():
        head.weight.copy_(start[s])
        head.bias.zero_()
    batch = min(100, len(pool))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3 * batch / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        for first in range(0, len(pool), batch):
            images = plan.image[s, epoch, first : first + batch].long()
            views = plan.view[s, epoch, first : first + batch].long()
            optimizer.zero_grad()
            cross_entropy(head(pool[images, views]), labels[images]).backward()
            optimizer.step()
        schedule.step()
    return head


@pytest.mark.parametrize("images", [8, 130])
def test_all_seeds_at_once_train_as_one_plain_linear_layer_after_another(images: int) -> None:
    pool, labels, plan, start = problem(images)
    heads = train_heads(pool, labels, plan, start)
    for s in range(SEEDS):
        plain = as_written_in_a_text_book(pool, labels, plan, start, s)
        torch.testing.assert_close(heads.weight[s], plain.weight.data, rtol=0, atol=1e-9)
        torch.testing.assert_close(heads.bias[s], plain.bias.data, rtol=0, atol=1e-9)


def test_the_gradient_is_that_of_the_mean_cross_entropy() -> None:
    pool, labels, _, start = problem(8)
    weight, bias = start.double().requires_grad_(), torch.randn(SEEDS, CLASSES).double().requires_grad_()
    features = torch.stack([pool[:, s] for s in range(SEEDS)])
    loss = sum(cross_entropy(features[s] @ weight[s].T + bias[s], labels) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (weight, bias))
    given = head_gradients(Heads(weight.detach(), bias.detach()), features, labels.expand(SEEDS, -1))
    torch.testing.assert_close(given, expected)


def test_classes_that_can_be_separated_are_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 400, generator=generator)
    pool = centres[:, None] + 0.5 * torch.randn(10, 20, 400, generator=generator)
    plan = lay_out(0, np.tile(np.arange(10), (2, 1)), epochs=1000, views=20)
    heads = train_heads(pool, torch.arange(10), plan, normal(0, Purpose.HEAD, (2, 10, 400), 0.01))
    held_out = centres.repeat(30, 1) + 0.5 * torch.randn(300, 400, generator=generator)
    assert accuracy(heads, held_out, torch.arange(10).repeat(30)).top1 == [1.0, 1.0]


def test_training_leaves_pool_and_start_as_they_were() -> None:
    pool, labels, plan, start = problem(8)
    before = pool.clone(), start.clone()
    train_heads(pool.float(), labels, plan, start)
    train_heads(pool, labels, plan, start)
    assert torch.equal(before[0], pool)
    assert torch.equal(before[1], start)


def test_training_tells_every_epoch_and_gives_torch_its_threads_back() -> None:
    pool, labels, plan, start = problem(8)
    threads, told = torch.get_num_threads(), []
    train_heads(pool, labels, plan, start, lambda done, total: told.append((done, total)))
    assert told == [(epoch, EPOCHS) for epoch in range(1, EPOCHS + 1)]
    assert torch.get_num_threads() == threads

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfm.eval.head_accuracy import LinearHeads, compute_accuracy_by_seed
from sfm.eval.linear_probe import compute_head_gradients, train_linear_heads
from sfm.eval.training import (
    BatchSchedule,
    RandomStreamPurpose,
    draw_initial_weights_by_seed,
    make_batch_schedule,
)

CLASSES, FEATURES, VIEWS, EPOCHS, SEEDS = 4, 9, 6, 25, 3


def make_problem(images: int) -> tuple[Tensor, Tensor, BatchSchedule, Tensor]:
    """A pool of random features, labels, a plan and a start; float64, so that only algebra can differ."""
    generator = torch.Generator().manual_seed(images)
    view_features = torch.randn(images, VIEWS, FEATURES, generator=generator, dtype=torch.float64)
    schedule = make_batch_schedule(
        3, np.tile(np.arange(images), (SEEDS, 1)), epoch_count=EPOCHS, views_per_image=VIEWS
    )
    start = draw_initial_weights_by_seed(3, RandomStreamPurpose.HEAD, (SEEDS, CLASSES, FEATURES), 0.01)
    return view_features, torch.arange(images) % CLASSES, schedule, start


def train_plain_head(
    view_features: Tensor, labels: Tensor, schedule: BatchSchedule, start: Tensor, s: int
) -> nn.Linear:
    """The protocol of one seed, with torch's own layer, loss, optimizer and schedule."""
    head = nn.Linear(FEATURES, CLASSES).double()
    with torch.no_grad():
        head.weight.copy_(start[s])
        head.bias.zero_()
    batch = min(100, len(view_features))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3 * batch / 256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        for first in range(0, len(view_features), batch):
            images = schedule.image_indices[s, epoch, first : first + batch].long()
            views = schedule.view_indices[s, epoch, first : first + batch].long()
            optimizer.zero_grad()
            cross_entropy(head(view_features[images, views]), labels[images]).backward()
            optimizer.step()
        scheduler.step()
    return head


@pytest.mark.parametrize("images", [8, 130])
def test_batched_probe_training_matches_one_torch_layer_per_seed(images: int) -> None:
    view_features, labels, schedule, start = make_problem(images)
    heads = train_linear_heads(view_features, labels, schedule, start)
    for s in range(SEEDS):
        plain = train_plain_head(view_features, labels, schedule, start, s)
        torch.testing.assert_close(heads.weight[s], plain.weight.data, rtol=0, atol=1e-9)
        torch.testing.assert_close(heads.bias[s], plain.bias.data, rtol=0, atol=1e-9)


def test_linear_probe_gradients_match_autograd() -> None:
    view_features, labels, _, start = make_problem(8)
    weight, bias = start.double().requires_grad_(), torch.randn(SEEDS, CLASSES).double().requires_grad_()
    features = torch.stack([view_features[:, s] for s in range(SEEDS)])
    loss = sum(cross_entropy(features[s] @ weight[s].T + bias[s], labels) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (weight, bias))
    given = compute_head_gradients(
        LinearHeads(weight.detach(), bias.detach()), features, labels.expand(SEEDS, -1)
    )
    torch.testing.assert_close(given, expected)


def test_separable_classes_are_classified_without_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 400, generator=generator)
    view_features = centres[:, None] + 0.5 * torch.randn(10, 20, 400, generator=generator)
    schedule = make_batch_schedule(0, np.tile(np.arange(10), (2, 1)), epoch_count=1000, views_per_image=20)
    heads = train_linear_heads(
        view_features,
        torch.arange(10),
        schedule,
        draw_initial_weights_by_seed(0, RandomStreamPurpose.HEAD, (2, 10, 400), 0.01),
    )
    held_out = centres.repeat(30, 1) + 0.5 * torch.randn(300, 400, generator=generator)
    assert compute_accuracy_by_seed(heads, held_out, torch.arange(10).repeat(30)).top1 == [1.0, 1.0]


def test_probe_training_does_not_modify_its_inputs() -> None:
    view_features, labels, schedule, start = make_problem(8)
    before = view_features.clone(), start.clone()
    train_linear_heads(view_features.float(), labels, schedule, start)
    train_linear_heads(view_features, labels, schedule, start)
    assert torch.equal(before[0], view_features)
    assert torch.equal(before[1], start)


def test_probe_training_reports_every_epoch_and_restores_the_thread_count() -> None:
    view_features, labels, schedule, start = make_problem(8)
    threads, calls = torch.get_num_threads(), []
    train_linear_heads(
        view_features, labels, schedule, start, lambda done, total: calls.append((done, total))
    )
    assert calls == [(epoch, EPOCHS) for epoch in range(1, EPOCHS + 1)]
    assert torch.get_num_threads() == threads

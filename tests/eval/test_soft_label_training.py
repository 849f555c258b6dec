import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.linear_probe import train_linear_heads
from sfm.eval.soft_label_training import compute_soft_target_gradients, train_heads_on_soft_labels
from sfm.eval.training import (
    BatchSchedule,
    RandomStreamPurpose,
    draw_initial_weights_by_seed,
    make_batch_schedule,
)

CLASSES, FEATURES, VIEWS, EPOCHS, SEEDS = 4, 9, 6, 25, 3


def make_problem(images: int) -> tuple[Tensor, Tensor, BatchSchedule, Tensor]:
    generator = torch.Generator().manual_seed(images)
    features = torch.randn(images, VIEWS, FEATURES, generator=generator, dtype=torch.float64)
    soft = torch.randn(images, CLASSES, generator=generator, dtype=torch.float64).softmax(-1)
    schedule = make_batch_schedule(
        3, np.tile(np.arange(images), (SEEDS, 1)), epoch_count=EPOCHS, views_per_image=VIEWS
    )
    start = draw_initial_weights_by_seed(3, RandomStreamPurpose.HEAD, (SEEDS, CLASSES, FEATURES), 0.01)
    return features, soft, schedule, start


def test_the_gradient_is_that_of_the_cross_entropy_with_soft_labels() -> None:
    view_features, soft, _, start = make_problem(8)
    weight, bias = start.double().requires_grad_(), torch.randn(SEEDS, CLASSES).double().requires_grad_()
    features = view_features[:, :SEEDS].transpose(0, 1)
    loss = sum(cross_entropy(features[s] @ weight[s].T + bias[s], soft) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (weight, bias))
    given = compute_soft_target_gradients(
        LinearHeads(weight.detach(), bias.detach()), features, soft.expand(SEEDS, -1, -1)
    )
    torch.testing.assert_close(given, expected)


def test_all_seeds_at_once_train_as_one_plain_linear_layer_after_another() -> None:
    view_features, soft, schedule, start = make_problem(130)
    heads = train_heads_on_soft_labels(view_features, soft, schedule, start)
    for s in range(SEEDS):
        plain = nn.Linear(FEATURES, CLASSES).double()
        with torch.no_grad():
            plain.weight.copy_(start[s])
            plain.bias.zero_()
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3 * 100 / 256)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        for epoch in range(EPOCHS):
            for first in (0, 100):
                images = schedule.image_indices[s, epoch, first : first + 100].long()
                views = schedule.view_indices[s, epoch, first : first + 100].long()
                optimizer.zero_grad()
                cross_entropy(plain(view_features[images, views]), soft[images]).backward()
                optimizer.step()
            scheduler.step()
        torch.testing.assert_close(heads.weight[s], plain.weight.data, rtol=0, atol=1e-9)
        torch.testing.assert_close(heads.bias[s], plain.bias.data, rtol=0, atol=1e-9)


def test_hard_labels_given_as_soft_ones_give_the_head_of_the_linear_probe() -> None:
    view_features, _, schedule, start = make_problem(130)
    labels = torch.arange(130) % CLASSES
    hard = train_linear_heads(view_features, labels, schedule, start)
    soft = train_heads_on_soft_labels(view_features, one_hot(labels).double(), schedule, start)
    torch.testing.assert_close(soft.weight, hard.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(soft.bias, hard.bias, rtol=0, atol=1e-12)

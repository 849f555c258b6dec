import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.knowledge_distillation import (
    compute_knowledge_distillation_gradients,
    compute_soft_labels,
    train_heads_on_hard_and_soft_labels,
)
from sfm.eval.training import (
    BatchSchedule,
    RandomStreamPurpose,
    draw_initial_weights_by_seed,
    make_batch_schedule,
)

CLASSES, FEATURES, TARGETS, VIEWS, EPOCHS, SEEDS = 4, 9, 7, 6, 25, 3
TEMPERATURE, WEIGHT = 3.0, 0.2


def make_problem(images: int) -> tuple[Tensor, Tensor, Tensor, BatchSchedule, Tensor]:
    generator = torch.Generator().manual_seed(images)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classifier = LinearHeads(draw(1, CLASSES, TARGETS), draw(1, CLASSES))
    soft = compute_soft_labels(draw(images, VIEWS, TARGETS), classifier, TEMPERATURE)
    schedule = make_batch_schedule(
        3, np.tile(np.arange(images), (SEEDS, 1)), epoch_count=EPOCHS, views_per_image=VIEWS
    )
    start = draw_initial_weights_by_seed(3, RandomStreamPurpose.HEAD, (SEEDS, CLASSES, FEATURES), 0.01)
    return draw(images, VIEWS, FEATURES), torch.arange(images) % CLASSES, soft, schedule, start


def compute_loss(logits: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
    """A part of the cross-entropy, the rest T^2 times the divergence from the teacher at T."""
    softened = kl_div(log_softmax(logits / TEMPERATURE, -1), soft, reduction="batchmean")
    return (1 - WEIGHT) * cross_entropy(logits, labels) + WEIGHT * TEMPERATURE**2 * softened


def test_soft_labels_are_the_teacher_probabilities_at_the_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    target_features = torch.randn(5, VIEWS, TARGETS, generator=generator)
    weight, bias = torch.randn(1, CLASSES, TARGETS, generator=generator), torch.ones(1, CLASSES)
    layer = nn.Linear(TARGETS, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(weight[0])
        layer.bias.copy_(bias[0])
        expected = (layer(target_features) / 2.5).softmax(-1)
    soft = compute_soft_labels(target_features, LinearHeads(weight, bias), 2.5)
    torch.testing.assert_close(soft, expected)


def test_knowledge_distillation_gradients_match_autograd() -> None:
    view_features, labels, soft, _, start = make_problem(8)
    weight, bias = start.double().requires_grad_(), torch.randn(SEEDS, CLASSES).double().requires_grad_()
    features, wanted = view_features[:, :SEEDS].transpose(0, 1), soft[:, :SEEDS].transpose(0, 1)
    loss = sum(compute_loss(features[s] @ weight[s].T + bias[s], labels, wanted[s]) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (weight, bias))
    given = compute_knowledge_distillation_gradients(
        LinearHeads(weight.detach(), bias.detach()),
        features,
        labels.expand(SEEDS, -1),
        wanted,
        TEMPERATURE,
        WEIGHT,
    )
    torch.testing.assert_close(given, expected)


def test_batched_knowledge_distillation_matches_one_torch_layer_per_seed() -> None:
    view_features, labels, soft, schedule, start = make_problem(130)
    heads = train_heads_on_hard_and_soft_labels(
        view_features, labels, soft, schedule, start, TEMPERATURE, WEIGHT
    )
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
                compute_loss(
                    plain(view_features[images, views]), labels[images], soft[images, views]
                ).backward()
                optimizer.step()
            scheduler.step()
        torch.testing.assert_close(heads.weight[s], plain.weight.data, rtol=0, atol=1e-9)
        torch.testing.assert_close(heads.bias[s], plain.bias.data, rtol=0, atol=1e-9)

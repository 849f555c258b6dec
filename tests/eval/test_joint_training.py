import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.joint_training import (
    ProjectedHeads,
    compute_projector_and_head_gradients,
    train_heads_behind_projectors,
    train_projectors_with_heads,
)
from sfm.eval.projectors import LinearProjectors, init_projectors, train_projectors
from sfm.eval.training import BatchSchedule, make_batch_schedule

CLASSES, FEATURES, TARGETS, VIEWS, EPOCHS, SEEDS = 4, 9, 7, 6, 25, 3


def make_problem(images: int) -> tuple[Tensor, Tensor, LinearHeads, BatchSchedule]:
    generator = torch.Generator().manual_seed(images)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classifier = LinearHeads(draw(1, CLASSES, TARGETS), draw(1, CLASSES))
    schedule = make_batch_schedule(
        3, np.tile(np.arange(images), (SEEDS, 1)), epoch_count=EPOCHS, views_per_image=VIEWS
    )
    return draw(images, VIEWS, FEATURES), torch.arange(images) % CLASSES, classifier, schedule


def train_plain_layers(
    trained: nn.Module,
    model: nn.Module,
    view_features: Tensor,
    labels: Tensor,
    schedule: BatchSchedule,
    s: int,
) -> None:
    """Train layers of a model on the labels with torch's own Adam, at 1e-3 for a batch of 256."""
    batch = min(100, len(view_features))
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3 * batch / 256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        for first in range(0, len(view_features), batch):
            images = schedule.image_indices[s, epoch, first : first + batch].long()
            views = schedule.view_indices[s, epoch, first : first + batch].long()
            model.zero_grad()
            cross_entropy(model(view_features[images, views]), labels[images]).backward()
            optimizer.step()
        scheduler.step()


def make_linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def assert_layer_equal(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    torch.testing.assert_close(weight, layer.weight.data, rtol=0, atol=1e-8)
    torch.testing.assert_close(bias, layer.bias.data, rtol=0, atol=1e-8)


@pytest.mark.parametrize("images", [8, 130])
def test_joint_mode_is_the_published_jt(images: int) -> None:
    """Projector from torch's default start and the inherited head, both at 1e-3, on cross-entropy."""
    view_features, labels, classifier, schedule = make_problem(images)
    start = init_projectors("default", 0, SEEDS, TARGETS, FEATURES)
    model = train_projectors_with_heads(view_features, labels, classifier, start, schedule)
    for s in range(SEEDS):
        projector = make_linear_layer(start.weight[s], start.bias[s])
        head = make_linear_layer(classifier.weight[0], classifier.bias[0])
        both = nn.Sequential(projector, head)
        train_plain_layers(both, both, view_features, labels, schedule, s)
        assert_layer_equal(projector, model.projectors.weight[s], model.projectors.bias[s])
        assert_layer_equal(head, model.heads.weight[s], model.heads.bias[s])


def test_stage_mode_is_the_published_st() -> None:
    """The projector of inheritance is fixed; the inherited head behind it is trained at 1e-3."""
    view_features, labels, classifier, schedule = make_problem(8)
    target_features = torch.randn(8, VIEWS, TARGETS, generator=torch.Generator().manual_seed(1)).double()
    start = init_projectors("default", 0, SEEDS, TARGETS, FEATURES)
    projectors = train_projectors(view_features, target_features, schedule, start)
    calls: list[tuple[int, int]] = []
    heads = train_heads_behind_projectors(
        *(view_features, labels, classifier, projectors, schedule),
        lambda done, total: calls.append((done, total)),
    )
    assert calls == [(epoch, EPOCHS) for epoch in range(1, EPOCHS + 1)]
    for s in range(SEEDS):
        projector = make_linear_layer(projectors.weight[s], projectors.bias[s])
        head = make_linear_layer(classifier.weight[0], classifier.bias[0])
        train_plain_layers(head, nn.Sequential(projector, head), view_features, labels, schedule, s)
        assert_layer_equal(head, heads.weight[s], heads.bias[s])


def test_the_inherited_classifier_and_given_projectors_are_not_modified() -> None:
    view_features, labels, classifier, schedule = make_problem(8)
    start = init_projectors("default", 0, SEEDS, TARGETS, FEATURES)
    start = LinearProjectors(start.weight.double(), start.bias.double())
    tensors = (classifier.weight, classifier.bias, start.weight, start.bias)
    before = [tensor.clone() for tensor in tensors]
    model = train_projectors_with_heads(view_features, labels, classifier, start, schedule)
    heads = train_heads_behind_projectors(view_features, labels, classifier, start, schedule)
    assert not torch.equal(model.projectors.weight, start.weight)
    for trained in (model.heads, heads):
        assert not torch.equal(trained.weight[0], classifier.weight[0])
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_joint_training_gradients_match_autograd() -> None:
    view_features, labels, _, _ = make_problem(8)
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEEDS, TARGETS, FEATURES), (SEEDS, TARGETS), (SEEDS, CLASSES, TARGETS), (SEEDS, CLASSES)]
    w, b, a, c = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    x = view_features[:, :SEEDS].transpose(0, 1)
    loss = sum(cross_entropy((x[s] @ w[s].T + b[s]) @ a[s].T + c[s], labels) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (w, b, a, c))
    model = ProjectedHeads(LinearProjectors(w.detach(), b.detach()), LinearHeads(a.detach(), c.detach()))
    torch.testing.assert_close(
        compute_projector_and_head_gradients(model, x, labels.expand(SEEDS, -1)), expected
    )

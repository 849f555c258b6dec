import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.joint_training import (
    ProjectedHeads,
    compute_projector_and_head_gradients,
    train_projectors_then_heads,
    train_projectors_with_heads,
)
from sfm.eval.projectors import LinearProjectors
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


class PlainModel:
    """A projector at zero and the inherited head behind it, as torch's own layers."""

    def __init__(self, classifier: LinearHeads) -> None:
        self.projector = nn.Linear(FEATURES, TARGETS).double()
        nn.init.zeros_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)
        self.head = nn.Linear(TARGETS, CLASSES).double()
        with torch.no_grad():
            self.head.weight.copy_(classifier.weight[0])
            self.head.bias.copy_(classifier.bias[0])

    def train(
        self,
        groups: list[dict[str, object]],
        view_features: Tensor,
        labels: Tensor,
        schedule: BatchSchedule,
        s: int,
    ) -> None:
        optimizer = torch.optim.Adam(groups)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        batch = min(100, len(view_features))
        for epoch in range(EPOCHS):
            for first in range(0, len(view_features), batch):
                images = schedule.image_indices[s, epoch, first : first + batch].long()
                views = schedule.view_indices[s, epoch, first : first + batch].long()
                self.projector.zero_grad()
                self.head.zero_grad()
                cross_entropy(
                    self.head(self.projector(view_features[images, views])), labels[images]
                ).backward()
                optimizer.step()
            scheduler.step()

    def make_param_groups(self, batch: int) -> list[dict[str, object]]:
        return [
            {"params": list(self.projector.parameters()), "lr": 1e-2 * batch / 256},
            {"params": list(self.head.parameters()), "lr": 1e-3 * batch / 256},
        ]

    def assert_equal_to(self, model: ProjectedHeads, s: int) -> None:
        for layer, found in ((self.projector, model.projectors), (self.head, model.heads)):
            torch.testing.assert_close(found.weight[s], layer.weight.data, rtol=0, atol=1e-8)
            torch.testing.assert_close(found.bias[s], layer.bias.data, rtol=0, atol=1e-8)


@pytest.mark.parametrize("images", [8, 130])
def test_joint_training_matches_two_torch_layers_trained_together(images: int) -> None:
    view_features, labels, classifier, schedule = make_problem(images)
    model = train_projectors_with_heads(view_features, labels, classifier, schedule)
    for s in range(SEEDS):
        plain = PlainModel(classifier)
        plain.train(plain.make_param_groups(min(100, images)), view_features, labels, schedule, s)
        plain.assert_equal_to(model, s)


def test_stage_training_matches_two_torch_layers_trained_in_sequence() -> None:
    view_features, labels, classifier, schedule = make_problem(8)
    calls: list[tuple[int, int]] = []
    model = train_projectors_then_heads(
        view_features, labels, classifier, schedule, lambda done, total: calls.append((done, total))
    )
    assert calls == [(epoch, 2 * EPOCHS) for epoch in range(1, 2 * EPOCHS + 1)]
    for s in range(SEEDS):
        plain = PlainModel(classifier)
        for group in plain.make_param_groups(8):
            plain.train([group], view_features, labels, schedule, s)
        plain.assert_equal_to(model, s)


def test_the_inherited_classifier_is_not_modified() -> None:
    view_features, labels, classifier, schedule = make_problem(8)
    before = classifier.weight.clone(), classifier.bias.clone()
    for train_model in (train_projectors_with_heads, train_projectors_then_heads):
        model = train_model(view_features, labels, classifier, schedule)
        assert not torch.equal(model.heads.weight[0], before[0][0])
    assert torch.equal(classifier.weight, before[0])
    assert torch.equal(classifier.bias, before[1])


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

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfm.eval.accuracy import Heads
from sfm.eval.inherit import Projectors
from sfm.eval.joint import Chain, chain_gradients, train_joint, train_stage
from sfm.eval.training import Plan, lay_out

CLASSES, FEATURES, TARGETS, VIEWS, EPOCHS, SEEDS = 4, 9, 7, 6, 25, 3


def problem(images: int) -> tuple[Tensor, Tensor, Heads, Plan]:
    generator = torch.Generator().manual_seed(images)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classifier = Heads(drawn(1, CLASSES, TARGETS), drawn(1, CLASSES))
    plan = lay_out(3, np.tile(np.arange(images), (SEEDS, 1)), epochs=EPOCHS, views=VIEWS)
    return drawn(images, VIEWS, FEATURES), torch.arange(images) % CLASSES, classifier, plan


class Plain:
    """A projector at zero and the inherited head behind it, as torch's own layers."""

    def __init__(self, classifier: Heads) -> None:
        self.projector = nn.Linear(FEATURES, TARGETS).double()
        nn.init.zeros_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)
        self.head = nn.Linear(TARGETS, CLASSES).double()
        with torch.no_grad():
            self.head.weight.copy_(classifier.weight[0])
            self.head.bias.copy_(classifier.bias[0])

    def descend(
        self, groups: list[dict[str, object]], pool: Tensor, labels: Tensor, plan: Plan, s: int
    ) -> None:
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        batch = min(100, len(pool))
        for epoch in range(EPOCHS):
            for first in range(0, len(pool), batch):
                images = plan.image[s, epoch, first : first + batch].long()
                views = plan.view[s, epoch, first : first + batch].long()
                self.projector.zero_grad()
                self.head.zero_grad()
                cross_entropy(self.head(self.projector(pool[images, views])), labels[images]).backward()
                optimizer.step()
            schedule.step()

    def groups(self, batch: int) -> list[dict[str, object]]:
        return [
            {"params": list(self.projector.parameters()), "lr": 1e-2 * batch / 256},
            {"params": list(self.head.parameters()), "lr": 1e-3 * batch / 256},
        ]

    def same_as(self, chain: Chain, s: int) -> None:
        for layer, found in ((self.projector, chain.projectors), (self.head, chain.heads)):
            torch.testing.assert_close(found.weight[s], layer.weight.data, rtol=0, atol=1e-8)
            torch.testing.assert_close(found.bias[s], layer.bias.data, rtol=0, atol=1e-8)


@pytest.mark.parametrize("images", [8, 130])
def test_joint_trains_all_seeds_as_two_plain_layers_together(images: int) -> None:
    pool, labels, classifier, plan = problem(images)
    chain = train_joint(pool, labels, classifier, plan)
    for s in range(SEEDS):
        plain = Plain(classifier)
        plain.descend(plain.groups(min(100, images)), pool, labels, plan, s)
        plain.same_as(chain, s)


def test_stage_trains_all_seeds_as_two_plain_layers_one_after_the_other() -> None:
    pool, labels, classifier, plan = problem(8)
    told: list[tuple[int, int]] = []
    chain = train_stage(pool, labels, classifier, plan, lambda done, total: told.append((done, total)))
    assert told == [(epoch, 2 * EPOCHS) for epoch in range(1, 2 * EPOCHS + 1)]
    for s in range(SEEDS):
        plain = Plain(classifier)
        for group in plain.groups(8):
            plain.descend([group], pool, labels, plan, s)
        plain.same_as(chain, s)


def test_the_inherited_classifier_itself_is_never_changed() -> None:
    pool, labels, classifier, plan = problem(8)
    before = classifier.weight.clone(), classifier.bias.clone()
    for train in (train_joint, train_stage):
        chain = train(pool, labels, classifier, plan)
        assert not torch.equal(chain.heads.weight[0], before[0][0])
    assert torch.equal(classifier.weight, before[0])
    assert torch.equal(classifier.bias, before[1])


def test_the_gradient_is_that_of_the_mean_cross_entropy() -> None:
    pool, labels, _, _ = problem(8)
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEEDS, TARGETS, FEATURES), (SEEDS, TARGETS), (SEEDS, CLASSES, TARGETS), (SEEDS, CLASSES)]
    w, b, a, c = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    x = pool[:, :SEEDS].transpose(0, 1)
    loss = sum(cross_entropy((x[s] @ w[s].T + b[s]) @ a[s].T + c[s], labels) for s in range(SEEDS))
    expected = torch.autograd.grad(loss, (w, b, a, c))
    chain = Chain(Projectors(w.detach(), b.detach()), Heads(a.detach(), c.detach()))
    torch.testing.assert_close(chain_gradients(chain, x, labels.expand(SEEDS, -1)), expected)

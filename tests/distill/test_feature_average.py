"""The moving average of features, against a few lines that compute it on their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resolved_run import make_resolved_config
from safetensors.torch import load_file, save_file

from sfm.backbones.build import Backbone
from sfm.distill.config import DistillConfig
from sfm.distill.distiller import Distiller
from sfm.distill.feature_average import make_objective_at_feature_average, update_feature_average
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.train_step import LossTerm, init_distill_state, train_step
from sfm.errors import InputError

CLASSES, IPC, VIEWS, DECAY = 3, 2, 2, 0.7
CONFIG = make_resolved_config(
    classes=CLASSES, ipc=IPC, views=VIEWS, grow_every=3, feature_decay=DECAY, micro_batch=4
)


def average_over_steps(features: list[torch.Tensor]) -> torch.Tensor:
    """Return the bias-corrected average of features of shape (C * K, A, D), the oldest first."""
    weights = [DECAY ** (len(features) - 1 - age) for age in range(len(features))]
    weighted = [weight * each.mean(1) for weight, each in zip(weights, features, strict=True)]
    return torch.stack(weighted).sum(0) / sum(weights)


def sfm_objective(feature_count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    means = torch.randn(CLASSES, feature_count, generator=torch.Generator().manual_seed(1))
    target = compute_flow(means[:, None].expand(CLASSES, IPC, -1), means)
    return lambda features: sfm_loss(features, target)


@pytest.mark.parametrize("gradient", ["exact", "one-pass"])
def test_the_loss_is_that_of_the_average_over_the_steps_since_the_pyramid_grew(
    lite0: Backbone, gradient: str
) -> None:
    wanted, seen, rows = sfm_objective(lite0.card.features), [], []

    def spy(features: torch.Tensor) -> torch.Tensor:
        seen.append(features.detach())
        return wanted(features)

    # All features of a step, in order: the images of the first micro-batch, then those of the second.
    config = CONFIG.model_copy(update={"gradient": gradient, "graphs": 6})
    state = init_distill_state(config, lite0.device)
    handle = lite0.model.register_forward_hook(lambda module, inputs, output: rows.append(output.detach()))
    features: list[torch.Tensor] = []
    for step in range(8):
        rows.clear()
        loss = train_step(state, config, [LossTerm(lite0, spy)]).loss
        if step % config.grow_every == 0:
            features.clear()
        features.append(torch.cat(rows).view(CLASSES * IPC, VIEWS, -1))
        expected = average_over_steps(features)
        torch.testing.assert_close(seen[-1].view(expected.shape), expected, atol=1e-5, rtol=1e-5)
        assert loss == pytest.approx(wanted(expected.view(CLASSES, IPC, 1, -1)).item(), rel=1e-4)
    handle.remove()


def test_the_gradient_at_the_average_is_applied_to_the_features_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    past, present = torch.randn(2, CLASSES, IPC, VIEWS, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(CLASSES, IPC, 5, generator=generator, dtype=torch.float64)

    def distance(features: torch.Tensor) -> torch.Tensor:
        return ((features.mean(2) - target) ** 2).sum()

    average = update_feature_average(None, past, DECAY)
    features = present.clone().requires_grad_()
    loss = make_objective_at_feature_average(distance, average, DECAY, 2)(features)
    (gradient,) = torch.autograd.grad(loss, features)
    both = average_over_steps([past.flatten(0, 1), present.flatten(0, 1)]).view(target.shape)
    assert loss.item() == pytest.approx(((both - target) ** 2).sum().item())
    expected = (2 * (both - target) / VIEWS)[:, :, None].expand_as(features)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3, "gradient": "one-pass"}])
def test_a_state_with_an_average_goes_on_to_the_same_bits(
    config: DistillConfig, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = config.model_copy(update={"feature_decay": 0.9, "steps": 9, "grow_every": 3, **changes})
    uninterrupted = Distiller.from_config(config)
    for output in uninterrupted:
        if output.step == 5:
            save_file(uninterrupted.state_dict(), tmp_path / "state")
    saved = load_file(tmp_path / "state")
    assert saved["feature_average"].shape == (4, 1280)
    resumed = Distiller.from_config(config)
    resumed.load_state_dict(saved)
    resumed.run()
    for one, other in zip(resumed.gather_levels(), uninterrupted.gather_levels(), strict=True):
        assert torch.equal(one, other)


def test_without_decay_no_average_is_kept_and_a_state_with_one_is_refused(config: DistillConfig) -> None:
    averaging = Distiller.from_config(config.model_copy(update={"feature_decay": 0.5}))
    plain = Distiller.from_config(config.model_copy(update={"feature_decay": 0.0}))
    outputs = [averaging.step(), plain.step()]
    # The average of one step is that step.
    assert outputs[0].loss == pytest.approx(outputs[1].loss, rel=1e-5)
    assert averaging.state_dict().keys() - plain.state_dict().keys() == {"feature_average"}
    with pytest.raises(InputError, match="not of this config after 1 steps: check feature_average"):
        plain.load_state_dict(averaging.state_dict())

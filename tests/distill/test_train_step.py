from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resolved_run import make_resolved_config

from sfm.backbones.build import Backbone
from sfm.backbones.views import apply_crops
from sfm.distill.augment import draw_augmentation
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.pyramid import compute_canvas_size, decode_pyramid, list_level_resolutions
from sfm.distill.resolved_config import choose_growth_interval
from sfm.distill.train_step import LossTerm, Objective, init_distill_state, train_step
from sfm.errors import InputError

CONFIG = make_resolved_config(classes=3, ipc=2, views=2, graphs=6)


def objective(backbone: Backbone) -> Objective:
    means = torch.randn(3, backbone.card.features, generator=torch.Generator().manual_seed(1))
    target = compute_flow(means[:, None].expand(3, 2, -1), means)
    return lambda features: sfm_loss(features, target)


def clone_levels(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    return [level.detach().clone() for level in levels]


def test_the_objective_receives_features_by_class_image_and_view(lite0: Backbone) -> None:
    state = init_distill_state(CONFIG, lite0.device)
    images = decode_pyramid(clone_levels(state.levels), CONFIG.canvas_pixels)
    seen: list[torch.Tensor] = []
    wanted = objective(lite0)
    term = LossTerm(lite0, lambda features: wanted(seen.append(features.detach()) or features))
    train_step(state, CONFIG, [term])

    views = draw_augmentation(CONFIG.seed, 0, 12, CONFIG.canvas_pixels)
    quiet = [index for index in range(12) if not views.is_noisy[index]]
    assert len(quiet) > 2
    each = apply_crops(images.repeat_interleave(2, 0), views.crops, 32)
    for index in quiet:
        image, view = divmod(index, CONFIG.views)
        place = (*divmod(image, CONFIG.ipc), view)
        alone = lite0.features(each[index : index + 1])[0]
        torch.testing.assert_close(seen[0][place], alone, atol=1e-4, rtol=1e-3)


def test_the_first_adam_step_has_the_size_of_the_learning_rate(lite0: Backbone) -> None:
    state = init_distill_state(CONFIG, lite0.device)
    before = clone_levels(state.levels)[0]
    train_step(state, CONFIG, [LossTerm(lite0, objective(lite0))])
    # The first of its means is the gradient times one minus its decay.
    gradient = state.adam.first_moments[0]
    assert gradient.abs().min() > 0
    torch.testing.assert_close(state.levels[0].detach(), before - 1e-2 * gradient.sign(), atol=1e-4, rtol=0)


def test_the_pyramid_grows_on_schedule_with_a_fresh_optimizer(lite0: Backbone) -> None:
    state, wanted = init_distill_state(CONFIG, lite0.device), objective(lite0)
    sides, ages = [], []
    for _ in range(10):
        train_step(state, CONFIG, [LossTerm(lite0, wanted)])
        sides.append(state.levels[-1].shape[-1])
        ages.append(state.adam.step_count)
    assert sides == [1, 1, 1, 1, 2, 2, 2, 2, 4, 4]
    assert ages == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def test_a_pyramid_at_canvas_size_stops_growing() -> None:
    assert CONFIG.count_levels_at(10**6) == len(list_level_resolutions(CONFIG.canvas_pixels))


@given(steps=st.integers(2, 10_000), final=st.floats(0, 1))
def test_the_learning_rate_decays_over_the_second_half_to_the_final_rate(steps: int, final: float) -> None:
    config = CONFIG.model_copy(update={"steps": steps, "final_rate": final})
    rates = [config.learning_rate_at(step) for step in range(steps)]
    assert rates[: steps // 2] == [config.learning_rate] * (steps // 2)
    assert all(after <= before for before, after in pairwise(rates))
    assert rates[-1] == pytest.approx(final * config.learning_rate)


@given(steps=st.integers(1, 10_000), image_size=st.integers(8, 512))
def test_the_growth_interval_leaves_half_of_the_run_to_all_levels(steps: int, image_size: int) -> None:
    canvas = compute_canvas_size(image_size)
    count = len(list_level_resolutions(canvas))
    every = choose_growth_interval(steps, count)
    assert every >= 1
    if steps >= 2 * count:
        config = CONFIG.model_copy(update={"canvas_pixels": canvas, "grow_every": every})
        assert config.count_levels_at(steps // 2) == count


def test_a_pyramid_that_begins_at_a_resolution_has_all_levels_up_to_it() -> None:
    config = CONFIG.model_copy(update={"first_resolution": 9, "canvas_pixels": 37, "grow_every": 5})
    counts = [config.count_levels_at(step) for step in (0, 4, 5, 10, 15, 20)]
    assert counts == [4, 4, 5, 6, 7, 7]
    state = init_distill_state(config, torch.device("cpu"))
    assert [level.shape[-1] for level in state.levels] == [1, 2, 4, 8]
    # N(0, 1) over the number of levels, all of them.
    assert [level.std().item() for level in state.levels[2:]] == pytest.approx([1 / 4] * 2, rel=0.15)


def test_whole_images_are_seen_without_augmentation(lite0: Backbone) -> None:
    config = CONFIG.model_copy(update={"views": 1, "augmentation": False, "canvas_pixels": 32})
    state = init_distill_state(config, lite0.device)
    images = decode_pyramid(clone_levels(state.levels), 32)
    seen: list[torch.Tensor] = []
    wanted = objective(lite0)
    term = LossTerm(lite0, lambda features: wanted(seen.append(features.detach()) or features))
    train_step(state, config, [term])
    torch.testing.assert_close(seen[0].flatten(0, 2), lite0.features(images), atol=1e-4, rtol=1e-3)


def test_a_non_finite_loss_leaves_the_state_unchanged(lite0: Backbone) -> None:
    state = init_distill_state(CONFIG, lite0.device)
    before = clone_levels(state.levels)
    with pytest.raises(InputError, match="loss is nan in step 1"):
        train_step(state, CONFIG, [LossTerm(lite0, lambda features: features.sum() * torch.nan)])
    assert state.step == 0
    assert torch.equal(state.levels[0], before[0])

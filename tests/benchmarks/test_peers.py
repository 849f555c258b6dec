"""The two opponents of the benchmarks do what their papers say: values derived without their code."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peers import lgm, published
from resolved_run import make_resolved_config
from torch import Tensor, nn

from sfm.backbones.build import Backbone, load_backbone
from sfm.distill.adam import init_adam
from sfm.distill.augment import augment
from sfm.distill.config import DistillConfig
from sfm.distill.config_resolution import resolve_distill_config
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.objective import ClassCentres, make_objective
from sfm.distill.pyramid import decode_pyramid, list_level_resolutions
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import (
    DistillState,
    LossTerm,
    add_pyramid_level,
    draw_step_augmentation,
    train_step,
)
from sfm.pipeline.sources import open_source

SIZE, CLASSES = 32, 3


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=SIZE, device="cpu")


@pytest.fixture(scope="module")
def trainable(lite0: Backbone) -> Backbone:
    return published.make_trainable_backbone("lite0", lite0)


@pytest.fixture
def run_config(lite0: Backbone) -> ResolvedDistillConfig:
    """Of a run whose pyramid gets a level per step, and whose views are those of the published code."""
    config = DistillConfig(
        store="none",
        backbone="lite0",
        dataset="none",
        out=Path("none"),
        micro_batch=CLASSES,
        grow_every=1,
        crop_edge="zero",
        noisy_views=0.5,
    )
    return resolve_distill_config(config, [""], [str(index) for index in range(CLASSES)], [lite0])


def make_full_pyramid(run_config: ResolvedDistillConfig, step: int) -> list[Tensor]:
    levels: list[Tensor] = []
    for _ in list_level_resolutions(run_config.canvas_pixels):
        levels = add_pyramid_level(levels, run_config, torch.device("cpu"))
    assert step >= len(levels)
    return levels


def draw_normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def compute_cosine(one: list[Tensor], other: list[Tensor]) -> float:
    flat = [torch.cat([part.flatten() for part in parts]).double() for parts in (one, other)]
    return torch.cosine_similarity(*flat, dim=0).item()


# LGM


def compute_gradient(features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The gradient as the paper writes it down: that of the loss of a linear layer."""
    layer = nn.Linear(*weight.T.shape).to(weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    loss = F.cross_entropy(layer(features), labels)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)]
    )


def test_the_head_gradient_at_even_odds_matches_the_hand_computed_value() -> None:
    features, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    gradient = lgm.compute_head_gradient(features, labels, torch.zeros(2, 2))
    assert gradient.tolist() == [-0.25, 0.25, 0.25, -0.25, 0, 0]


def test_the_head_gradient_at_odds_of_3_to_1_matches_the_hand_computed_value() -> None:
    weight = torch.tensor([[math.log(3)], [0.0]])
    gradient = lgm.compute_head_gradient(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), weight)
    # Odds 3:1 and 9:1 for the first class, which is the label of the first sample only.
    weights, biases = (-1 / 4 + 2 * 9 / 10) / 2, (-1 / 4 + 9 / 10) / 2
    assert gradient.tolist() == pytest.approx([weights, -weights, biases, -biases])


def test_the_lgm_loss_matches_the_hand_computed_value() -> None:
    labels, weight = torch.tensor([0, 1]), torch.zeros(2, 2)
    real = lgm.compute_head_gradient(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), labels, weight)
    assert lgm.lgm_loss(torch.eye(2), labels, real, weight).item() == pytest.approx(1 - 2 / math.sqrt(5))
    assert lgm.lgm_loss(-torch.eye(2), labels, real, weight).item() == pytest.approx(1 + 2 / math.sqrt(5))


@given(classes=st.integers(2, 5), width=st.integers(1, 6), count=st.integers(1, 9), scale=st.floats(0, 10))
def test_the_head_gradient_matches_autograd(classes: int, width: int, count: int, scale: float) -> None:
    features, weight = draw_normal(count, width), scale * draw_normal(classes, width)
    labels = torch.arange(count) % classes
    torch.testing.assert_close(
        lgm.compute_head_gradient(features, labels, weight), compute_gradient(features, labels, weight)
    )


def test_the_lgm_pixel_gradient_matches_double_differentiation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    images, labels = draw_normal(6, 3, 2, 2).requires_grad_(), torch.arange(6) % 3
    weight = draw_normal(3, 5)
    real = compute_gradient(draw_normal(9, 5), torch.arange(9) % 3, weight).detach()

    twice = 1 - F.cosine_similarity(compute_gradient(net(images), labels, weight), real, dim=0)
    once = lgm.lgm_loss(net(images), labels, real, weight)
    assert once.item() == pytest.approx(twice.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(once, images), torch.autograd.grad(twice, images))


def test_an_lgm_step_follows_the_gradient_of_its_definition(
    lite0: Backbone, run_config: ResolvedDistillConfig
) -> None:
    run_config, step = run_config.model_copy(update={"ipc": 2, "views": 2}), 20
    count = run_config.image_count * run_config.views
    pixels = np.random.default_rng(0).integers(
        0, 256, (30, run_config.canvas_pixels, run_config.canvas_pixels, 3), dtype=np.uint8
    )
    real = lgm.RealImages(pixels, np.arange(30) % CLASSES)
    levels = make_full_pyramid(run_config, step)
    before = [level.detach().clone().requires_grad_() for level in levels]
    state = DistillState(step, levels, init_adam(levels))
    loss = lgm.run_lgm_step(state, run_config, lite0, real)

    rows = lgm.select_batch_rows(run_config.seed, step, 30, count)
    views = draw_step_augmentation(run_config, step, 2 * count)
    assert max(views.crops.width.max(), views.crops.height.max()) > run_config.canvas_pixels
    weight = lgm.draw_head(run_config, lite0.card.features, step, torch.device("cpu"))
    batch = torch.from_numpy(pixels[rows] / np.float32(255)).permute(0, 3, 1, 2).contiguous()
    real_features = lite0.features(augment(batch, views.select_views(slice(count, 2 * count)), SIZE))
    target = compute_gradient(real_features, torch.from_numpy(real.labels[rows]), weight).detach()
    labels = torch.tensor([c for c in range(CLASSES) for _ in range(run_config.ipc * run_config.views)])
    synthetic = augment(
        decode_pyramid(before, run_config.canvas_pixels), views.select_views(slice(0, count)), SIZE
    )
    gradient = compute_gradient(lite0.features(synthetic), labels, weight)
    expected = 1 - gradient @ target / (gradient.norm() * target.norm())
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert compute_cosine(state.adam.first_moments, list(torch.autograd.grad(expected, before))) > 0.9999


def test_each_lgm_step_draws_its_own_head(run_config: ResolvedDistillConfig) -> None:
    heads = [lgm.draw_head(run_config, 500, step, torch.device("cpu")) for step in (0, 1, 1)]
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])
    assert heads[0].std().item() == pytest.approx(0.01, rel=0.1)


@given(count=st.integers(4, 40), batch=st.integers(1, 4))
def test_an_epoch_uses_no_real_image_twice(count: int, batch: int) -> None:
    steps = count // batch
    first, second = (
        np.concatenate([lgm.select_batch_rows(3, step, count, batch) for step in range(at, at + steps)])
        for at in (0, steps)
    )
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == steps * batch
        assert set(epoch.tolist()) <= set(range(count))
    assert count < 20 or first.tolist() != second.tolist()


def test_real_images_are_decoded_at_canvas_size_with_their_labels(lite0: Backbone) -> None:
    source, rows = open_source("builtin:fashion-mnist-6k"), np.array([3, 50, 4000])
    real = lgm.decode_real_images(source, rows, lite0, 37)
    assert real.pixels.shape == (3, 37, 37, 3)
    assert source.train.labels is not None
    assert real.labels.tolist() == source.train.labels[rows].tolist()
    for pixels, sample in zip(real.pixels, source.train.read(rows), strict=True):
        small = np.asarray(source.decode(sample.data), dtype=np.float64)
        assert abs(pixels.mean() - small.mean()) < 2


# SFM as published


def test_the_published_loss_equals_ours_with_one_image_per_class() -> None:
    features, means = draw_normal(5, 1, 2, 7), draw_normal(5, 7)
    ours = sfm_loss(features, compute_flow(means, means))
    assert published.published_loss(features, means).item() == pytest.approx(ours.item(), rel=1e-12)


def test_the_published_loss_has_one_flow_per_class_and_divides_by_the_images_less_one() -> None:
    features, means = torch.tensor([[[1.0], [5.0]], [[7.0], [11.0]]]), torch.tensor([[0.0], [1.0]])
    # Averages 3 and 9 of two images each: flows 9/3 - 3 = 0 and 3/3 - 9 = -8; real 1 and -1.
    expected = 1 - 8 / (8 * math.sqrt(2))
    assert published.published_loss(features[:, :, None], means).item() == pytest.approx(expected)


@given(classes=st.integers(2, 4), ipc=st.integers(1, 4), views=st.integers(1, 3), seed=st.integers(0, 99))
def test_class_average_is_what_is_published(classes: int, ipc: int, views: int, seed: int) -> None:
    """And it is, written down once more in numpy, for features of any values."""
    rng = np.random.default_rng(seed)
    features, means = rng.normal(size=(classes, ipc, views, 5)), rng.normal(size=(classes, 5))
    averages = features.reshape(classes, ipc * views, 5).mean(axis=1)
    flows = [
        [others.sum(axis=0) / divisor - own for own, others in split_off_each(rows)]
        for rows, divisor in ((averages, classes * ipc - 1), (means, classes - 1))
    ]
    synthetic, real = (np.concatenate(flow) for flow in flows)
    expected = 1 - synthetic @ real / (np.linalg.norm(synthetic) * np.linalg.norm(real))

    config = make_resolved_config(classes=classes, ipc=ipc, views=views, centres="class-average")
    objective = make_objective(config, ClassCentres(means, means[:, None]), torch.device("cpu"))
    tensor = torch.from_numpy(features).requires_grad_()
    theirs, ours = published.published_loss(tensor, torch.from_numpy(means)), objective(tensor.float())
    assert theirs.item() == pytest.approx(expected, abs=1e-9)
    assert ours.item() == pytest.approx(expected, abs=1e-5)
    for loss in (theirs, ours):
        (gradient,) = torch.autograd.grad(loss, tensor)
        # All images of a class have the same gradient, so from equal starts they would stay equal.
        torch.testing.assert_close(gradient, gradient[:, :1, :1].expand_as(gradient))
        assert gradient.abs().max() > 0


def split_off_each(rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return every row with all the others."""
    return [(row, np.delete(rows, index, axis=0)) for index, row in enumerate(rows)]


def test_published_decoding_and_augmentation_match_ours(run_config: ResolvedDistillConfig) -> None:
    levels = [level.detach() for level in make_full_pyramid(run_config, 20)]
    images = decode_pyramid(levels, run_config.canvas_pixels)
    torch.testing.assert_close(
        published.decode_at_full_size(levels, run_config.canvas_pixels), images, atol=1e-5, rtol=0
    )
    views = draw_step_augmentation(run_config, 5, 2 * CLASSES)
    assert max(views.crops.width.max(), views.crops.height.max()) > run_config.canvas_pixels
    quiet = replace(views, is_noisy=np.zeros(2 * CLASSES, dtype=bool))
    torch.testing.assert_close(
        published.augment_with_grid_sample(images, quiet, SIZE),
        augment(images, quiet, SIZE),
        atol=1e-4,
        rtol=0,
    )
    changed = published.augment_with_grid_sample(images, views, SIZE) - published.augment_with_grid_sample(
        images, quiet, SIZE
    )
    assert np.array_equal(changed.flatten(1).abs().amax(1).numpy() > 0, views.is_noisy)
    assert changed[views.is_noisy].mean().item() == pytest.approx(0.5, abs=0.02)
    assert changed[views.is_noisy].std().item() == pytest.approx(0.2, abs=0.02)


def test_the_published_step_has_the_loss_and_gradient_of_ours(
    lite0: Backbone, trainable: Backbone, run_config: ResolvedDistillConfig
) -> None:
    means = torch.randn(CLASSES, lite0.card.features, generator=torch.Generator().manual_seed(1))
    step = next(
        step
        for step in range(20, 200)
        if not draw_step_augmentation(run_config, step, CLASSES).is_noisy.any()
    )
    ours, theirs = make_full_pyramid(run_config, step), make_full_pyramid(run_config, step)
    own = DistillState(step, ours, init_adam(ours))
    term = LossTerm(lite0, lambda features: sfm_loss(features, compute_flow(means, means)))
    expected = train_step(own, run_config, [term])
    state = published.PublishedState(step, theirs, published.make_adam(theirs, run_config))
    assert published.run_published_step(state, run_config, trainable, means) == pytest.approx(
        expected.loss, rel=1e-4
    )
    assert (
        compute_cosine(own.adam.first_moments, [level.grad for level in theirs if level.grad is not None])
        > 0.9999
    )


def test_the_published_step_accumulates_unused_weight_gradients(
    lite0: Backbone, trainable: Backbone, run_config: ResolvedDistillConfig
) -> None:
    means = torch.randn(CLASSES, lite0.card.features, generator=torch.Generator().manual_seed(1))
    levels = make_full_pyramid(run_config, 20)
    state = published.PublishedState(20, levels, published.make_adam(levels, run_config))
    first = next(iter(trainable.model.parameters()))
    weights = first.detach().clone()
    trainable.model.zero_grad()
    published.run_published_step(state, run_config, trainable, means)
    assert first.grad is not None
    once = first.grad.clone()
    published.run_published_step(state, run_config, trainable, means)
    assert not torch.equal(first.grad, once)
    assert torch.equal(first.detach(), weights)

"""Gradients from micro-batches, against the one graph over all images; real weights."""

import copy
from dataclasses import replace

import pytest
import torch
from batch_gradients import BatchGradients, collect_gradients
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.distill.augment import draw_augmentation
from sfm.distill.flow import compute_flow, decoupled_loss, sfm_loss
from sfm.distill.pyramid import append_noise_level_and_rescale, compute_canvas_size, list_level_resolutions
from sfm.distill.train_step import (
    ImageBatch,
    MicroBatching,
    NonFiniteLossError,
    Objective,
    compute_exact_gradients,
    compute_features,
    compute_gradients,
    compute_stale_gradients,
    split_into_micro_batches,
)

CLASSES, IPC, VIEWS, SIZE = 4, 2, 2, 32
SHAPE = (CLASSES, IPC, VIEWS)
FULL_BATCH = MicroBatching(CLASSES * IPC, "exact", CLASSES * IPC)


@pytest.fixture(scope="module")
def double(lite0: Backbone) -> Backbone:
    return replace(lite0, model=copy.deepcopy(lite0.model).double())


def make_batch(dtype: torch.dtype) -> ImageBatch:
    levels: list[Tensor] = []
    canvas = compute_canvas_size(SIZE)
    for resolution in list_level_resolutions(canvas):
        levels = append_noise_level_and_rescale(levels, resolution, CLASSES * IPC, 3, torch.device("cpu"))
    levels = [level.detach().to(dtype).requires_grad_() for level in levels]
    return ImageBatch(levels, canvas, SIZE, draw_augmentation(3, 7, CLASSES * IPC * VIEWS, canvas), SHAPE)


def make_objective(name: str, dtype: torch.dtype, features: int) -> Objective:
    generator = torch.Generator().manual_seed(1)
    means = torch.rand(CLASSES, features, dtype=dtype, generator=generator)
    own = means[:, None] + 0.1 * torch.rand(CLASSES, IPC, features, dtype=dtype, generator=generator)
    if name == "sfm":
        return lambda seen: sfm_loss(seen, compute_flow(own, means))
    return lambda seen: decoupled_loss(seen, own, means, 0.7)


def compute_cosine(one: BatchGradients, other: BatchGradients) -> float:
    flat = [torch.cat([level.flatten() for level in found.levels]).double() for found in (one, other)]
    return torch.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("name", ["sfm", "sfm-decoupled"])
@pytest.mark.parametrize("micro_batch", range(1, 8))
@pytest.mark.parametrize("graphs", [0, 5, 8])
def test_float64_micro_batch_gradients_match_the_full_batch(
    double: Backbone, name: str, micro_batch: int, graphs: int
) -> None:
    images, wanted = make_batch(torch.float64), make_objective(name, torch.float64, double.card.features)
    whole = collect_gradients(compute_exact_gradients, images, double, wanted, FULL_BATCH)
    cut = collect_gradients(
        compute_exact_gradients, images, double, wanted, MicroBatching(micro_batch, "exact", graphs)
    )
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    for one, other in zip(cut.levels, whole.levels, strict=True):
        assert (one - other).abs().max() <= 1e-10 * whole.levels[0].abs().max()


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_float32_micro_batch_gradients_have_cosine_near_one(lite0: Backbone, micro_batch: int) -> None:
    images, wanted = make_batch(torch.float32), make_objective("sfm", torch.float32, lite0.card.features)
    whole = collect_gradients(compute_exact_gradients, images, lite0, wanted, FULL_BATCH)
    assert (
        compute_cosine(
            collect_gradients(
                compute_exact_gradients, images, lite0, wanted, MicroBatching(micro_batch, "exact", 0)
            ),
            whole,
        )
        >= 0.9999
    )


def test_one_pass_gradients_are_exact_with_up_to_date_features(double: Backbone) -> None:
    images, wanted = make_batch(torch.float64), make_objective("sfm", torch.float64, double.card.features)
    whole = collect_gradients(compute_exact_gradients, images, double, wanted, FULL_BATCH)
    cut = collect_gradients(compute_stale_gradients, images, double, wanted, 3, whole.features)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    assert compute_cosine(cut, whole) == pytest.approx(1, abs=1e-10)


def test_one_pass_gradients_use_the_last_features_of_other_images(double: Backbone) -> None:
    images, wanted = make_batch(torch.float64), make_objective("sfm", torch.float64, double.card.features)
    before = torch.rand(CLASSES * IPC * VIEWS, double.card.features, dtype=torch.float64)
    cut = collect_gradients(compute_stale_gradients, images, double, wanted, 4, before)
    now = collect_gradients(compute_exact_gradients, images, double, wanted, FULL_BATCH).features
    assert torch.allclose(cut.features, now, atol=1e-12)
    levels = [level.detach()[:4].requires_grad_() for level in images.levels]
    mixed = torch.cat([compute_features(images, double, levels, slice(0, 4)), before[4 * VIEWS :]])
    first = torch.autograd.grad(wanted(mixed.view(*SHAPE, -1)), levels)
    for found, expected in zip(cut.levels, first, strict=True):
        torch.testing.assert_close(found[:4], expected, atol=1e-12, rtol=1e-9)


def test_one_pass_starts_with_an_exact_step(double: Backbone) -> None:
    images, wanted = make_batch(torch.float64), make_objective("sfm", torch.float64, double.card.features)
    begun = collect_gradients(
        compute_gradients, images, double, wanted, MicroBatching(3, "one-pass", 0), None
    )
    exact = collect_gradients(compute_exact_gradients, images, double, wanted, MicroBatching(3, "exact", 0))
    assert all(map(torch.equal, begun.levels, exact.levels))


def record_forward_passes(lite0: Backbone, micro_batch: int, graphs: int) -> list[tuple[int, bool]]:
    """Return how many views went through the backbone in each forward pass of a step, and if with a graph."""
    images, wanted = make_batch(torch.float32), make_objective("sfm", torch.float32, lite0.card.features)
    seen: list[tuple[int, bool]] = []
    convolution = next(m for m in lite0.model.modules() if isinstance(m, torch.nn.Conv2d))
    handle = convolution.register_forward_pre_hook(
        lambda _module, arguments: seen.append((len(arguments[0]), torch.is_grad_enabled()))
    )
    collect_gradients(
        compute_exact_gradients, images, lite0, wanted, MicroBatching(micro_batch, "exact", graphs)
    )
    handle.remove()
    return seen


def test_images_with_kept_graphs_need_one_forward_pass_and_others_two(lite0: Backbone) -> None:
    with_graph, without = (2 * VIEWS, True), (2 * VIEWS, False)
    assert record_forward_passes(lite0, 2, 8) == 4 * [with_graph]
    assert record_forward_passes(lite0, 2, 5) == 2 * [without] + 4 * [with_graph]
    assert record_forward_passes(lite0, 2, 0) == 3 * [without] + 4 * [with_graph]


@pytest.mark.parametrize("graphs", [0, 8])
def test_a_gradient_callback_may_modify_its_images_in_place(double: Backbone, graphs: int) -> None:
    images, wanted = make_batch(torch.float64), make_objective("sfm", torch.float64, double.card.features)
    cut = MicroBatching(3, "exact", graphs)
    untouched = collect_gradients(compute_exact_gradients, images, double, wanted, cut)
    found: dict[int, list[Tensor]] = {}

    def change(part: slice, gradients: list[Tensor]) -> None:
        found[part.start] = gradients
        for level in images.levels:
            level.detach()[part].add_(1)

    compute_exact_gradients(images, double, wanted, cut, change)
    for level, whole in enumerate(untouched.levels):
        assert torch.equal(torch.cat([found[start][level] for start in sorted(found)]), whole)


@pytest.mark.parametrize("graphs", [0, 8])
def test_a_non_finite_loss_raises_before_any_gradient_callback(lite0: Backbone, graphs: int) -> None:
    given: list[slice] = []
    with pytest.raises(NonFiniteLossError, match="nan"):
        compute_exact_gradients(
            make_batch(torch.float32),
            lite0,
            lambda seen: seen.sum() * torch.nan,
            MicroBatching(3, "exact", graphs),
            lambda part, _: given.append(part),
        )
    assert not given


def test_split_images_covers_every_image_once() -> None:
    assert [(part.start, part.stop) for part in split_into_micro_batches(7, 3)] == [(0, 3), (3, 6), (6, 7)]

"""Augmented views of images: what the pairs of small matrices do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import grid_sample, interpolate

from sfm.backbones.crops import (
    Crops,
    concatenate_crops,
    draw_crops,
    make_centre_crops,
    select_crops,
)
from sfm.backbones.views import apply_crops, make_interpolation_matrices
from sfm.random_streams import make_rng

COUNTERS = st.lists(st.integers(0, 2**64 - 1), max_size=3)


def make_full_crops(count: int, size: int, *, mirrored: bool = False) -> Crops:
    zero, side = np.zeros(count), np.full(count, float(size))
    return Crops(zero, zero, side, side, np.full(count, mirrored))


def make_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 2**32), size=st.integers(1, 80), out=st.integers(1, 80), mirror=st.booleans())
def test_interpolation_weights_are_non_negative_and_sum_to_one(
    seed: int, size: int, out: int, mirror: bool
) -> None:
    crops = draw_crops(make_rng(seed), 5, size)
    matrices = make_interpolation_matrices(crops.left, crops.width, size, out, np.full(5, mirror))
    assert matrices.shape == (5, out, size)
    assert (matrices >= 0).all()
    torch.testing.assert_close(matrices.sum(-1), torch.ones(5, out))


@given(side=st.integers(1, 40), inset=st.integers(0, 10))
def test_a_centre_crop_at_its_own_size_is_a_slice(side: int, inset: int) -> None:
    size = side + 2 * inset
    images = make_images(2, size)
    cut = apply_crops(images, make_centre_crops(2, size, side), side)
    torch.testing.assert_close(cut, images[..., inset : inset + side, inset : inset + side])


@given(seed=st.integers(0, 2**32), size=st.integers(2, 40), out=st.integers(1, 40))
def test_a_flipped_view_is_the_mirror_image_of_the_view(seed: int, size: int, out: int) -> None:
    images, crops = make_images(3, size), draw_crops(make_rng(seed), 3, size)
    seen = {
        flip: apply_crops(
            images, Crops(crops.top, crops.left, crops.height, crops.width, np.full(3, flip)), out
        )
        for flip in (False, True)
    }
    torch.testing.assert_close(seen[True], seen[False].flip(-1))


@given(size=st.integers(1, 40), factor=st.integers(1, 64))
def test_upsampling_a_full_crop_matches_torch(size: int, factor: int) -> None:
    images, out = make_images(2, size), size + factor
    expected = interpolate(images, size=(out, out), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        apply_crops(images, make_full_crops(2, size), out), expected, atol=1e-5, rtol=0
    )


def test_each_image_uses_its_own_crop() -> None:
    images, crops = make_images(4, 32), draw_crops(make_rng(3), 4, 32)
    together = apply_crops(images, crops, 16)
    for i in range(4):
        one = select_crops(crops, slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], apply_crops(images[i : i + 1], one, 16))


def test_the_gradient_reaches_every_pixel_of_the_crop() -> None:
    images = make_images(2, 20).requires_grad_()
    apply_crops(images, make_centre_crops(2, 20, 10), 10).sum().backward()
    expected = torch.zeros(2, 3, 20, 20)
    expected[..., 5:15, 5:15] = 1
    torch.testing.assert_close(images.grad, expected)


@given(seed=st.integers(0, 2**32), size=st.integers(8, 300))
def test_crops_stay_inside_the_image_and_within_area_and_ratio(seed: int, size: int) -> None:
    crops = draw_crops(make_rng(seed), 50, size)
    assert (crops.top >= 0).all()
    assert (crops.left >= 0).all()
    assert (crops.top + crops.height <= size * (1 + 1e-12)).all()
    assert (crops.left + crops.width <= size * (1 + 1e-12)).all()
    ratio = crops.width / crops.height
    assert (ratio >= 3 / 4 - 1e-12).all()
    assert (ratio <= 4 / 3 + 1e-12).all()
    assert (crops.width * crops.height >= 0.08 * size**2 * (1 - 1e-12)).all()


@given(seed=st.integers(0, 2**32), size=st.integers(8, 300))
def test_crops_with_a_zero_edge_cover_an_image_that_they_are_larger_than(seed: int, size: int) -> None:
    clipped, crops = draw_crops(make_rng(seed), 50, size), draw_crops(make_rng(seed), 50, size, edge="zero")
    for start, length in ((crops.top, crops.height), (crops.left, crops.width)):
        larger = length > size
        assert (start[larger] <= 0).all()
        assert (start[larger] + length[larger] >= size).all()
        assert (start[~larger] >= 0).all()
        assert (start[~larger] + length[~larger] <= size * (1 + 1e-12)).all()
    fits = (crops.width <= size) & (crops.height <= size)
    for name in ("top", "left", "height", "width"):
        np.testing.assert_array_equal(getattr(crops, name)[fits], getattr(clipped, name)[fits])
    np.testing.assert_array_equal(crops.flip, clipped.flip)


def test_one_crop_in_seven_is_larger_than_the_image_as_in_the_published_code() -> None:
    crops = draw_crops(make_rng(0), 50_000, 64, edge="zero")
    share = (np.maximum(crops.width, crops.height) > 64).mean()
    # With r = log(4/3): P(share > exp(-|log ratio|)) = (1 - (1 - exp(-r)) / r) / .92.
    r = np.log(4 / 3)
    assert share == pytest.approx((1 - (1 - np.exp(-r)) / r) / 0.92, abs=0.005)
    assert share == pytest.approx(1 / 7, abs=0.005)
    area = crops.width * crops.height / 64**2
    assert area.mean() == pytest.approx(0.54, abs=0.005), "shares of the area are uniform from .08 to 1"


@given(seed=st.integers(0, 2**32), size=st.integers(2, 20), out=st.integers(1, 20))
def test_views_with_a_zero_edge_are_those_of_grid_sample_with_zeros(seed: int, size: int, out: int) -> None:
    images, crops = make_images(3, size), draw_crops(make_rng(seed), 3, size, edge="zero")
    fraction = (np.arange(out) + 0.5) / out
    y, x = (
        torch.from_numpy(2 * (start[:, None] + length[:, None] * fraction) / size - 1).float()
        for start, length in ((crops.top, crops.height), (crops.left, crops.width))
    )
    x = torch.where(torch.from_numpy(crops.flip)[:, None], x.flip(1), x)
    grid = torch.stack([x[:, None].expand(-1, out, -1), y[:, :, None].expand(-1, -1, out)], dim=-1)
    expected = grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(apply_crops(images, crops, out), expected, atol=1e-4, rtol=0)
    parts = [select_crops(crops, slice(0, 1)), select_crops(crops, slice(1, 3))]
    assert torch.equal(apply_crops(images, concatenate_crops(parts), out), apply_crops(images, crops, out))


def test_about_half_of_the_views_are_flipped() -> None:
    flipped = draw_crops(make_rng(0), 10_000, 64).flip.mean()
    assert flipped == pytest.approx(0.5, abs=0.03)


@given(seed=st.integers(0, 2**64 - 1), counter=COUNTERS)
def test_random_numbers_of_a_seed_are_independent_of_previous_draws(seed: int, counter: list[int]) -> None:
    first = make_rng(seed, *counter).random(5)
    make_rng(seed, *counter).random(1000)
    make_rng(seed + 1, 7).random(3)
    np.testing.assert_array_equal(make_rng(seed, *counter).random(5), first)


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2, unique=True),
    counters=st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 3), min_size=2, max_size=2, unique=True),
)
def test_another_seed_or_counter_gives_other_random_numbers(
    seeds: list[int], counters: list[tuple[int, int, int]]
) -> None:
    first = make_rng(seeds[0], *counters[0]).random(5)
    assert (make_rng(seeds[1], *counters[0]).random(5) != first).any()
    assert (make_rng(seeds[0], *counters[1]).random(5) != first).any()


def test_random_streams_of_adjacent_counters_do_not_overlap() -> None:
    drawn = np.concatenate([make_rng(0, step).random(4000) for step in range(5)])
    assert len(np.unique(drawn)) == len(drawn)


def test_a_fourth_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="at most three"):
        make_rng(0, 1, 2, 3, 4)

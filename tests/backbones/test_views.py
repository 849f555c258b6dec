"""Augmented views of images: what the pairs of small matrices do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from sfm.backbones.crops import Crops, draw_crops, make_centre_crops
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
        one = Crops(*(value[i : i + 1] for value in vars(crops).values()))
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

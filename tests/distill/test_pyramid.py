import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sfm.distill.pyramid import (
    append_level_of_zeros_or_image_and_rescale,
    append_noise_level_and_rescale,
    compute_canvas_size,
    decode_pyramid,
    list_level_resolutions,
    make_decorrelated_to_rgb_matrix,
    upsample_rows,
    upsample_rows_backward,
)

CPU = torch.device("cpu")


def make_pyramid(canvas: int, count: int, levels: int, seed: int = 0) -> list[torch.Tensor]:
    grown: list[torch.Tensor] = []
    for resolution in list_level_resolutions(canvas)[:levels]:
        grown = append_noise_level_and_rescale(grown, resolution, count, seed, CPU)
    return grown


@pytest.mark.parametrize(("input_size", "canvas"), [(224, 256), (96, 110), (32, 37), (48, 55)])
def test_the_canvas_margin_is_an_eighth_of_the_canvas(input_size: int, canvas: int) -> None:
    assert compute_canvas_size(input_size) == canvas


def test_level_resolutions_double_up_to_the_canvas() -> None:
    assert list_level_resolutions(256) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert list_level_resolutions(110) == (1, 2, 4, 8, 16, 32, 64, 110)


def test_colour_matrix_columns_have_norm_at_most_one() -> None:
    norms = make_decorrelated_to_rgb_matrix().norm(dim=0)
    assert norms.max() == pytest.approx(1.0)
    assert (make_decorrelated_to_rgb_matrix()[:, 0] > 0).all(), "the first component is brightness"


@given(
    canvas=st.integers(9, 40),
    levels=st.integers(1, 7),
    scale=st.floats(0.01, 50),
    decorrelation=st.booleans(),
)
@settings(max_examples=25)
def test_decoding_sums_upsampled_levels_then_applies_colours_and_sigmoid(
    canvas: int, levels: int, scale: float, decorrelation: bool
) -> None:
    stack = [scale * level.detach().double() for level in make_pyramid(canvas, 2, levels)]
    upsampled = [F.interpolate(level, size=(canvas, canvas), mode="bilinear") for level in stack]
    colours = make_decorrelated_to_rgb_matrix().double() if decorrelation else torch.eye(3).double()
    mixed = torch.einsum("ij,njyx->niyx", colours, torch.stack(upsampled).sum(0))
    images = decode_pyramid(stack, canvas, decorrelation)
    torch.testing.assert_close(images, torch.sigmoid(2 * mixed), atol=1e-5, rtol=1e-5)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("decorrelation", [True, False])
def test_plain_pixels_are_decoded_with_colours_and_sigmoid_alone(decorrelation: bool) -> None:
    assert list_level_resolutions(110, "pixels") == (110,)
    (pixels,) = append_noise_level_and_rescale([], 12, 3, 0, CPU)
    assert pixels.std().item() == pytest.approx(1, abs=0.1)
    colours = make_decorrelated_to_rgb_matrix() if decorrelation else torch.eye(3)
    expected = torch.sigmoid(2 * torch.einsum("ij,njyx->niyx", colours, pixels))
    images = decode_pyramid([pixels], 12, decorrelation)
    torch.testing.assert_close(images, expected)
    (got,), (wanted,) = (torch.autograd.grad(each.square().sum(), pixels) for each in (images, expected))
    torch.testing.assert_close(got, wanted)


def test_a_start_from_zeros_is_grey_and_new_levels_keep_the_images() -> None:
    levels = append_level_of_zeros_or_image_and_rescale([], 1, 2, CPU)
    assert torch.equal(decode_pyramid(levels, 20), torch.full((2, 3, 20, 20), 0.5))
    levels = [level.detach() for level in make_pyramid(20, 2, 3)]
    after = append_level_of_zeros_or_image_and_rescale(levels, 8, 2, CPU)
    assert [level.shape[-1] for level in after] == [1, 2, 4, 8]
    for old, new in zip(levels, after, strict=False):
        torch.testing.assert_close(new, old * 3 / 4)
    # The published code fills the new level with the mean of the scaled ones.
    scaled = [F.interpolate(level * 3 / 4, size=(8, 8), mode="bilinear") for level in levels]
    torch.testing.assert_close(after[-1], torch.stack(scaled).mean(0))
    finest = append_level_of_zeros_or_image_and_rescale(levels, 20, 2, CPU)
    torch.testing.assert_close(decode_pyramid(finest, 20), decode_pyramid(levels, 20))
    assert all(level.requires_grad and level.is_leaf for level in after)


def test_decoding_gradients_of_all_levels_match_bilinear_upsampling() -> None:
    levels = make_pyramid(20, 2, 6)
    images = decode_pyramid(levels, 20)
    got = torch.autograd.grad(images.square().sum(), levels)
    total = sum(F.interpolate(level, size=(20, 20), mode="bilinear") for level in levels)
    mixed = torch.einsum("ij,njyx->niyx", make_decorrelated_to_rgb_matrix(), total)
    expected = torch.autograd.grad(torch.sigmoid(2 * mixed).square().sum(), levels)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_each_of_n_initial_levels_has_standard_deviation_one_over_n() -> None:
    levels = make_pyramid(110, 20, 8)
    for level in levels[3:]:
        assert level.std().item() == pytest.approx(1 / 8, rel=0.1)


def test_adding_a_level_keeps_image_layout_and_contrast() -> None:
    before = make_pyramid(110, 20, 5)
    after = append_noise_level_and_rescale(before, 32, 20, 0, CPU)
    old, new = decode_pyramid(before, 110).detach(), decode_pyramid(after, 110).detach()
    assert torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1] > 0.8
    assert new.mean().item() == pytest.approx(0.5, abs=0.1)
    assert 0.05 < new.std().item() < 0.3


def test_initial_levels_depend_only_on_seed_and_level_count() -> None:
    torch.manual_seed(1)
    first = make_pyramid(37, 3, 4)
    torch.manual_seed(2)
    again, other = make_pyramid(37, 3, 4), make_pyramid(37, 3, 4, seed=1)
    for one, two, three in zip(first, again, other, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        assert not torch.equal(one, three)


@pytest.mark.parametrize("canvas", [9, 37, 55])
def test_dense_and_summed_row_upsampling_agree(canvas: int) -> None:
    sides = list_level_resolutions(canvas)[:-1]
    random = torch.Generator().manual_seed(canvas)
    widened = torch.rand(6, sum(sides), canvas, generator=random)
    gradient = torch.rand(6, canvas, canvas, generator=random)
    for way, planes in ((upsample_rows, widened), (upsample_rows_backward, gradient)):
        one, other = (way(planes, sides, canvas, use_dense_matrices=dense) for dense in (True, False))
        torch.testing.assert_close(one, other)
        assert one.is_contiguous()
        assert other.is_contiguous()


@pytest.mark.parametrize(("canvas", "levels"), [(9, 1), (9, 4), (9, 5), (37, 7)])
def test_decoding_backward_matches_finite_differences(canvas: int, levels: int) -> None:
    stack = [level.detach().double().requires_grad_() for level in make_pyramid(canvas, 2, levels)]
    assert torch.autograd.gradcheck(
        lambda *given: decode_pyramid(given, canvas), stack, atol=1e-7, rtol=1e-5, fast_mode=True
    )

import numpy as np
import torch

from sfm.distill.augment import augment, draw_augmentation


def make_images(count: int = 4, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def test_augmentation_of_a_step_is_independent_of_previous_draws() -> None:
    straight = [augment(make_images(), draw_augmentation(5, step, 4, 24), 16) for step in range(4)]
    torch.manual_seed(99)
    np.random.default_rng(1).normal(size=10)
    backwards = [augment(make_images(), draw_augmentation(5, step, 4, 24), 16) for step in reversed(range(4))]
    for one, two in zip(straight, reversed(backwards), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_augment_does_not_change_the_global_rng_state() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    augment(make_images(), draw_augmentation(0, 0, 4, 24), 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_between_steps_and_seeds() -> None:
    base = augment(make_images(), draw_augmentation(0, 0, 4, 24), 16)
    assert not torch.equal(base, augment(make_images(), draw_augmentation(0, 1, 4, 24), 16))
    assert not torch.equal(base, augment(make_images(), draw_augmentation(1, 0, 4, 24), 16))


def test_each_image_gets_its_own_consecutive_views() -> None:
    black_and_white = torch.stack([torch.zeros(3, 24, 24), torch.ones(3, 24, 24)])
    views = draw_augmentation(0, 0, 6, 24)
    seen = augment(black_and_white, views, 16)
    quiet = ~views.is_noisy
    assert seen.shape == (6, 3, 16, 16)
    for view in np.flatnonzero(quiet):
        torch.testing.assert_close(seen[view], torch.full((3, 16, 16), float(view >= 3)))
    assert quiet[:3].any()
    assert quiet[3:].any()


def test_half_of_the_views_get_noise_with_mean_one_half_and_std_one_fifth() -> None:
    count = 400
    views = draw_augmentation(0, 0, count, 24)
    noise = augment(torch.zeros(count, 3, 24, 24), views, 16)
    assert abs(views.is_noisy.mean() - 0.5) < 0.08
    noisy = noise[torch.from_numpy(views.is_noisy)]
    assert abs(noisy.mean().item() - 0.5) < 0.005
    assert abs(noisy.std().item() - 0.2) < 0.005
    assert (noise[torch.from_numpy(~views.is_noisy)] == 0).all()
    assert len({image.sum().item() for image in noisy}) == len(noisy), "every view has noise of its own"


def test_augment_backward_matches_finite_differences() -> None:
    images = make_images().double().requires_grad_()
    views = draw_augmentation(0, 2, 8, 24)
    weights = torch.rand(8, 3, 16, 16, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((augment(images, views, 16) * weights).sum(), images)
    nudge = torch.zeros_like(images)
    nudge[1, 2, 12, 12] = 1e-3
    with torch.no_grad():
        change = ((augment(images + nudge, views, 16) - augment(images - nudge, views, 16)) * weights).sum()
    torch.testing.assert_close(change / 2e-3, gradient[1, 2, 12, 12], rtol=1e-6, atol=1e-8)

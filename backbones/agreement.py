"""Whether two models are the same function, and have the same gradient, but for rounding."""

import torch
from torch import Tensor, nn


def agree(model: nn.Module, other: nn.Module, example: Tensor, *, coarse: bool = False) -> bool:
    """Say whether two models give the same output, and the same gradient of it.

    Parameters
    ----------
    model, other : nn.Module
        No parameter taking a gradient.
    example : Tensor, shape (images, 3, y, x)
        Normalised images.
    coarse : bool
        Whether sums are rounded to bfloat16, and at other places in the two models.

    Returns
    -------
    bool
        False as well where the first gives what is not finite: nothing can be said then.
    """
    found = []
    for one in (model, other):
        images = example.detach().clone().requires_grad_()
        feature = one(images)
        (gradient,) = torch.autograd.grad(feature.float().square().sum(), images)
        found.append((feature.detach(), gradient))
    (feature, gradient), (other_feature, other_gradient) = found
    if not (feature.isfinite().all() and gradient.isfinite().all()):
        return False
    if coarse:
        # Of eight bits, few are left, and fewest in a gradient.
        return _are_close(feature, other_feature, 0.1) and _are_close(gradient, other_gradient, 0.7)
    largest = float(feature.abs().max())
    same = torch.allclose(feature, other_feature, rtol=1e-3, atol=1e-4 * largest)
    # Rounding moves a value across a kink now and then.
    return same and _are_close(gradient, other_gradient, 0.05)


def _are_close(one: Tensor, other: Tensor, part: float) -> bool:
    """Say whether the two are no further from each other than this part of the length of the first."""
    return bool((one - other).double().norm() <= part * one.double().norm())

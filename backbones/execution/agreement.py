"""Check that two models compute the same function, and the same gradient, up to rounding."""

import torch
from torch import Tensor, nn


def outputs_and_gradients_agree(
    model: nn.Module, other_model: nn.Module, example_images: Tensor, *, allow_bfloat16_rounding: bool = False
) -> bool:
    """Return whether two models give the same output, and the same gradient of it, up to rounding.

    Parameters
    ----------
    model, other_model : nn.Module
        No parameter taking a gradient.
    example_images : Tensor, shape (images, 3, y, x)
        Normalised images.
    allow_bfloat16_rounding : bool
        Whether sums are rounded to bfloat16, at different places in the two models.

    Returns
    -------
    bool
        False as well where the first model's output or gradient is not finite: they cannot be compared then.
    """
    answers = []
    for candidate in (model, other_model):
        images = example_images.detach().clone().requires_grad_()
        features = candidate(images)
        (gradient,) = torch.autograd.grad(features.float().square().sum(), images)
        answers.append((features.detach(), gradient))
    (features, gradient), (other_features, other_gradient) = answers
    if not (features.isfinite().all() and gradient.isfinite().all()):
        return False
    if allow_bfloat16_rounding:
        # Rounding errors add up to several of its eight bits, most of all in a gradient.
        return _are_close_in_norm(features, other_features, 0.1) and _are_close_in_norm(
            gradient, other_gradient, 0.7
        )
    largest = float(features.abs().max())
    same = torch.allclose(features, other_features, rtol=1e-3, atol=1e-4 * largest)
    # Rounding occasionally moves a value across a kink of an activation.
    return same and _are_close_in_norm(gradient, other_gradient, 0.05)


def _are_close_in_norm(tensor: Tensor, other: Tensor, relative_tolerance: float) -> bool:
    """Return whether the distance of two tensors is within a share of the length of the first."""
    return bool((tensor - other).double().norm() <= relative_tolerance * tensor.double().norm())

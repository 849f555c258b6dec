"""The flow between classes, and the losses that match it, as pure functions on tensors.

Shapes: C classes, K images (or sub-class centres) per class, A augmented views, D features.
"""

import torch.nn.functional as F
from torch import Tensor


def compute_other_class_means(class_means: Tensor, divisor: int | None = None) -> Tensor:
    """Return the mean of the means of the other classes, ``(1/(C-1)) * sum_{j != c} mu_j``.

    Parameters
    ----------
    class_means : Tensor, shape (C, D)
        Class means; at least two classes.
    divisor : int, optional
        What the sum is divided by; default: C - 1.

    Returns
    -------
    Tensor, shape (C, D)
    """
    return (class_means.sum(dim=0) - class_means) / (divisor or len(class_means) - 1)


def compute_flow(own_centres: Tensor, class_means: Tensor, divisor: int | None = None) -> Tensor:
    """Return the flow from own centres to the mean of the other classes.

    ``f_{c,k} = (1/(C-1)) * sum_{j != c} mu_j - m_{c,k}`` (arXiv 2602.05391, with the sub-class centres of
    each class in the place of its mean). However many centres a class has, the others count as C-1 classes.

    Parameters
    ----------
    own_centres : Tensor, shape (C, D) or (C, K, D)
        Starting points of the flows: class means, or sub-class centres.
    class_means : Tensor, shape (C, D)
        Class means; at least two classes.
    divisor : int, optional
        What the sum over the other classes is divided by; default: C - 1.

    Returns
    -------
    Tensor
        Of the shape of `own_centres`.
    """
    other_means = compute_other_class_means(class_means, divisor)
    return (other_means if own_centres.ndim == 2 else other_means[:, None]) - own_centres


def compute_image_and_class_centres(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres of synthetic images: of every image over its views, of every class over its images.

    Parameters
    ----------
    features : Tensor, shape (C, K, A, D)

    Returns
    -------
    own : Tensor, shape (C, K, D)
    means : Tensor, shape (C, D)
    """
    own = features.mean(dim=2)
    return own, own.mean(dim=1)


def sfm_loss(features: Tensor, target_flow: Tensor, divisor: int | None = None) -> Tensor:
    """Return ``1 - cos(vec(F_real), vec(F_syn))``: 0 for parallel flows, 2 for opposite ones.

    Parameters
    ----------
    features : Tensor, shape (C, K, A, D)
        Of the synthetic images; differentiable.
    target_flow : Tensor, shape (C, K, D), or (C, D) where K = 1
        The flow of the real data, :func:`compute_flow` of what the store holds.
    divisor : int, optional
        What the synthetic flow divides the sum over the other classes by; default: C - 1.

    Returns
    -------
    Tensor, shape ()
    """
    flow = compute_flow(*compute_image_and_class_centres(features), divisor)
    return 1 - F.cosine_similarity(flow.flatten(), target_flow.flatten(), dim=0)


def decoupled_loss(
    features: Tensor, own_centres: Tensor, class_means: Tensor, own_centres_weight: float
) -> Tensor:
    """Return ``alpha * MSE(own centres) + (1 - alpha) * MSE(other-class centres)``.

    Parameters
    ----------
    features : Tensor, shape (C, K, A, D)
        Of the synthetic images; differentiable.
    own_centres : Tensor, shape (C, K, D)
        Sub-class centres of the real data (the class means where K = 1).
    class_means : Tensor, shape (C, D)
        Class means of the real data.
    own_centres_weight : float
        Weight of the own centres, in [0, 1].

    Returns
    -------
    Tensor, shape ()
    """
    synthetic_own, synthetic_means = compute_image_and_class_centres(features)
    return own_centres_weight * F.mse_loss(synthetic_own, own_centres) + (
        1 - own_centres_weight
    ) * F.mse_loss(compute_other_class_means(synthetic_means), compute_other_class_means(class_means))

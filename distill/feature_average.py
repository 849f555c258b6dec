"""The moving average of features over steps, at which the gradient of a loss is taken.

The features of one step are those of a few random views, and the loss of a step is as noisy as they are.
Their average over steps is closer to the mean features of an image. It costs no pass through the backbone.
"""

from collections.abc import Callable

from torch import Tensor


def update_feature_average(average: Tensor | None, features: Tensor, decay: float) -> Tensor:
    """Return the moving average after a step, ``m <- D m + (1 - D) z``, not bias-corrected.

    Parameters
    ----------
    average : Tensor, shape (C * K, D), or None
        m after the step before; None before the first step, where it is 0.
    features : Tensor, shape (C, K, A, D)
        Features of all views of this step. z is their mean over the views of each image.
    decay : float
        D, in [0, 1).

    Returns
    -------
    Tensor, shape (C * K, D)
    """
    own = (1 - decay) * features.detach().mean(dim=2).flatten(0, 1)
    return own if average is None else decay * average + own


def make_objective_at_feature_average(
    objective: Callable[[Tensor], Tensor], average: Tensor | None, decay: float, step_count: int
) -> Callable[[Tensor], Tensor]:
    """Return an objective that computes loss and gradient at the moving average of the features.

    The gradient with respect to the average, ``m / (1 - D^t)``, is applied to the features of this step.

    Parameters
    ----------
    objective : callable
        From features of shape (C, K, A, D) to a loss, by their mean over views alone.
    average : Tensor, shape (C * K, D), or None
        See :func:`update_feature_average`.
    decay : float
        D, in [0, 1).
    step_count : int
        t, the number of steps that the average covers, this one included.
    """

    def compute_loss_at_average(features: Tensor) -> Tensor:
        own = features.mean(dim=2)
        corrected = update_feature_average(average, features, decay) / (1 - decay**step_count)
        # Adds exact zeros: the value is the average, the derivative that of the step's own features.
        return objective((corrected.view_as(own) + (own - own.detach())).unsqueeze(2))

    return compute_loss_at_average

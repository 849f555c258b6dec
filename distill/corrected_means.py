"""Targets that teach a better head than the class means: real centres, corrected for how heads are trained.

A head that is trained on a few synthetic features is stopped long before it converges, and what it learns
depends on these features alone, not on how real features vary around them. So the class means are not the
best features to train on. The correction finds those that are, near the real ones: it fits the head in a few
differentiable steps of Adam, bounds its error on Gaussian classes in closed form, and minimizes the bound
plus the distance from the real centres. ``docs/objectives.md`` derives it.

Shapes: C classes, K centres per class, D features.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfm.random_streams import make_rng
from sfm.stats_store.class_moments import Float64Array
from sfm.stats_store.eigen import eigendecompose_symmetric

EPOCHS, MAX_BATCH_SIZE, REFERENCE_BATCH_SIZE, LEARNING_RATE = 1000, 100, 256, 1e-3
"""How ``sfm evaluate --mode linear`` trains a head by default: see ``docs/evaluation.md``."""

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8
"""Of Adam, per step of that training."""

MIN_HEAD_STEPS, MAX_HEAD_STEPS = 30, 100
"""Steps of the surrogate head, from 10 centres to 100."""

CEILING_HEAD_STEPS = 300
"""Steps of the head that a ceiling is of: closer to the one that is evaluated than the surrogate."""

MAX_STEPPED_WEIGHTS = 2**22
"""Steps times weights above which the steps of a head are recomputed in the backward pass, to save memory."""

MIN_ITERATIONS, MAX_WORK = 5, 10**12
"""Iterations are cut so that they take `MAX_WORK` multiplications in all, but not below the minimum."""

DRAWN_SAMPLES, MIN_SAMPLES_PER_CLASS = 100_000, 20

CEILING_STREAM = 103
"""Purpose of the random stream that draws samples; no other stage uses this number."""


@dataclass(frozen=True)
class CorrectionOptions:
    """How far targets may move, and how long to look for them.

    Attributes
    ----------
    distance_weight : float
        Weight of the mean squared Mahalanobis distance from the real centres, per feature, against the bound
        of the error. A larger one gives targets that are closer to the real ones.
    shrinkage : float
        Multiple of the mean variance that is added to all variances in the distance.
    max_iterations : int
        Of L-BFGS.
    """

    distance_weight: float = 100.0
    shrinkage: float = 0.01
    max_iterations: int = 60


def correct_centres(
    class_means: Float64Array,
    own_centres: Float64Array,
    within_covariance: Float64Array,
    options: CorrectionOptions | None = None,
) -> Float64Array:
    """Return centres near the real ones on which an early-stopped head is trained better.

    Minimizes ``error(head(M)) + weight * mean_i |M_i - m_i|^2 / D``, with the Mahalanobis norm, the head of
    :func:`fit_early_stopped_head` and the error of :func:`compute_head_error_bound`, by L-BFGS from the real
    centres m. All centres of all classes are corrected together. Nothing is random.

    Parameters
    ----------
    class_means : ndarray of float64, shape (C, D)
        At least two.
    own_centres : ndarray of float64, shape (C, K, D)
        Sub-class centres, or class means.
    within_covariance : ndarray of float64, shape (D, D)
        Covariance of the features within classes; positive somewhere.
    options : CorrectionOptions, optional

    Returns
    -------
    ndarray of float64, shape (C, K, D)
    """
    from scipy.optimize import minimize  # slow to import

    options = options or CorrectionOptions()
    classes, per_class, features = own_centres.shape
    spectrum, vectors = eigendecompose_symmetric(within_covariance)
    variance = np.trace(within_covariance) / features
    # In units of the standard deviation, the distance is Euclidean and the problem well scaled.
    to_features = torch.from_numpy(vectors * np.sqrt(spectrum.clip(0) + options.shrinkage * variance)).T
    real, means, covariance = map(torch.from_numpy, (own_centres, class_means, within_covariance))
    steps = choose_head_step_count(classes * per_class)
    weight = options.distance_weight / (classes * per_class * features)

    def compute_loss_and_gradient(flat: Float64Array) -> tuple[float, Float64Array]:
        moved = torch.from_numpy(flat).view(real.shape).requires_grad_()
        head = fit_early_stopped_head(real + moved @ to_features, steps)
        loss = compute_head_error_bound(head, means, covariance) + weight * moved.square().sum()
        (gradient,) = torch.autograd.grad(loss, moved)
        return loss.item(), gradient.flatten().numpy()

    work = classes * classes * per_class * features * steps
    iterations = min(options.max_iterations, max(MIN_ITERATIONS, MAX_WORK // work))
    found = minimize(
        compute_loss_and_gradient,
        np.zeros(own_centres.size),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations},
    )
    corrected: Float64Array = (real + torch.from_numpy(found.x).view(real.shape) @ to_features).numpy()
    return corrected


def choose_head_step_count(centre_count: int) -> int:
    """Return the number of steps of the surrogate head: with more centres a head moves further."""
    return max(MIN_HEAD_STEPS, min(MAX_HEAD_STEPS, round(MIN_HEAD_STEPS * math.sqrt(centre_count / 10))))


def fit_early_stopped_head(centres: Tensor, step_count: int) -> Tensor:
    """Train a linear head on centres as an evaluation does, in fewer steps that go equally far.

    Full batches instead of batches of 100, a start at zero instead of N(0, 0.01), no bias, and Adam's decay
    rates to the power of the steps that one stands for. Cross-entropy, and a learning rate that falls to zero
    along a cosine, as there.

    Parameters
    ----------
    centres : Tensor, shape (C, K, D)
        K training features of each class; differentiable.
    step_count : int

    Returns
    -------
    Tensor, shape (C, D)
        Weights of the head.
    """
    classes, per_class, features = centres.shape
    rows = centres.flatten(0, 1)
    labels = torch.eye(classes, dtype=rows.dtype).repeat_interleave(per_class, 0)
    count = len(rows)
    batch = min(MAX_BATCH_SIZE, count)
    true_steps = EPOCHS * math.ceil(count / batch)
    steps_in_one = true_steps / step_count
    rate = LEARNING_RATE * batch / REFERENCE_BATCH_SIZE * steps_in_one
    decays = FIRST_DECAY**steps_in_one, SECOND_DECAY**steps_in_one

    def take_steps(
        rows: Tensor, weight: Tensor, first: Tensor, second: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        for step in range(start, stop):
            gradient = ((rows @ weight.T).softmax(1) - labels).T @ rows / count
            first = decays[0] * first + (1 - decays[0]) * gradient
            second = decays[1] * second + (1 - decays[1]) * gradient.square()
            direction = first / (1 - decays[0] ** (step + 1))
            # Epsilon inside the root: the derivative at zero is finite.
            scale = (second / (1 - decays[1] ** (step + 1)) + EPSILON**2).sqrt()
            cosine = (1 + math.cos(math.pi * step / step_count)) / 2
            weight = weight - rate * cosine * direction / scale
        return weight, first, second

    state = (rows.new_zeros(classes, features),) * 3
    is_large = rows.requires_grad and step_count * state[0].numel() > MAX_STEPPED_WEIGHTS
    block = math.isqrt(step_count) if is_large else step_count
    for start in range(0, step_count, block):
        stop = min(start + block, step_count)
        if is_large:
            state = checkpoint(take_steps, rows, *state, start, stop, use_reentrant=False)
        else:
            state = take_steps(rows, *state, start, stop)
    return state[0]


def compute_head_error_bound(head_weight: Tensor, class_means: Tensor, within_covariance: Tensor) -> Tensor:
    """Return an upper bound of a head's error on Gaussian classes with a common covariance.

    A sample of class c is taken for j with the probability that ``(w_j - w_c) . x`` is positive, which is
    normally distributed. The sum over j bounds the probability of any error:
    ``mean_c sum_{j != c} Phi((w_j - w_c) . mu_c / sqrt((w_j - w_c)^T Sigma (w_j - w_c)))``.
    It does not depend on the scale of the head, and for two classes it is the error.

    Parameters
    ----------
    head_weight : Tensor, shape (C, D)
        Differentiable.
    class_means : Tensor, shape (C, D)
    within_covariance : Tensor, shape (D, D)

    Returns
    -------
    Tensor, shape ()
    """
    logits = class_means @ head_weight.T
    products = head_weight @ within_covariance @ head_weight.T
    variances = products.diagonal()
    difference_variance = variances[:, None] + variances - 2 * products
    is_own = torch.eye(len(head_weight), dtype=torch.bool)
    floor = torch.finfo(head_weight.dtype).tiny
    scale = difference_variance.clamp_min(floor).masked_fill(is_own, 1.0).sqrt()
    margins = (logits - logits.diagonal()[:, None]) / scale
    probabilities: Tensor = torch.special.ndtr(margins)
    return probabilities.masked_fill(is_own, 0.0).sum(1).mean()


def estimate_ceiling(
    real_class_means: Float64Array, target_centres: Float64Array, within_covariance: Float64Array, seed: int
) -> float:
    """Return the accuracy of a head trained on some centres, on samples drawn from Gaussian classes.

    The head takes more steps than that of the correction, for which no sample is drawn. Real features are not
    Gaussian: on held-out features expect less, see ``docs/objectives.md``.

    Parameters
    ----------
    real_class_means : ndarray of float64, shape (C, D)
        Of the real features.
    target_centres : ndarray of float64, shape (C, K, D)
        What the head is trained on.
    within_covariance : ndarray of float64, shape (D, D)
    seed : int
        Of the samples.
    """
    head = fit_early_stopped_head(torch.from_numpy(target_centres), CEILING_HEAD_STEPS).numpy()
    return measure_accuracy_on_gaussian_samples(head, real_class_means, within_covariance, seed)


def measure_accuracy_on_gaussian_samples(
    head_weight: Float64Array, class_means: Float64Array, within_covariance: Float64Array, seed: int
) -> float:
    """Return the accuracy of a head on samples drawn from ``N(mu_c, Sigma)``, equally many of each class.

    Logits are drawn instead of features: they are normally distributed too, with fewer dimensions.

    Parameters
    ----------
    head_weight, class_means : ndarray of float64, shape (C, D)
    within_covariance : ndarray of float64, shape (D, D)
    seed : int
    """
    classes = len(head_weight)
    per_class = max(MIN_SAMPLES_PER_CLASS, DRAWN_SAMPLES // classes)
    means = class_means @ head_weight.T
    spectrum, vectors = eigendecompose_symmetric(head_weight @ within_covariance @ head_weight.T)
    root: Float64Array = vectors * np.sqrt(spectrum.clip(0))
    correct = 0
    for index, mean in enumerate(means):
        drawn = make_rng(seed, CEILING_STREAM, index).standard_normal((per_class, classes))
        correct += int(((mean + drawn @ root.T).argmax(1) == index).sum())
    return correct / (classes * per_class)

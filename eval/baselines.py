"""Choose the real images of baselines among the exemplars that an entry keeps."""

import numpy as np
import numpy.typing as npt

from sfm.eval.class_subset import NEAREST_ROLE, RANDOM_ROLE
from sfm.eval.training import RandomStreamPurpose
from sfm.random_streams import make_rng

ExemplarRoles = npt.NDArray[np.uint8]
"""``exemplar/role`` of an entry, shape (class, exemplar): why each exemplar is kept."""

ExemplarIndices = npt.NDArray[np.int64]
"""Indices along the exemplar axis of an entry, shape (..., class, image)."""


def select_exemplars_with_nearest_role(
    exemplar_roles: ExemplarRoles, images_per_class: int
) -> ExemplarIndices:
    """Return the first exemplars of every class that were kept as nearest to its mean.

    Parameters
    ----------
    exemplar_roles : ndarray of uint8, shape (class, exemplar)
        ``exemplar/role`` of an entry; nearest ones are stored in order of distance.
    images_per_class : int
        Per class; every class must have as many, see :func:`count_min_exemplars_per_class`.

    Returns
    -------
    ndarray of int64, shape (class, count)
        Indices along the exemplar axis.
    """
    return np.argsort(exemplar_roles != NEAREST_ROLE, axis=1, kind="stable")[:, :images_per_class]


def draw_random_exemplar_indices(
    exemplar_roles: ExemplarRoles, images_per_class: int, draw_count: int, run_seed: int
) -> ExemplarIndices:
    """Draw random exemplars of every class, several times.

    Each class's random exemplars are shuffled once and dealt out in turn: draws share no image as long as
    there are ``count * draws``, and no draw holds an image twice.

    Parameters
    ----------
    exemplar_roles : ndarray of uint8, shape (class, exemplar)
    images_per_class : int
        Per class and draw; every class must have as many, see :func:`count_min_exemplars_per_class`.
    draw_count : int
    run_seed : int

    Returns
    -------
    ndarray of int64, shape (draw, class, count)
        Indices along the exemplar axis.
    """
    drawn = np.empty((draw_count, len(exemplar_roles), images_per_class), dtype=np.int64)
    for class_index, class_roles in enumerate(exemplar_roles):
        candidates = np.flatnonzero(class_roles == RANDOM_ROLE)
        shuffled = make_rng(run_seed, RandomStreamPurpose.EXEMPLARS, class_index).permutation(candidates)
        drawn[:, class_index] = shuffled[
            np.arange(draw_count * images_per_class).reshape(draw_count, images_per_class) % len(shuffled)
        ]
    return drawn


def count_min_exemplars_per_class(exemplar_roles: ExemplarRoles, counted_role: int) -> int:
    """Return the smallest number of exemplars of a role in any class."""
    return int((exemplar_roles == counted_role).sum(axis=1).min())


def choose_exemplars_nearest_to_distilled(
    is_exemplar_kept: npt.NDArray[np.bool_],
    exemplar_features: npt.NDArray[np.float32],
    distilled_features: npt.NDArray[np.float32],
) -> ExemplarIndices:
    """Return for every distilled image the exemplar of its class whose feature is nearest, of any role.

    No exemplar is chosen twice; the distilled images of a class choose in their order.

    Parameters
    ----------
    is_exemplar_kept : ndarray of bool, shape (class, exemplar)
        False in the places that a class with fewer exemplars leaves empty.
    exemplar_features : ndarray of float32, shape (class, exemplar, feature)
    distilled_features : ndarray of float32, shape (class, image, feature)
        Not more images than the class with fewest exemplars has.

    Returns
    -------
    ndarray of int64, shape (class, image)
        Indices along the exemplar axis.
    """
    distances = np.square(distilled_features[:, :, None] - exemplar_features[:, None]).sum(axis=-1)
    distances[np.broadcast_to(~is_exemplar_kept[:, None], distances.shape)] = np.inf
    chosen = np.empty(distances.shape[:2], dtype=np.int64)
    for image in range(chosen.shape[1]):
        chosen[:, image] = distances[:, image].argmin(axis=1)
        np.put_along_axis(distances, chosen[:, image, None, None], np.inf, axis=2)
    return chosen

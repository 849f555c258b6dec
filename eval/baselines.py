"""Real images that stand beside the synthetic ones, where the store keeps exemplars."""

import numpy as np
import numpy.typing as npt

from sfm.eval.training import Purpose
from sfm.random_streams import make_rng

RANDOM, NEAREST, NONE = 0, 1, 255


def nearest_exemplars(role: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    """Choose the exemplars of every class that are nearest to its mean.

    Parameters
    ----------
    role : ndarray of uint8, shape (class, exemplar)
        ``exemplar/role`` of an entry; nearest ones are stored in order of distance.
    count : int
        Per class; every class must have as many, see :func:`fewest`.

    Returns
    -------
    ndarray of int64, shape (class, count)
        Places along the exemplar axis.
    """
    return np.argsort(role != NEAREST, axis=1, kind="stable")[:, :count]


def random_exemplars(role: npt.NDArray[np.uint8], count: int, draws: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw random exemplars of every class, several times.

    Each class's random exemplars are shuffled once and dealt out in turn: draws share no image as long as
    there are ``count * draws``, and no draw holds an image twice.

    Parameters
    ----------
    role : ndarray of uint8, shape (class, exemplar)
    count : int
        Per class and draw; every class must have as many, see :func:`fewest`.
    draws : int
    seed : int
        Of the run.

    Returns
    -------
    ndarray of int64, shape (draw, class, count)
        Places along the exemplar axis.
    """
    dealt = np.empty((draws, len(role), count), dtype=np.int64)
    for c, roles in enumerate(role):
        deck = make_rng(seed, Purpose.EXEMPLARS, c).permutation(np.flatnonzero(roles == RANDOM))
        dealt[:, c] = deck[np.arange(draws * count).reshape(draws, count) % len(deck)]
    return dealt


def fewest(role: npt.NDArray[np.uint8], wanted: int) -> int:
    """Return how many exemplars of a role the class has that has fewest."""
    return int((role == wanted).sum(axis=1).min())


def neighbours(
    role: npt.NDArray[np.uint8], exemplars: npt.NDArray[np.float32], distilled: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """Choose for every distilled image the exemplar of its class whose feature is nearest.

    Of any role; no exemplar is chosen twice, the distilled images of a class choose in their order.

    Parameters
    ----------
    role : ndarray of uint8, shape (class, exemplar)
        ``exemplar/role`` of an entry.
    exemplars : ndarray of float32, shape (class, exemplar, feature)
    distilled : ndarray of float32, shape (class, image, feature)
        Not more images than the class with fewest exemplars has.

    Returns
    -------
    ndarray of int64, shape (class, image)
        Places along the exemplar axis.
    """
    squared = np.square(distilled[:, :, None] - exemplars[:, None]).sum(axis=-1)
    squared[np.broadcast_to((role == NONE)[:, None], squared.shape)] = np.inf
    chosen = np.empty(squared.shape[:2], dtype=np.int64)
    for image in range(chosen.shape[1]):
        chosen[:, image] = squared[:, image].argmin(axis=1)
        np.put_along_axis(squared, chosen[:, image, None, None], np.inf, axis=2)
    return chosen

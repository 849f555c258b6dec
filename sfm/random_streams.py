"""Random generators that are addressed by seed and position, so that any part of a run can be repeated."""

import numpy as np


def make_rng(seed: int, *counter: int) -> np.random.Generator:
    """Return the random generator of a seed and a position, independent of anything drawn before.

    Parameters
    ----------
    seed : int
        The seed of the run.
    *counter : int
        Position in the run: purpose, step, image. At most three values below 2**64.

    Returns
    -------
    numpy.random.Generator
        A Philox generator: equal arguments give equal numbers, different ones independent numbers.
    """
    if len(counter) > 3:
        raise ValueError(f"at most three counters, got {len(counter)}")
    # As an array: numpy turns a list with a value above 2**63 into floats.
    position = np.array([0, *counter, *([0] * (3 - len(counter)))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=seed, counter=position))

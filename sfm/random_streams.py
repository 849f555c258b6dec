"""Random generators that are addressed by seed and position, so that any part of a run can be repeated."""

import numpy as np


def make_rng(seed: int, *stream_position: int) -> np.random.Generator:
    """Return the random generator of a seed and a position, independent of anything drawn before.

    Parameters
    ----------
    seed : int
        The seed of the run.
    *stream_position : int
        Position in the run: purpose, step, image. At most three values below 2**64.

    Returns
    -------
    numpy.random.Generator
        A Philox generator: equal arguments give equal numbers, different ones independent numbers.
    """
    if len(stream_position) > 3:
        raise ValueError(f"at most three counters, got {len(stream_position)}")
    # As an array: numpy turns a list with a value above 2**63 into floats.
    position = np.array([0, *stream_position, *([0] * (3 - len(stream_position)))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=seed, counter=position))

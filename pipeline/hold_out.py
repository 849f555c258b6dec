"""Hold a share of every class out of a dataset that has no held-out split (``--hold-out``).

Samples are chosen by their digests, so the same images are held out in any order and container.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import Source, open_source


def open_extraction_source(config: ExtractConfig) -> Source:
    """Open the source of an extraction, with its held-out split unless ``--hold-out`` makes one.

    Raises
    ------
    InputError
        If it cannot be opened, has no held-out split, or has one and ``--hold-out`` is given.
    """
    source = open_source(config.source, require_held_out=config.hold_out is None)
    if config.hold_out is not None and source.test.shards:
        raise InputError(
            f"{config.source} has a held-out split: leave out --hold-out to use it, or name only the "
            f"training images (such as folder:PATH/train, or wds:PATH/train-*.tar) to hold some of them out"
        )
    return source


def count_held_out_per_class(
    class_sizes: npt.NDArray[np.int64], held_out_fraction: float
) -> npt.NDArray[np.int64]:
    """Return how many samples of each class to hold out: at least one, and not all; none of a single one."""
    return np.clip(
        np.round(held_out_fraction * class_sizes).astype(np.int64), 1, np.maximum(class_sizes - 1, 0)
    )


def refuse_single_sample_classes(class_ids: Sequence[str], class_sizes: npt.NDArray[np.int64]) -> None:
    """Refuse classes that have a single sample.

    Parameters
    ----------
    class_sizes : ndarray of int64, shape (C,)
        Training images per class.

    Raises
    ------
    InputError
        If there is one; names it.
    """
    single = np.flatnonzero(class_sizes == 1)
    if len(single):
        raise InputError(f"class {class_ids[single[0]]} has one training image; --hold-out needs two or more")


def make_hold_out_keys(sample_digests: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint64]:
    """Return a random number per sample that depends only on its digest and a seed.

    Parameters
    ----------
    sample_digests : ndarray of uint8, shape (n, 32)
    """
    salt = f"hold-out {seed}".encode()
    keys = [hashlib.sha256(salt + digest.tobytes()).digest()[:8] for digest in sample_digests]
    return np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64)


def make_held_out_mask(
    labels: npt.NDArray[np.int32],
    hold_out_keys: npt.NDArray[np.uint64],
    class_ids: Sequence[str],
    held_out_fraction: float,
) -> npt.NDArray[np.bool_]:
    """Mark the samples of every class with the lowest keys: a share of them, at least one and not all.

    Copies of an image have one key and stay together unless a class has nothing else. Copies that are more
    than the share stay in training if there are others to hold out.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
        Negative for samples in no entry.
    hold_out_keys : ndarray of uint64, shape (n,)
        As :func:`make_hold_out_keys` returns them.

    Raises
    ------
    InputError
        If a class has a single sample.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(class_ids))
    refuse_single_sample_classes(class_ids, counts)
    held_out = np.zeros(len(labels), dtype=bool)
    for c, count in enumerate(count_held_out_per_class(counts, held_out_fraction).tolist()):
        own = np.flatnonzero(labels == c)
        held_out[own[make_lowest_keys_mask(hold_out_keys[own], count)]] = True
    return held_out


def make_lowest_keys_mask(keys: npt.NDArray[np.uint64], target_count: int) -> npt.NDArray[np.bool_]:
    """Mark up to a number of samples, lowest keys first; samples of one key stay together.

    Keys of more samples than remain to be marked are skipped. If all are, the key of the fewest samples is
    taken.

    Parameters
    ----------
    keys : ndarray of uint64, shape (n,)
    target_count : int
        Less than n. It is exceeded only where every key has more samples.
    """
    _, key_index, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(sizes) <= 1:
        return np.arange(len(keys)) < target_count
    chosen = np.zeros(len(sizes), dtype=bool)
    remaining = target_count
    for index, size in enumerate(sizes.tolist()):
        if size <= remaining:
            chosen[index] = True
            remaining -= size
        if not remaining:
            break
    if not chosen.any():
        chosen[np.argmin(sizes)] = True
    return chosen[key_index]

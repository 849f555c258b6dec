"""Exemplars: a few real images per class for baselines, stored only on request."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.backbones.card import Preprocessing
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.backbones.rendering import render_image
from sfm.errors import InputError
from sfm.pipeline.fingerprint import digest_sample
from sfm.pipeline.sources import Source
from sfm.pipeline.staged_features import StagedFeatures
from sfm.random_streams import make_rng

RANDOM, NEAREST, NONE = 0, 1, 255


@dataclass(frozen=True)
class ExemplarChoice:
    """The samples that are exemplars.

    Attributes
    ----------
    train_row_indices : ndarray of int64, shape (C, E)
        Indices of training rows; -1 where a class has too few.
    nearest_random_or_none : ndarray of uint8, shape (C, E)
        ``NEAREST`` to the class mean, nearest first, then ``RANDOM``; ``NONE`` where there is no sample.
    """

    train_row_indices: npt.NDArray[np.int64]
    nearest_random_or_none: npt.NDArray[np.uint8]


def choose_nearest_and_random_exemplars(
    train: StagedFeatures,
    labels: npt.NDArray[np.int32],
    class_means: npt.NDArray[np.float64],
    exemplars_per_class: int,
    seed: int,
) -> ExemplarChoice:
    """Choose half the exemplars nearest to each class mean (Euclidean), rounded up, and the rest at random.

    The random ones depend only on seed and data, so they are the same for every backbone.
    """
    classes = len(class_means)
    distance = np.empty(len(labels))
    start = 0
    for rows, block_labels in train:
        deviation = rows - class_means[block_labels]
        distance[start : start + len(rows)] = np.square(deviation).sum(axis=1)
        start += len(rows)
    sample = np.full((classes, exemplars_per_class), -1, dtype=np.int64)
    role = np.full((classes, exemplars_per_class), NONE, dtype=np.uint8)
    nearest_count = (exemplars_per_class + 1) // 2
    for c in range(classes):
        own = np.flatnonzero(labels == c)
        nearest = own[np.argsort(distance[own], kind="stable")][:nearest_count]
        random = make_rng(seed, 3, c).permutation(own)[: exemplars_per_class - nearest_count]
        sample[c, : len(nearest)], role[c, : len(nearest)] = nearest, NEAREST
        random_slots = slice(nearest_count, nearest_count + len(random))
        sample[c, random_slots], role[c, random_slots] = random, RANDOM
    return ExemplarChoice(sample, role)


def read_exemplar_images(
    source: Source,
    sample_positions: npt.NDArray[np.int64],
    expected_digests: npt.NDArray[np.uint8],
    shard_sizes: Sequence[int],
    preprocessing: Preprocessing,
) -> npt.NDArray[np.uint8]:
    """Read chosen training images again, and crop them for a backbone.

    Parameters
    ----------
    sample_positions : ndarray of int64, shape (C, E)
        Positions in the training split; -1 for none.
    expected_digests : ndarray of uint8, shape (C, E, 32)
        Their digests in the pass.
    shard_sizes : sequence of int
        Samples per shard of the training split.

    Returns
    -------
    ndarray of uint8, shape (C, E, size, size, 3)
        Zero where there is no sample.

    Raises
    ------
    InputError
        If an image has changed since it was extracted.
    """
    size = preprocessing.input_size
    images = np.zeros((*sample_positions.shape, size, size, 3), dtype=np.uint8)
    # Read in the source's order, each shard once. An image may be both nearest and random.
    rows, first = np.unique(sample_positions, return_index=True)
    rows, first = rows[rows >= 0], first[rows >= 0]
    for row, index, sample in zip(rows, first, source.train.read(rows, shard_sizes), strict=True):
        if (
            digest_sample(sample.data)
            != expected_digests[np.unravel_index(index, sample_positions.shape)].tobytes()
        ):
            raise InputError(f"{sample.location} changed while it was extracted; run again")
        rendered = render_image(source.decode(sample.data), source.rendering)
        images[sample_positions == row] = resize_and_crop_image(rendered.image, preprocessing)
    return images

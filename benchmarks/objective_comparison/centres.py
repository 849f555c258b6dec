"""Centres that images are matched to, and how alike the flows of two sets of them are."""

import numpy as np

from sfm.distill.objective import ClassCentres, read_target_centres
from sfm.distill.target_estimate import compute_target_flow_cosine
from sfm.stats_store.store import Entry


def read_real_centres(entry: Entry, images_per_class: int) -> ClassCentres:
    """Read the class means of an entry, and its sub-class centres for several images per class."""
    return read_target_centres(entry, images_per_class, np.arange(len(entry.dataset.class_ids)))


def average_own_centres(centres: ClassCentres) -> ClassCentres:
    """Return the same centres for one image per class: the means of the images' own ones."""
    return ClassCentres(
        class_means=centres.class_means, own_centres=centres.own_centres.mean(axis=1, keepdims=True)
    )


def measure_flow_cosine(one: ClassCentres, other: ClassCentres) -> float:
    """Return the cosine of two flows; where one is of one image per class, so is the other."""
    if one.own_centres.shape != other.own_centres.shape:
        one, other = average_own_centres(one), average_own_centres(other)
    return compute_target_flow_cosine(one, other)

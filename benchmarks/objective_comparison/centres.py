"""Centres that images are matched to, and how alike the flows of two sets of them are."""

import numpy as np
import torch
from torch import Tensor

from sfm.distill.flow import compute_flow
from sfm.distill.objective import ClassCentres, read_target_centres
from sfm.stats_store.store import Entry


def read_real_centres(entry: Entry, images_per_class: int) -> ClassCentres:
    """Read the class means of an entry, and its sub-class centres for several images per class."""
    return read_target_centres(entry, images_per_class, np.arange(len(entry.dataset.class_ids)))


def flatten_flow(centres: ClassCentres) -> Tensor:
    """Return the flow of centres as one vector."""
    return compute_flow(
        torch.from_numpy(centres.own_centres), torch.from_numpy(centres.class_means)
    ).flatten()


def average_own_centres(centres: ClassCentres) -> ClassCentres:
    """Return the same centres for one image per class: the means of the images' own ones."""
    return ClassCentres(
        class_means=centres.class_means, own_centres=centres.own_centres.mean(axis=1, keepdims=True)
    )


def compute_flow_cosine(one: ClassCentres, other: ClassCentres) -> float:
    """Return the cosine of two flows; where one is of one image per class, so is the other."""
    if one.own_centres.shape != other.own_centres.shape:
        one, other = average_own_centres(one), average_own_centres(other)
    return torch.cosine_similarity(flatten_flow(one), flatten_flow(other), dim=0).item()

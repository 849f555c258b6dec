"""What the distillation needs of a store's entry: class means and sub-class centres."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.stats_store.schema import get_array_kind, parse_sub_classes
from sfm.stats_store.store import Entry


@dataclass(frozen=True)
class Centres:
    """Where the real data of every class lies in the backbone's feature space.

    Attributes
    ----------
    means : ndarray of float64, shape (C, D)
        Class means.
    own : ndarray of float64, shape (C, K, D)
        What each of the K images of a class stands for: sub-class centres, or the class mean where K = 1.
    """

    means: npt.NDArray[np.float64]
    own: npt.NDArray[np.float64]


def read_centres(entry: Entry, ipc: int, chosen: npt.NDArray[np.int64], apart: bool = True) -> Centres:
    """Read the centres that `ipc` images per class are matched to.

    A class with fewer samples than centres has rows without a sample; its images get the class mean there.

    Parameters
    ----------
    entry : Entry
    ipc : int
        Images per class, K.
    chosen : ndarray of int64, shape (C,)
        Which of the entry's classes; the flow is that among them.
    apart : bool
        Whether every image of a class has a sub-class centre of its own, or all have the class mean.

    Raises
    ------
    InputError
        If the entry has fewer than two classes, or no centres for `ipc`.
    DamageError
        If an array is damaged, or its values cannot be.
    """
    if len(chosen) < 2:
        raise InputError(f"{entry.dataset.name} has {len(chosen)} class: a flow needs at least two classes")
    means = entry.read_array("train/mean").astype(np.float64)[chosen]
    if ipc == 1 or not apart:
        return Centres(means, means[:, None].repeat(ipc, axis=1))
    name = f"train/centre_{ipc}"
    if name not in entry:
        held = sorted(
            k
            for n in entry.list_arrays()
            if get_array_kind(n) == "train/centre" and (k := parse_sub_classes(n))
        )
        raise InputError(
            f"no {ipc} sub-class centres in the entry of {entry.dataset.name}: choose --ipc from "
            f"{', '.join(map(str, [1, *held]))}, or extract with --sub-classes {ipc}"
        )
    sampled = entry.read_array(f"train/centre_count_{ipc}")[chosen] > 0
    own = np.where(sampled[:, :, None], entry.read_array(name).astype(np.float64)[chosen], means[:, None])
    return Centres(means, own)

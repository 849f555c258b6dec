"""The loss of a run, and the statistics it needs of a store's entry: class means and sub-class centres."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from sfm.distill.config import CentreChoice, DistillConfig
from sfm.distill.corrected_means import correct_centres
from sfm.distill.flow import compute_flow, decoupled_loss, sfm_loss
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import Objective
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.stats_store.class_moments import Float64Array
from sfm.stats_store.schema import parse_sub_class_count, strip_sub_class_suffix
from sfm.stats_store.store import Entry

WITHIN_SCATTER = "train/within_scatter"


@dataclass(frozen=True)
class ClassCentres:
    """Centres of the real features of every class.

    Attributes
    ----------
    class_means : ndarray of float64, shape (C, D)
        Class means.
    own_centres : ndarray of float64, shape (C, K, D)
        What is matched in a class: K sub-class centres, the class mean K times, or once for all its images.
    """

    class_means: npt.NDArray[np.float64]
    own_centres: npt.NDArray[np.float64]


def read_target_centres(
    entry: Entry,
    centres_per_class: int,
    class_indices: npt.NDArray[np.int64],
    use_sub_classes: bool = True,
) -> ClassCentres:
    """Read a number of target centres per class.

    A class with fewer samples than centres has centres without a sample; the class mean replaces them.

    Parameters
    ----------
    entry : Entry
    centres_per_class : int
        K.
    class_indices : ndarray of int64, shape (C,)
        Indices of classes of the entry; flows are among these only.
    use_sub_classes : bool
        Whether the centres of a class are sub-class centres, or all of them the class mean.

    Raises
    ------
    InputError
        If the entry has fewer than two classes, or not so many sub-class centres.
    DamageError
        If an array is damaged or has impossible values.
    """
    if len(class_indices) < 2:
        raise InputError(
            f"{entry.dataset.name} has {len(class_indices)} class: a flow needs at least two classes"
        )
    means = entry.read_array("train/mean").astype(np.float64)[class_indices]
    if centres_per_class == 1 or not use_sub_classes:
        return ClassCentres(means, means[:, None].repeat(centres_per_class, axis=1))
    name = f"train/centre_{centres_per_class}"
    if name not in entry:
        counts = sorted(
            k
            for n in entry.list_array_names()
            if strip_sub_class_suffix(n) == "train/centre" and (k := parse_sub_class_count(n))
        )
        raise InputError(
            f"no {centres_per_class} sub-class centres in the entry of {entry.dataset.name}: choose --ipc "
            f"from {', '.join(map(str, [1, *counts]))}, or extract with --sub-classes {centres_per_class}"
        )
    has_samples = entry.read_array(f"train/centre_count_{centres_per_class}")[class_indices] > 0
    centres = entry.read_array(name).astype(np.float64)[class_indices]
    return ClassCentres(means, np.where(has_samples[:, :, None], centres, means[:, None]))


def read_within_covariance(entry: Entry) -> Float64Array | None:
    """Read the covariance of an entry's features within classes, pooled over all classes, shape (D, D).

    Returns
    -------
    ndarray or None
        None if the entry does not hold it, or features do not vary within classes.

    Raises
    ------
    DamageError
        If an array is damaged or has impossible values.
    """
    if WITHIN_SCATTER not in entry:
        return None
    counts = entry.read_array("train/count")
    degrees_of_freedom = int(counts.sum()) - int((counts > 0).sum())
    scatter = entry.read_array(WITHIN_SCATTER).astype(np.float64)
    return scatter / degrees_of_freedom if degrees_of_freedom > 0 and np.trace(scatter) > 0 else None


def compute_corrected_targets(entry: Entry, centres: ClassCentres) -> ClassCentres:
    """Return centres on which a head is trained better, see :func:`correct_centres`; no option shapes them.

    Raises
    ------
    InputError
        If the entry has no covariance within classes.
    DamageError
        If an array is damaged or has impossible values.
    """
    covariance = read_within_covariance(entry)
    if covariance is None:
        raise InputError(
            f"the entry of {entry.dataset.name} through {entry.summary.backbone} has no scatter within "
            f"classes ({WITHIN_SCATTER}), which --objective sfm-corrected needs: extract it again, or choose "
            "--objective sfm"
        )
    own = correct_centres(centres.class_means, centres.own_centres, covariance)
    return ClassCentres(centres.class_means + (own - centres.own_centres).mean(axis=1), own)


TargetFunction = Callable[[Entry, ClassCentres], ClassCentres]
"""From an entry and the centres of some of its classes to centres of equal shapes to match."""


@dataclass(frozen=True)
class ObjectiveKind:
    """What ``--objective`` names.

    Attributes
    ----------
    make_loss : callable
        From target centres (float64, on the CPU), a device and the run's config to the loss of features on
        it. If classes have one centre for several images, it is called with features of one image per class,
        their mean.
    default_feature_decay : float
        ``--feature-decay`` where none is given.
    compute_targets : callable or None
        Computes the target centres from those of an entry, and from its other statistics; None: the entry's
        centres are the targets. Computed targets are written to the run directory.
    """

    make_loss: Callable[[ClassCentres, torch.device, ResolvedDistillConfig], Objective]
    default_feature_decay: float = 0.0
    compute_targets: TargetFunction | None = None


def make_flow_loss(centres: ClassCentres, device: torch.device, config: ResolvedDistillConfig) -> Objective:
    """Return the cosine distance between the flow of features and that of the target centres.

    With averages of classes, the synthetic flow divides the sum over the other classes by the number of
    images less one, C * K - 1, as the published code does. The two agree for one image per class.
    """
    own, means = torch.from_numpy(centres.own_centres), torch.from_numpy(centres.class_means)
    return partial(
        sfm_loss,
        target_flow=compute_flow(own, means).float().to(device),
        divisor=config.image_count - 1 if config.centres == "class-average" else None,
    )


def make_decoupled_loss(
    centres: ClassCentres, device: torch.device, config: ResolvedDistillConfig
) -> Objective:
    """Return the squared distance of features to own and other-class centres."""
    own, means = torch.from_numpy(centres.own_centres), torch.from_numpy(centres.class_means)
    return partial(
        decoupled_loss,
        own_centres=own.float().to(device),
        class_means=means.float().to(device),
        own_centres_weight=config.alpha,
    )


OBJECTIVES: dict[str, ObjectiveKind] = {
    "sfm": ObjectiveKind(make_flow_loss, default_feature_decay=0.9),
    "sfm-decoupled": ObjectiveKind(make_decoupled_loss),
    "sfm-corrected": ObjectiveKind(
        make_flow_loss,
        default_feature_decay=0.9,
        compute_targets=compute_corrected_targets,
    ),
}
"""The objectives by the names that ``DistillConfig.objective`` takes."""


def read_or_compute_targets(
    entries: Sequence[Entry],
    config: DistillConfig,
    class_indices: npt.NDArray[np.int64],
    progress: ProgressCallback = no_progress,
) -> list[ClassCentres]:
    """Return the target centres of every backbone: read from its entry, or computed from it.

    With ``class-average``, a class has one target for the mean of its images; with ``class-mean``, every
    image has the class mean. Sub-class centres of two backbones are centres of different clusterings: no
    image can be matched to the centre of one number in both. So the images are matched to the sub-class
    centres of the first backbone, and the mean of a class's images to the class means of the others, whose
    targets are of one image.

    Raises
    ------
    InputError, DamageError
        See :func:`read_target_centres`.
    """
    targets = []
    compute_targets = OBJECTIVES[config.objective].compute_targets
    for index, entry in enumerate(entries):
        count = count_target_centres_per_class(config.ipc, index, config.centres)
        centres = read_target_centres(entry, count, class_indices, config.centres == "sub-class")
        if compute_targets:
            progress(Progress("targets", index, len(entries), "backbones"))
            centres = compute_targets(entry, centres)
        targets.append(centres)
    if compute_targets:
        progress(Progress("targets", len(entries), len(entries), "backbones"))
    return targets


def count_target_centres_per_class(images_per_class: int, backbone_index: int, choice: CentreChoice) -> int:
    """Return the number of target centres per class of a backbone, see :func:`read_or_compute_targets`."""
    is_mean_of_images_matched = choice == "class-average" or (backbone_index and choice == "sub-class")
    return 1 if is_mean_of_images_matched else images_per_class


def make_objective(config: ResolvedDistillConfig, centres: ClassCentres, device: torch.device) -> Objective:
    """Return the loss of a run as a function of features, with the target centres on the device.

    If classes have one centre for several images, the mean of the images is matched to it.
    """
    loss = OBJECTIVES[config.objective].make_loss(centres, device, config)
    if centres.own_centres.shape[1] == config.ipc:
        return loss
    return lambda features: loss(features.mean(dim=1, keepdim=True))

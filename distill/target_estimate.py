"""What the targets of a run promise: their distance from the real flow, and the accuracy that they allow."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sfm.distill.corrected_means import CorrectionOptions, estimate_ceiling
from sfm.distill.flow import compute_flow
from sfm.distill.objective import (
    ClassCentres,
    count_target_centres_per_class,
    read_target_centres,
    read_within_covariance,
)
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.stats_store.store import Entry


@dataclass(frozen=True)
class TargetCeilings:
    """What targets allow, if images followed them exactly.

    Attributes
    ----------
    real : float
        Accuracy on drawn samples of a head trained on the real centres.
    corrected : float or None
        That of a head trained on the corrected ones, if the objective corrects them.
    """

    real: float
    corrected: float | None


@dataclass(frozen=True)
class TargetEstimate:
    """The targets of one backbone.

    Attributes
    ----------
    cosine : float
        Cosine between the flow of the targets and that of the real centres.
    ceilings : TargetCeilings
    """

    cosine: float
    ceilings: TargetCeilings


def estimate_targets(
    entries: Sequence[Entry], computed_targets: Sequence[ClassCentres], config: ResolvedDistillConfig
) -> list[TargetEstimate | None]:
    """Estimate what the targets of every backbone allow; None where the entry has no scatter within classes.

    Parameters
    ----------
    entries : sequence of Entry
    computed_targets : sequence of ClassCentres
        One for each entry, or none if the entries' own centres are the targets.
    config : ResolvedDistillConfig
        Of the run.
    """
    positions = {class_id: index for index, class_id in enumerate(entries[0].dataset.class_ids)}
    indices = np.array([positions[class_id] for class_id in config.classes], dtype=np.int64)
    estimates: list[TargetEstimate | None] = []
    for index, entry in enumerate(entries):
        count = count_target_centres_per_class(config.ipc, index, config.centres)
        real = read_target_centres(entry, count, indices, config.centres == "sub-class")
        computed = computed_targets[index] if computed_targets else None
        estimates.append(estimate_targets_of_backbone(entry, real, computed, config.seed))
    return estimates


def estimate_targets_of_backbone(
    entry: Entry, real_centres: ClassCentres, computed_centres: ClassCentres | None, seed: int
) -> TargetEstimate | None:
    """Estimate what real centres, and those computed from them, allow; see :func:`estimate_targets`."""
    covariance = read_within_covariance(entry)
    if covariance is None:
        return None
    real_ceiling = estimate_ceiling(real_centres.class_means, real_centres.own_centres, covariance, seed)
    if computed_centres is None:
        return TargetEstimate(1.0, TargetCeilings(real_ceiling, None))
    corrected = estimate_ceiling(real_centres.class_means, computed_centres.own_centres, covariance, seed)
    return TargetEstimate(
        compute_target_flow_cosine(real_centres, computed_centres), TargetCeilings(real_ceiling, corrected)
    )


def compute_target_flow_cosine(first: ClassCentres, second: ClassCentres) -> float:
    """Return the cosine between the flows of two targets of the same shape."""
    first_flow, second_flow = (
        compute_flow(torch.from_numpy(each.own_centres), torch.from_numpy(each.class_means)).flatten()
        for each in (first, second)
    )
    return float(torch.cosine_similarity(first_flow, second_flow, dim=0))


def make_target_record(
    computed_targets: Sequence[ClassCentres], config: ResolvedDistillConfig
) -> dict[str, Any] | None:
    """Return ``targets`` of ``run.json`` without estimates; None if the entries' own targets are matched."""
    if not computed_targets:
        return None
    return {"digest": config.targets, "options": asdict(CorrectionOptions())}

"""What mixed precision does to the flows: measured on a few images that both precisions have seen."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.events import Progress, ProgressCallback
from sfm.pipeline.equipment import cores, equipped, single_threaded
from sfm.pipeline.features import Rules, look
from sfm.pipeline.plan import MOST, spread
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import Task

FAITHFUL = 0.9999
"""Cosine of two flows from which on they are the same for all that is done with them."""

AT_ONCE = 16


def flow_cosines(
    source: Source,
    tasks: Sequence[Task],
    backbones: Sequence[Backbone],
    rules: Rules,
    progress: ProgressCallback,
    threads: int | None = None,
) -> dict[str, float | None]:
    """Return how alike the flows of some images are in the precision of an extraction and in float32.

    Parameters
    ----------
    source : Source
    tasks : sequence of Task
        Of the extraction. Images come from all over it where labels are known, else from its beginning.
    backbones : sequence of Backbone
    rules : Rules
        Of the extraction.
    progress : Listener
    threads : int, optional
        On a CPU; default: one per core.

    Returns
    -------
    dict of str to (float or None)
        The cosine by backbone hash; None where there are not two classes to have flows between.

    Raises
    ------
    InputError
        If a sample cannot be read.
    Unfinished
        If a process that decodes is lost.
    """
    device = backbones[0].device.type
    samples = list(enumerate(spread(source, tasks, MOST)))
    batches = [samples[start : start + AT_ONCE] for start in range(0, len(samples), AT_ONCE)]
    both = [
        replace(rules, views=0, on_error="skip", precision="float32"),
        replace(rules, views=0, on_error="skip"),
    ]
    seen = []
    with (
        single_threaded(),
        tf32_disabled(),
        equipped(source, device, threads or cores()) as equipment,
        ThreadPoolExecutor(equipment.threads) as pool,
    ):
        for done, each in enumerate(both):
            progress(Progress("effect of the precision", done, len(both), "passes"))
            found = pool.map(lambda batch, r=each: look(batch, "test", equipment, backbones, r), batches)
            seen.append(list(found))
    progress(Progress("effect of the precision", len(both), len(both), "passes"))
    kept = [samples[place][1].label for batch in seen[0] for place in batch.kept]
    cosines = {}
    for key in (backbone.card.hash for backbone in backbones):
        one, other = (np.concatenate([batch.features[key] for batch in batches]) for batches in seen)
        cosines[key] = cosine_of_flows(one, other, kept)
    return cosines


def cosine_of_flows(
    one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], labels: Sequence[str]
) -> float | None:
    """Return the cosine between the flows of two sets of features of the same samples.

    Parameters
    ----------
    one, other : ndarray, shape (n, D)
    labels : sequence of str, length n

    Returns
    -------
    float or None
        None if there are fewer than two classes, or a flow is zero.
    """
    names, place = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    if len(names) < 2:
        return None
    share = np.eye(len(names))[place] / np.bincount(place)
    flows = []
    for features in (one, other):
        mean = share.T @ features.astype(np.float64)
        flows.append(((mean.sum(axis=0) - mean) / (len(names) - 1) - mean).ravel())
    length = float(np.linalg.norm(flows[0]) * np.linalg.norm(flows[1]))
    return float(flows[0] @ flows[1]) / length if length else None

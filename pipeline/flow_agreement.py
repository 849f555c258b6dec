"""What mixed precision does to the flows: measured on a few images that both precisions have seen."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.events import Progress, ProgressCallback
from sfm.pipeline.dry_run import MAX_PROBE_IMAGES, read_probe_samples
from sfm.pipeline.features import PassOptions, compute_batch_features
from sfm.pipeline.runtime import count_cores, extraction_runtime, one_torch_thread
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import PartitionTask

MIN_FAITHFUL_COSINE = 0.9999
"""Cosine of two flows from which on they are the same for all that is done with them."""

BATCH_SAMPLES = 16


def measure_flow_cosines(
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones: Sequence[Backbone],
    rules: PassOptions,
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
    samples = list(enumerate(read_probe_samples(source, tasks, MAX_PROBE_IMAGES)))
    batches = [samples[start : start + BATCH_SAMPLES] for start in range(0, len(samples), BATCH_SAMPLES)]
    both = [
        replace(rules, views=0, on_error="skip", precision="float32"),
        replace(rules, views=0, on_error="skip"),
    ]
    seen = []
    with (
        one_torch_thread(),
        tf32_disabled(),
        extraction_runtime(source, device, threads or count_cores()) as equipment,
        ThreadPoolExecutor(equipment.threads) as pool,
    ):
        for done, each in enumerate(both):
            progress(Progress("effect of the precision", done, len(both), "passes"))
            found = pool.map(
                lambda batch, r=each: compute_batch_features(batch, "test", equipment, backbones, r), batches
            )
            seen.append(list(found))
    progress(Progress("effect of the precision", len(both), len(both), "passes"))
    kept = [samples[place][1].label for batch in seen[0] for place in batch.kept]
    cosines = {}
    for key in (backbone.card.hash for backbone in backbones):
        one, other = (np.concatenate([batch.features[key] for batch in batches]) for batches in seen)
        cosines[key] = compute_flow_cosine(one, other, kept)
    return cosines


def compute_flow_cosine(
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

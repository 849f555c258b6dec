"""Agreement of the flows in mixed precision with those in float32, measured on a few images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.events import Progress, ProgressCallback
from sfm.pipeline.batch_features import PassOptions, compute_batch_features
from sfm.pipeline.dry_run import MAX_PROBE_IMAGES, read_probe_samples
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.runtime import count_cores, extraction_runtime, one_torch_thread
from sfm.pipeline.sources import Source

MIN_FAITHFUL_COSINE = 0.9999
"""Minimum cosine of two flows whose difference is negligible."""

BATCH_SAMPLES = 16


def compute_flow_cosines_with_float32(
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones: Sequence[Backbone],
    options: PassOptions,
    progress: ProgressCallback,
    thread_count: int | None = None,
) -> dict[str, float | None]:
    """Return the cosine between the flows in an extraction's precision and in float32, for some images.

    Parameters
    ----------
    source : Source
    tasks : sequence of PartitionTask
        Of the extraction. Images are spread evenly if labels are known; else the first ones are used.
    backbones : sequence of Backbone
    options : PassOptions
        Of the extraction.
    progress : callable
    thread_count : int, optional
        On a CPU; default: one per core.

    Returns
    -------
    dict of str to (float or None)
        The cosine by backbone hash; None where there are fewer than two classes.

    Raises
    ------
    InputError
        If a sample cannot be read.
    IncompleteExtractionError
        If a decoding process is lost.
    """
    device = backbones[0].device.type
    samples = list(enumerate(read_probe_samples(source, tasks, MAX_PROBE_IMAGES)))
    batches = [samples[start : start + BATCH_SAMPLES] for start in range(0, len(samples), BATCH_SAMPLES)]
    options_by_precision = [
        replace(options, views=0, on_error="skip", precision="float32"),
        replace(options, views=0, on_error="skip"),
    ]
    results = []
    with (
        one_torch_thread(),
        tf32_disabled(),
        extraction_runtime(source, device, thread_count or count_cores()) as runtime,
        ThreadPoolExecutor(runtime.max_batches_in_flight) as pool,
    ):
        for done, own_options in enumerate(options_by_precision):
            progress(Progress("effect of the precision", done, len(options_by_precision), "passes"))
            compute = partial(
                compute_batch_features,
                split="test",
                runtime=runtime,
                backbones=backbones,
                options=own_options,
            )
            results.append(list(pool.map(compute, batches)))
    progress(Progress("effect of the precision", len(results), len(results), "passes"))
    labels = [samples[index][1].class_id for batch in results[0] for index in batch.kept_indices_in_task]
    cosines = {}
    for name in (backbone.card.hash for backbone in backbones):
        exact, rounded = (
            np.concatenate([batch.features_by_array_name[name] for batch in batches]) for batches in results
        )
        cosines[name] = compute_flow_cosine(exact, rounded, labels)
    return cosines


def compute_flow_cosine(
    features: npt.NDArray[np.float32], other_features: npt.NDArray[np.float32], labels: Sequence[str]
) -> float | None:
    """Return the cosine between the flows of two sets of features of the same samples.

    Parameters
    ----------
    features, other_features : ndarray, shape (n, D)
    labels : sequence of str, length n

    Returns
    -------
    float or None
        None if there are fewer than two classes, or a flow is zero.
    """
    names, classes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    if len(names) < 2:
        return None
    weights = np.eye(len(names))[classes] / np.bincount(classes)
    flows = []
    for rows in (features, other_features):
        mean = weights.T @ rows.astype(np.float64)
        flows.append(((mean.sum(axis=0) - mean) / (len(names) - 1) - mean).ravel())
    length = float(np.linalg.norm(flows[0]) * np.linalg.norm(flows[1]))
    return float(flows[0] @ flows[1]) / length if length else None

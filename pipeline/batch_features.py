"""Features of one batch of samples: each decoded once, then computed with every backbone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.execution.modes import ExecutionOption
from sfm.backbones.rendering import Rendering
from sfm.errors import InputError
from sfm.pipeline.decoding import DecodingOptions, LocationByIndexByMark, SampleBatch
from sfm.pipeline.runtime import ExtractionRuntime
from sfm.pipeline.task_results import SkippedSample


@dataclass(frozen=True)
class PassOptions:
    """Options of a pass that shape its features.

    Attributes
    ----------
    max_class_samples_per_shard : int or None
        Maximum number of samples of a class to decode per task, if labels are not known.
    on_error : {"fail", "skip"}
    precision : {"float32", "bf16"}
        Of the forward pass; features are stored as float32 in any case.
    views : int
        Augmented views of each training image, besides the image itself.
    seed : int
        Seed of the views.
    rendering : Rendering
        The source's.
    execution : str
        See `sfm.backbones.execution.modes`.
    """

    max_class_samples_per_shard: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    precision: Literal["float32", "bf16"] = "float32"
    views: int = 0
    seed: int = 0
    rendering: Rendering = field(default=Rendering())
    execution: ExecutionOption = "auto"

    def list_feature_array_names(self, backbone_hash: str, split: str) -> list[str]:
        """Return the names of a backbone's staged feature arrays: of the images, then of each view."""
        views = range(self.views if split == "train" else 0)
        return [backbone_hash, *(f"{backbone_hash}-view-{self.seed}-{view}" for view in views)]


@dataclass(frozen=True)
class BatchFeatures:
    """Features of a batch, by all backbones.

    Attributes
    ----------
    kept_indices_in_task : list of int
        Indices in the task of the samples that have features.
    sample_digests : ndarray of uint8, shape (n, 32)
    encoded_bytes_per_sample : list of int
        Encoded bytes of these samples.
    features_by_array_name : dict of str to ndarray of float32, shape (n, D)
        By array name, see `PassOptions`.
    skipped : list of SkippedSample
    thread_seconds_by_stage : dict of str to float
        Time in one thread, by ``"decode"`` and the backbones' specs.
    image_mark_locations : dict of str to dict of int to str
        As in `sfm.pipeline.decoding.DecodedBatch`.
    """

    kept_indices_in_task: list[int]
    sample_digests: npt.NDArray[np.uint8]
    encoded_bytes_per_sample: list[int]
    features_by_array_name: dict[str, npt.NDArray[np.float32]]
    skipped: list[SkippedSample]
    thread_seconds_by_stage: dict[str, float]
    image_mark_locations: LocationByIndexByMark = field(default_factory=dict)


def compute_batch_features(
    batch: SampleBatch,
    split: str,
    runtime: ExtractionRuntime,
    backbones: Sequence[Backbone],
    options: PassOptions,
) -> BatchFeatures:
    """Decode samples, each once, and compute their features with every backbone.

    Parameters
    ----------
    batch : sequence of (int, Sample or SampleFile)
        Samples, each with its index in the task.
    split : str
        Split of the samples; training images may have views.
    runtime : ExtractionRuntime

    Raises
    ------
    InputError
        If a sample cannot be read, cannot be decoded with on_error="fail", or has features that are not
        finite; names it.
    IncompleteExtractionError
        If a decoding process is lost.
    """
    preprocessings = tuple(dict.fromkeys(backbone.card.preprocessing for backbone in backbones))
    views = options.views if split == "train" else 0
    decoding = DecodingOptions(preprocessings, views, options.seed, options.on_error, options.rendering)
    with runtime.decode_batch(batch, decoding) as decoded:
        seconds = {"decode": decoded.thread_seconds}
        features = {}
        for backbone in backbones:
            spec = backbone.card.spec
            for view, name in enumerate(options.list_feature_array_names(backbone.card.hash, split)):
                rows = np.zeros((0, backbone.card.features), dtype=np.float32)
                if decoded.kept_indices_in_task:
                    pixels = decoded.pixels[backbone.card.preprocessing][view]
                    rows, elapsed = runtime.compute_and_time_features(backbone, pixels, options.precision)
                    seconds[spec] = seconds.get(spec, 0.0) + elapsed
                require_finite_features(rows, spec, decoded.kept_locations)
                features[name] = rows
    return BatchFeatures(
        decoded.kept_indices_in_task,
        decoded.sample_digests,
        decoded.encoded_bytes_per_sample,
        features,
        decoded.skipped,
        seconds,
        decoded.image_mark_locations,
    )


def require_finite_features(
    features: npt.NDArray[np.float32], backbone_spec: str, sample_locations: Sequence[str]
) -> None:
    """Raise an error that names the first image whose features, shape (n, D), are not finite.

    Raises
    ------
    InputError
        If there are any.
    """
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(
            f"{backbone_spec} gives features that are not finite for {sample_locations[int(bad[0])]}: check "
            f"the weights of the backbone, or remove the image"
        )

"""Evaluate runs, and images of other programs: joins the evaluation with the reader of images.

``sfm.eval`` cannot open a dataset, and ``sfm.pipeline``, which reads images, knows no evaluation.
"""

from pathlib import Path

from sfm.eval import evaluation
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.result import Evaluation
from sfm.events import ProgressCallback, no_progress
from sfm.foreign_images import ForeignImages


def read_images_if_needed(path: Path, canvas_pixels: int) -> ForeignImages:
    """Read images of another program; the reader is imported here, since runs need none."""
    from sfm.pipeline.foreign_image_reader import read_foreign_images

    return read_foreign_images(path, canvas_pixels)


def evaluate(config: EvaluateConfig, progress: ProgressCallback = no_progress) -> Evaluation:
    """Evaluate a run, or images of another program; see :func:`sfm.eval.evaluation.evaluate_with_reader`."""
    return evaluation.evaluate_with_reader(config, progress, read_images_if_needed)


def evaluate_runs(config: EvaluateRunsConfig, progress: ProgressCallback = no_progress) -> list[Evaluation]:
    """Evaluate several; see :func:`sfm.eval.evaluation.evaluate_runs_with_reader`."""
    return evaluation.evaluate_runs_with_reader(config, progress, read_images_if_needed)

"""``sfm quickstart``: the whole pipeline on embedded real data, with two real backbones."""

from pathlib import Path
from typing import Any

from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, distill, evaluate, extract
from sfm.events import ProgressCallback, no_progress
from sfm.locking import lock_output_folder
from sfm.paths import expand_home

DATASET_NAME = "fashion-mnist-6k"
IMAGE_SIZE = 96
EXEMPLARS = 8


def run_quickstart(
    out_folder: Path, progress: ProgressCallback = no_progress, thread_count: int | None = None
) -> dict[str, Any]:
    """Extract Fashion-MNIST-6k with lite0 and lite1, distil ten images on lite0, evaluate them on both.

    An interrupted quickstart resumes where it stopped.

    Parameters
    ----------
    out_folder : Path
        Folder for the store (``store/``) and the distilled set (``distilled/``).
    progress : callable, optional
    thread_count : int, optional
        CPU threads to compute with.

    Returns
    -------
    dict
        ``store``, ``preview``: paths; ``run``, ``evaluation``: contents of the two JSON files.
    """
    out_folder = expand_home(out_folder)
    with lock_output_folder(out_folder):
        return run_quickstart_in_locked_folder(out_folder, progress, thread_count)


def run_quickstart_in_locked_folder(
    out_folder: Path, progress: ProgressCallback, thread_count: int | None
) -> dict[str, Any]:
    """Run the stages of :func:`run_quickstart` in a folder that is locked."""
    store, run = str(out_folder / "store"), out_folder / "distilled"
    extract(
        ExtractConfig(
            source=f"builtin:{DATASET_NAME}",
            store=store,
            backbone=["lite0", "lite1"],
            image_size=IMAGE_SIZE,
            exemplars=EXEMPLARS,
            threads=thread_count,
        ),
        progress,
    )
    distilled = distill(
        DistillConfig(
            store=store,
            backbone="lite0",
            image_size=IMAGE_SIZE,
            dataset=DATASET_NAME,
            out=run,
            threads=thread_count,
            resume=True,
        ),
        progress,
    )
    evaluation = evaluate(
        EvaluateConfig(run=run, store=store, backbone=["lite0", "lite1"], threads=thread_count), progress
    )
    return {
        "store": store,
        "preview": str(run / "preview.png"),
        "run": distilled.record,
        "evaluation": evaluation.model_dump(mode="json"),
    }

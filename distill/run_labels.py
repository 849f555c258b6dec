"""Add soft labels to the directory of a finished run, from the classifier of all real images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.backbones.soft_labels import compute_average_soft_labels
from sfm.distill.config import DistillConfig
from sfm.distill.distilled_images import (
    make_class_folder_names,
    make_image_file_names,
    read_written_images,
)
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.run_files import write_run_file
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback
from sfm.soft_label_files import LABEL_FILE, SoftLabelHeader, read_soft_labels, serialize_soft_labels
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.store import Entry
from sfm.tensor_files import TensorFileError
from sfm.text import escape_non_utf8_in_json


def require_classifier_for_soft_labels(config: DistillConfig, entry: Entry) -> None:
    """Refuse `--soft-labels` where the entry holds no classifier of all real images.

    Raises
    ------
    InputError
        If it holds none.
    """
    if config.soft_labels and not ("classifier/weight" in entry and "classifier/bias" in entry):
        raise InputError(
            f"--soft-labels needs the classifier of all real images, which the entry of {entry.dataset.name} "
            f"through {entry.backbone.spec} does not hold: extract it again"
        )


def write_soft_labels_and_update_record(
    config: DistillConfig,
    resolved: ResolvedDistillConfig,
    entry: Entry,
    backbone: Backbone,
    record: dict[str, Any],
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Write ``labels.safetensors`` for the images in a finished run's directory, and name it in ``run.json``.

    The images are labelled as their 8-bit files are now. Labels of the same images by the same options stay.

    Parameters
    ----------
    config : DistillConfig
    resolved : ResolvedDistillConfig
    entry : Entry
        It holds the classifier.
    backbone : Backbone
        That of the entry.
    record : dict
        Content of ``run.json``.
    progress : ProgressCallback

    Returns
    -------
    dict
        The new content of ``run.json``.

    Raises
    ------
    InputError
        If an image cannot be read, or the labels cannot be written.
    """
    files = list_written_image_files(config.out, resolved, entry)
    pixels = read_written_images(files, resolved.canvas_pixels)
    header = SoftLabelHeader.model_validate(
        {
            "images": compute_array_digest(pixels),
            "class_ids": json.dumps(resolved.classes),
            "backbone": backbone.card.spec,
            "backbone_hash": backbone.card.hash,
            "entry_digest": entry.summary.entry_digest,
            "views": config.label_views,
            "temperature": config.label_temperature,
            "seed": config.seed,
        }
    )
    path = config.out / LABEL_FILE
    if not holds_labels_with_header(path, header, len(pixels)):
        with limit_cpu_threads(resolved.threads):
            probabilities = compute_classifier_soft_labels(entry, backbone, pixels, header, config, progress)
        write_run_file(path, serialize_soft_labels(probabilities, header))
    options = {name: getattr(config, name) for name in ("soft_labels", "label_views", "label_temperature")}
    labelled: dict[str, Any] = record | {
        "config": record["config"] | options,
        "soft_labels": {
            "views": header.views,
            "temperature": header.temperature,
            "bytes": path.stat().st_size,
            "image_bytes": sum(file.stat().st_size for file in files),
        },
    }
    labelled = escape_non_utf8_in_json(labelled)
    if labelled != record:
        write_run_file(config.out / "run.json", json.dumps(labelled, indent=1).encode())
    return labelled


def list_written_image_files(out: Path, resolved: ResolvedDistillConfig, entry: Entry) -> list[Path]:
    """Return the files of a run's images, those of the first class first."""
    names_by_id = dict(zip(entry.dataset.class_ids, entry.dataset.class_names, strict=True))
    folders = make_class_folder_names(resolved.classes, [names_by_id[id_] for id_ in resolved.classes])
    files = make_image_file_names(resolved.ipc)
    return [out / "images" / folder / file for folder in folders for file in files]


def holds_labels_with_header(path: Path, header: SoftLabelHeader, image_count: int) -> bool:
    """Return whether a file holds labels with this header."""
    try:
        return read_soft_labels(path, image_count, len(header.class_ids)).header == header
    except (FileNotFoundError, TensorFileError):
        return False


def compute_classifier_soft_labels(
    entry: Entry,
    backbone: Backbone,
    pixels: npt.NDArray[np.uint8],
    header: SoftLabelHeader,
    config: DistillConfig,
    progress: ProgressCallback,
) -> npt.NDArray[np.float32]:
    """Compute the labels that an entry's classifier gives to images."""
    indices = [entry.dataset.class_ids.index(class_id) for class_id in header.class_ids]
    return compute_average_soft_labels(
        optimize_for_cpu_inference(backbone, config.execution),
        pixels,
        entry.read_array("classifier/weight")[indices],
        entry.read_array("classifier/bias")[indices],
        views=header.views,
        temperature=header.temperature,
        seed=header.seed,
        on_views=lambda done, total: progress(Progress("soft labels", done, total, "views")),
    )

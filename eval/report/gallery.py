"""The gallery of a report: the images of runs by class, with real images beside them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.eval.distilled_run import format_images_per_class
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.result import is_row_on_distillation_backbone

MAX_GALLERY_CLASSES, MAX_GALLERY_IMAGES_PER_CLASS, MAX_GALLERY_IMAGES = 100, 10, 400
"""Limits of a gallery: classes, images per class, and images in total."""

MAX_TILES = 6
"""Images of a class in one line."""

WEBP_QUALITY = 90
"""At this quality, images look unchanged at a quarter of a PNG's size."""


@dataclass(frozen=True)
class ReportPicture:
    """An image of a report; `title` names it when it is shown enlarged."""

    data_url: str
    alt_text: str
    caption: str
    title: str
    is_real: bool = False


@dataclass(frozen=True)
class ClassPictures:
    """The images of one class."""

    name: str
    pictures: list[ReportPicture]


@dataclass(frozen=True)
class Gallery:
    """The images of all runs of one dataset, by class."""

    dataset_title: str
    class_rows: list[ClassPictures]
    pictures_per_line: int
    has_captions: bool
    notes: list[str]


def make_gallery(runs: Sequence[ReportedRun], dataset_title: str) -> Gallery:
    """Return the gallery of runs of one dataset, with real images if the store has any."""
    first = runs[0].distilled
    class_count = min(MAX_GALLERY_CLASSES, len(first.class_ids))
    per_class = max(1, MAX_GALLERY_IMAGES // (class_count * len(runs)))
    image_counts = [
        min(MAX_GALLERY_IMAGES_PER_CLASS, per_class, max(run.distilled.images_per_class)) for run in runs
    ]
    has_several_runs = len(runs) > 1
    neighbours = [select_neighbour_pixels(run) for run in runs]
    has_neighbours = any(images is not None for images in neighbours)
    class_rows = []
    for class_index in range(class_count):
        pictures = []
        for run, count, real in zip(runs, image_counts, neighbours, strict=True):
            label = run.name if has_several_runs else "distilled"
            pictures += make_distilled_and_neighbour_pictures(run, class_index, count, label, real)
        if not has_neighbours:
            real_picture = make_nearest_to_mean_picture(runs, class_index)
            pictures += [real_picture] if real_picture else []
        class_rows.append(ClassPictures(first.class_names[class_index], pictures))
    has_real = any(picture.is_real for class_row in class_rows for picture in class_row.pictures)
    notes = make_omitted_image_notes(runs, class_count, image_counts)
    if has_neighbours:
        notes.append(
            "“Nearest real”: the stored real image of the class whose feature is nearest to that of the "
            "distilled one at its left. Few are stored, each is used at most once: it may look different."
        )
    elif has_real:
        notes.append("“Real”: the stored real image that is nearest to the mean of its class.")
    tiles = min(MAX_TILES, max(len(class_row.pictures) for class_row in class_rows))
    return Gallery(dataset_title, class_rows, tiles, has_several_runs or has_real, notes)


def make_omitted_image_notes(
    runs: Sequence[ReportedRun], shown_class_count: int, shown_images_per_class_by_run: Sequence[int]
) -> list[str]:
    """Return sentences about the classes and images that a gallery leaves out."""
    notes = []
    all_classes = len(runs[0].distilled.class_ids)
    if shown_class_count < all_classes:
        notes.append(f"The first {shown_class_count} of {all_classes:,} classes.")
    for run, count in zip(runs, shown_images_per_class_by_run, strict=True):
        if count < max(run.distilled.images_per_class):
            run_name = f" of {run.name}" if len(runs) > 1 else ""
            per_class = format_images_per_class(run.distilled.images_per_class)
            notes.append(f"The first {count} of {per_class.replace(' per', ' images per')}{run_name}.")
    return notes


def make_distilled_and_neighbour_pictures(
    run: ReportedRun,
    class_index: int,
    shown_image_count: int,
    run_label: str,
    neighbour_pixels: list[npt.NDArray[np.uint8]] | None,
) -> list[ReportPicture]:
    """Return the first distilled images of a class, each followed by the nearest real one, if known."""
    class_name, counts = run.distilled.class_names[class_index], run.distilled.images_per_class
    first = sum(counts[:class_index])
    pictures = []
    for i in range(min(shown_image_count, counts[class_index])):
        caption = f"{run_label} {i + 1}" if max(counts) > 1 else run_label
        title = f"{class_name}: {caption}"
        source = encode_webp_data_url(run.distilled.pixels[first + i])
        pictures.append(ReportPicture(source, f"Distilled image of {title}", caption, title))
        if neighbour_pixels is not None:
            title = f"{class_name}: the real image nearest to {caption}"
            source = encode_webp_data_url(neighbour_pixels[class_index][i])
            pictures.append(
                ReportPicture(source, f"Real image of {title}", "nearest real", title, is_real=True)
            )
    return pictures


def select_neighbour_pixels(run: ReportedRun) -> list[npt.NDArray[np.uint8]] | None:
    """Return the real image nearest to every distilled one, where an evaluation chose it and it is stored.

    Returns
    -------
    list of ndarray of uint8, shape (image, height, width, 3), or None
        By class.
    """
    if run.source_data is None or run.source_data.exemplar_pixels is None or run.evaluation is None:
        return None
    provenance = run.evaluation.provenance
    rows = [row for row in run.evaluation.rows if row.chosen]
    rows = [row for row in rows if is_row_on_distillation_backbone(row, provenance)] or rows
    if not rows or provenance.images != run.pixel_digest:
        return None
    exemplars = run.source_data.exemplar_pixels
    return [exemplars[class_index, indices] for class_index, indices in enumerate(rows[0].chosen or [])]


def make_nearest_to_mean_picture(runs: Sequence[ReportedRun], class_index: int) -> ReportPicture | None:
    """Return the real image nearest to the mean of a class; None if no run's store keeps one."""
    for run in runs:
        source_data = run.source_data
        if (
            source_data
            and source_data.exemplar_pixels is not None
            and source_data.nearest_exemplar_indices is not None
        ):
            title = f"{run.distilled.class_names[class_index]}: the real image nearest to the class mean"
            pixels = source_data.exemplar_pixels[
                class_index, source_data.nearest_exemplar_indices[class_index]
            ]
            alt = f"Real image of {title}"
            return ReportPicture(encode_webp_data_url(pixels), alt, "real", title, is_real=True)
    return None


def encode_webp_data_url(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels of shape (height, width, 3) as a ``data:`` URL of a WebP image."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", quality=WEBP_QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"

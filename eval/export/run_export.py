"""``sfm export``: a finished run -> a folder that other programs read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfm.errors import InputError
from sfm.eval.distilled_labels import require_soft_labels_of_images
from sfm.eval.distilled_run import ForeignRecord
from sfm.eval.export.classifier_export import export_classifier
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.export_formats import write_imagefolder, write_parquet, write_webdataset
from sfm.eval.export.hub_cards import choose_licence, render_dataset_card
from sfm.eval.output_files import create_folder_atomically
from sfm.eval.report.reported_runs import ReportedRun, read_reported_runs
from sfm.locking import lock_output_path

FORMAT_WRITERS: dict[str, Callable[[Path, ReportedRun], None]] = {
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


@dataclass(frozen=True)
class ExportResult:
    """The outcome of an export.

    Attributes
    ----------
    out : Path
        The folder written.
    file_count : int
        Number of files in it.
    total_bytes : int
        Their size in bytes.
    licence : str
        Licence on the card; "unknown" if neither the command nor the source of the data named one.
    """

    out: Path
    file_count: int
    total_bytes: int
    licence: str = "unknown"


def export(config: ExportConfig) -> ExportResult:
    """Write a distilled dataset, or the classifier it comes with, in a format that others read.

    Images are copied as they are, byte by byte where the format keeps files. Loads no model.

    Parameters
    ----------
    config : ExportConfig

    Returns
    -------
    ExportResult

    Raises
    ------
    InputError
        If the directory is not a finished run, its soft labels are of other images, the folder to write is
        not empty, the store does not hold the run's entry, or no classifier was trained yet; names the
        command that trains one.
    """
    (run,) = read_reported_runs([config.run], [config.store] if config.store else [], config.evaluation)
    if isinstance(run.distilled.record, ForeignRecord):
        raise InputError(
            f"{config.run} holds images of another program ({run.distilled.record.source}): they are not "
            f"exported; share them as their authors do"
        )
    if config.format != "classifier" and run.soft_labels:
        require_soft_labels_of_images(run.soft_labels, run.pixel_digest, config.run, run.distilled.record)
    with lock_output_path(config.out), create_folder_atomically(config.out) as partial:
        if config.format == "classifier":
            export_classifier(partial, run, config)
        else:
            FORMAT_WRITERS[config.format](partial, run)
            (partial / "classes.json").write_text(
                json.dumps(make_class_records(run), indent=1, ensure_ascii=False), encoding="utf-8"
            )
            (partial / "README.md").write_text(
                render_dataset_card(run, config.format, partial, config.licence), encoding="utf-8"
            )
        files = [path for path in partial.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        result = ExportResult(config.out, len(files), size, choose_licence(run, config.licence))
    return result


def make_class_records(run: ReportedRun) -> list[dict[str, object]]:
    """Return index, id and name of a run's classes, in the order of their labels."""
    classes = zip(run.distilled.class_ids, run.distilled.class_names, strict=True)
    return [{"index": index, "class_id": id_, "name": name} for index, (id_, name) in enumerate(classes)]

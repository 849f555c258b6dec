"""``sfm export``: a finished run -> a folder that others can use without this program."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfm.eval.export.cards import dataset_card, licence_name
from sfm.eval.export.classifier import write_classifier
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.formats import write_imagefolder, write_parquet, write_webdataset
from sfm.eval.output_files import write_new_folder
from sfm.eval.report.read import ReportedRun, read_all
from sfm.locking import lock_file

WRITERS: dict[str, Callable[[Path, ReportedRun], None]] = {
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes
    ----------
    out : Path
        The folder.
    files : int
        How many files are in it.
    size : int
        Their size, in bytes.
    licence : str
        What the card says; "unknown" if neither the command nor the data's source named one.
    """

    out: Path
    files: int
    size: int
    licence: str = "unknown"


def export(config: ExportConfig) -> Exported:
    """Write a distilled dataset, or the classifier it comes with, in a format that others read.

    Images are copied as they are, byte by byte where the format keeps files. Loads no model.

    Parameters
    ----------
    config : ExportConfig

    Returns
    -------
    Exported

    Raises
    ------
    InputError
        If the directory is not a finished run, the folder to write is not empty, the store does not know the
        run, or what is asked for was not made yet; says what makes it.
    """
    (run,) = read_all([config.run], [config.store] if config.store else [], config.evaluation)
    with lock_file(config.out), write_new_folder(config.out) as partial:
        if config.format == "classifier":
            write_classifier(partial, run, config)
        else:
            WRITERS[config.format](partial, run)
            (partial / "classes.json").write_text(
                json.dumps(class_list(run), indent=1, ensure_ascii=False), encoding="utf-8"
            )
            (partial / "README.md").write_text(
                dataset_card(run, config.format, partial, config.licence), encoding="utf-8"
            )
        files = [path for path in partial.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        done = Exported(config.out, len(files), size, licence_name(run, config.licence))
    return done


def class_list(run: ReportedRun) -> list[dict[str, object]]:
    """Return the classes of a run in the order of their labels."""
    named = zip(run.run.class_ids, run.run.class_names, strict=True)
    return [{"index": index, "class_id": id_, "name": name} for index, (id_, name) in enumerate(named)]

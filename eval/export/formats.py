"""Distilled images as a folder, as a tar, as a table."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from sfm.errors import InputError
from sfm.eval.report.read import ReportedRun

TAR, TABLE = "train.tar", "data/train-00000-of-00001.parquet"
"""Names below the folder that is written."""


def write_imagefolder(folder: Path, run: ReportedRun) -> None:
    """Copy the images as ``<class>/<i>.png``, as torchvision's ``ImageFolder`` reads them."""
    for file in run.run.files:
        target = folder / file.parent.name / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_webdataset(folder: Path, run: ReportedRun) -> None:
    """Write one tar with a ``.png``, a ``.cls`` (the label) and a ``.json`` (the class) for every image.

    Equal images make equal bytes: nothing in the tar tells when or by whom it was written.
    """
    digits = max(6, len(str(len(run.run.files) - 1)))
    with tarfile.open(folder / TAR, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (file, label) in enumerate(zip(run.run.files, run.run.labels.tolist(), strict=True)):
            about = {
                "label": label,
                "class_id": run.run.class_ids[label],
                "name": run.run.class_names[label],
            }
            parts = {
                "png": file.read_bytes(),
                "cls": str(label).encode(),
                "json": json.dumps(about, ensure_ascii=False).encode(),
            }
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{number:0{digits}d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(folder: Path, run: ReportedRun) -> None:
    """Write one table with the columns image and label, and what the Hugging Face Hub says of them.

    Raises
    ------
    InputError
        If pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            'parquet needs pyarrow, which is not installed: pip install "sfm-distill[parquet]"'
        ) from error
    images = [
        {"bytes": file.read_bytes(), "path": f"{file.parent.name}/{file.name}"} for file in run.run.files
    ]
    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    schema = pa.schema(
        [pa.field("image", image), pa.field("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": table_features(run)}})},
    )
    target = folder / TABLE
    target.parent.mkdir()
    table = pa.Table.from_pydict({"image": images, "label": run.run.labels.tolist()}, schema=schema)
    pq.write_table(table, target)


def table_features(run: ReportedRun) -> dict[str, Any]:
    """Return what the columns of the table are, in the words of the ``datasets`` library."""
    return {
        "image": {"_type": "Image"},
        "label": {"names": distinct_names(run), "_type": "ClassLabel"},
    }


def distinct_names(run: ReportedRun) -> list[str]:
    """Return the classes' display names, those that repeat with their class id."""
    often = Counter(run.run.class_names)
    named = zip(run.run.class_names, run.run.class_ids, strict=True)
    return [name if often[name] == 1 else f"{name} ({id_})" for name, id_ in named]


def folder_names(run: ReportedRun) -> list[str]:
    """Return the classes' folders, in the order of the labels."""
    return list(dict.fromkeys(file.parent.name for file in run.run.files))

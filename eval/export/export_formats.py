"""Write distilled images as an image folder, a WebDataset tar or a Parquet table."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.eval.report.reported_runs import ReportedRun
from sfm.soft_label_files import LABEL_FILE, LABEL_TENSOR, serialize_soft_labels

TAR_FILE, TABLE_FILE = "train.tar", "data/train-00000-of-00001.parquet"
"""Paths inside the exported folder."""


def write_imagefolder(folder: Path, run: ReportedRun) -> None:
    """Copy the images as ``<class>/<i>.png``, as torchvision's ``ImageFolder`` reads them.

    An image folder has no place for soft labels: their file is put beside it, in the order of the images.
    """
    for file in run.distilled.image_files:
        target = folder / file.parent.name / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    labels = run.soft_labels
    if labels:
        (folder / LABEL_FILE).write_bytes(serialize_soft_labels(labels.probabilities, labels.header))


def write_webdataset(folder: Path, run: ReportedRun) -> None:
    """Write one tar with a ``.png``, a ``.cls`` (the label) and a ``.json`` (the class) for every image.

    Soft labels are a ``.soft_label.npy`` each.

    Equal images give equal bytes: the tar records no time and no owner.
    """
    digits = max(6, len(str(len(run.distilled.image_files) - 1)))
    with tarfile.open(folder / TAR_FILE, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (file, label) in enumerate(
            zip(run.distilled.image_files, run.distilled.labels.tolist(), strict=True)
        ):
            metadata = {
                "label": label,
                "class_id": run.distilled.class_ids[label],
                "name": run.distilled.class_names[label],
            }
            members = {
                "png": file.read_bytes(),
                "cls": str(label).encode(),
                "json": json.dumps(metadata, ensure_ascii=False).encode(),
            }
            if run.soft_labels:
                members["soft_label.npy"] = encode_npy(run.soft_labels.probabilities[number])
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{number:0{digits}d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(folder: Path, run: ReportedRun) -> None:
    """Write one table with the columns image and label, and the metadata that the Hugging Face Hub reads.

    Soft labels are a third column, ``soft_label``.

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
        {"bytes": file.read_bytes(), "path": f"{file.parent.name}/{file.name}"}
        for file in run.distilled.image_files
    ]
    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    columns: dict[str, Any] = {"image": images, "label": run.distilled.labels.tolist()}
    fields = [pa.field("image", image), pa.field("label", pa.int64())]
    if run.soft_labels:
        fields.append(pa.field(LABEL_TENSOR, pa.list_(pa.float32())))
        columns[LABEL_TENSOR] = list(run.soft_labels.probabilities)
    schema = pa.schema(
        fields,
        metadata={"huggingface": json.dumps({"info": {"features": make_huggingface_features(run)}})},
    )
    target = folder / TABLE_FILE
    target.parent.mkdir()
    table = pa.Table.from_pydict(columns, schema=schema)
    pq.write_table(table, target)


def make_huggingface_features(run: ReportedRun) -> dict[str, Any]:
    """Return the ``features`` of the table's columns, as the ``datasets`` library names them."""
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": disambiguate_class_names(run), "_type": "ClassLabel"},
    }
    if run.soft_labels:
        features[LABEL_TENSOR] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    return features


def encode_npy(array: npt.NDArray[np.float32]) -> bytes:
    """Return an array as the bytes of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def disambiguate_class_names(run: ReportedRun) -> list[str]:
    """Return the classes' display names; the class id is appended to repeated names."""
    counts = Counter(run.distilled.class_names)
    classes = zip(run.distilled.class_names, run.distilled.class_ids, strict=True)
    return [name if counts[name] == 1 else f"{name} ({id_})" for name, id_ in classes]


def list_exported_class_folders(run: ReportedRun) -> list[str]:
    """Return the names of the classes' folders, in the order of the labels."""
    return list(dict.fromkeys(file.parent.name for file in run.distilled.image_files))

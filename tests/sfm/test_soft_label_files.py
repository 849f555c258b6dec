"""``labels.safetensors`` is not trusted: what is no label of these images is refused before it is used."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sfm.soft_label_files import SoftLabelHeader, read_soft_labels, serialize_soft_labels
from sfm.tensor_files import TensorFileError

HEADER = {
    "images": "a" * 64,
    "class_ids": json.dumps(["x", "猫", "z"]),
    "backbone": "lite0",
    "backbone_hash": "b" * 64,
    "entry_digest": "c" * 64,
    "views": "50",
    "temperature": "2.5",
    "seed": "7",
}
LABELS = np.array([[0.5, 0.25, 0.25], [0, 1, 0]], np.float32)


def write(labels: np.ndarray = LABELS, name: str = "soft_label", **header: str) -> Callable[[Path], object]:
    return lambda path: save_file({name: labels}, path, HEADER | header)


def write_without(name: str) -> Callable[[Path], object]:
    header = {key: value for key, value in HEADER.items() if key != name}
    return lambda path: save_file({"soft_label": LABELS}, path, header)


def write_sparse(path: Path) -> None:
    write()(path)
    os.truncate(path, 2**40)


def test_labels_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    header = SoftLabelHeader.model_validate(HEADER)
    path.write_bytes(serialize_soft_labels(LABELS, header))
    read = read_soft_labels(path, 2, 3)
    assert read.header == header
    assert (header.class_ids, header.views, header.temperature) == (["x", "猫", "z"], 50, 2.5)
    assert (read.probabilities == LABELS).all()
    assert read.file_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write(LABELS[:1]), r"F32 of shape \[1, 3\] as .*soft_label.*, not F32 of shape \[2, 3\]"),
        (write(LABELS.astype(np.float64)), "longer than expected"),
        (write(LABELS.astype(np.float16)), "F16 of shape"),
        (write(name="label"), "nothing|as .*label"),
        (write(LABELS * 2), "no probabilities"),
        (write(LABELS - np.float32([[0.6, -0.6, 0]])), "no probabilities"),
        (write(LABELS * np.float32(np.nan)), "no probabilities"),
        (write(LABELS + np.float32([[np.inf, 0, 0]])), "no probabilities"),
        (write(class_ids=json.dumps(["x"])), "names 1 classes, not 3"),
        (write(class_ids="[" * 100_000), "class_ids"),
        (write(images="../etc"), "images: string should match"),
        (write(views=str(10**9)), "views: input should be less"),
        (write(temperature="nan"), "temperature: input should be"),
        (write(temperature="1e-300"), "temperature: input should be greater"),
        (write(seed=str(2**70)), "seed: input should be less"),
        (write_without("images"), "images: field required"),
        (write_sparse, "longer than expected"),
        (lambda path: path.write_bytes(b""), "cannot read"),
        (lambda path: path.write_bytes(b"\xff" * 100), "longer than expected"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_label_file_of_these_images_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "labels.safetensors"
    damage(path)
    with pytest.raises(TensorFileError, match=message) as caught:
        read_soft_labels(path, 2, 3)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))

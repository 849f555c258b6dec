"""Soft labels of distilled images on disk: the file ``labels.safetensors`` of a run directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from safetensors.numpy import save

from sfm.constrained_types import (
    MAX_LABEL_TEMPERATURE,
    MAX_LABEL_VIEWS,
    MIN_LABEL_TEMPERATURE,
    Digest,
    Name,
    Names,
)
from sfm.tensor_files import TensorFileError, open_safetensors, require_tensor_specs

LABEL_FILE = "labels.safetensors"
LABEL_TENSOR = "soft_label"

MAX_LABEL_FILE_BYTES = 2**31

MAX_SUM_DEVIATION = 1e-3
"""Limit on the deviation of an image's label from a sum of one."""


class SoftLabelHeader(BaseModel):
    """The safetensors header of soft labels; all values are strings.

    Attributes
    ----------
    images : str
        Digest of the pixels of the labelled images.
    class_ids : list of str
        In the order of the labels' second axis.
    backbone, backbone_hash : str
        The backbone whose classifier made the labels.
    entry_digest : str
        The entry of the store that holds this classifier.
    views : int
        Views of every image that its label is averaged over.
    temperature : float
        Divisor of the logits.
    seed : int
        Seed of the views.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    images: Digest
    class_ids: Json[Names]
    backbone: Name
    backbone_hash: Digest
    entry_digest: Digest
    views: Annotated[int, Field(ge=1, le=MAX_LABEL_VIEWS)]
    temperature: Annotated[float, Field(ge=MIN_LABEL_TEMPERATURE, le=MAX_LABEL_TEMPERATURE)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class SoftLabels:
    """Soft labels of the images of a run.

    Attributes
    ----------
    probabilities : ndarray of float32, shape (image, class)
        Every row sums to one.
    header : SoftLabelHeader
    file_bytes : int
        Size of the file.
    """

    probabilities: npt.NDArray[np.float32]
    header: SoftLabelHeader
    file_bytes: int


def serialize_soft_labels(probabilities: npt.NDArray[np.float32], header: SoftLabelHeader) -> bytes:
    """Return soft labels as the bytes of a safetensors file."""
    values: dict[str, Any] = header.model_dump()
    texts = {name: json.dumps(value) if name == "class_ids" else str(value) for name, value in values.items()}
    return save({LABEL_TENSOR: probabilities}, texts)


def read_soft_labels(path: Path, expected_image_count: int, expected_class_count: int) -> SoftLabels:
    """Read soft labels of a known number of images and classes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TensorFileError
        If it is not what ``sfm distill --soft-labels`` writes: other tensors or shapes, no valid header, or
        labels that are no probabilities. Shapes are checked before labels are read.
    """
    max_bytes = min(4 * expected_image_count * expected_class_count, MAX_LABEL_FILE_BYTES)
    with open_safetensors(path, "numpy", max_bytes) as file:
        require_tensor_specs(
            file, {LABEL_TENSOR: ("F32", (expected_image_count, expected_class_count))}, path
        )
        try:
            header = SoftLabelHeader.model_validate(file.metadata() or {})
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise TensorFileError(f"{path} has no valid header: {field}: {first['msg'].lower()}") from error
        probabilities: npt.NDArray[np.float32] = file.get_tensor(LABEL_TENSOR)
    if len(header.class_ids) != expected_class_count:
        raise TensorFileError(f"{path} names {len(header.class_ids)} classes, not {expected_class_count}")
    # NaN fails every comparison.
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (np.all(probabilities >= 0) and np.all(np.abs(sums - 1) <= MAX_SUM_DEVIATION)):
        raise TensorFileError(f"{path} holds labels that are no probabilities: at least 0, with a sum of 1")
    return SoftLabels(probabilities, header, path.stat().st_size)

"""``targets.safetensors``: the target centres that an objective computed, kept in the run directory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from sfm.distill.objective import ClassCentres, count_target_centres_per_class
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.errors import DamageError
from sfm.tensor_files import DtypeAndShapeByTensor, TensorFileError, open_safetensors, require_tensor_specs

TARGET_FILE = "targets.safetensors"

REMEDY = "restore it, or start the run again in another directory"
"""What to do about a damaged file. Targets computed again may have other last bits."""


def encode_targets(targets: Sequence[ClassCentres]) -> bytes:
    """Return the file of the target centres of all backbones; equal targets give equal bytes."""
    arrays = {}
    for index, centres in enumerate(targets):
        arrays[f"{index}/class_means"] = np.ascontiguousarray(centres.class_means)
        arrays[f"{index}/own_centres"] = np.ascontiguousarray(centres.own_centres)
    return safetensors.numpy.save(arrays)


def compute_targets_digest(targets: Sequence[ClassCentres]) -> str:
    """Return the SHA-256 of the file of some targets."""
    return hashlib.sha256(encode_targets(targets)).hexdigest()


def read_target_file(
    path: Path, config: ResolvedDistillConfig, feature_counts: Sequence[int]
) -> list[ClassCentres] | None:
    """Read the targets of a run; None if there is no such file.

    Parameters
    ----------
    path : Path
    config : ResolvedDistillConfig
        Of the run. Its `targets` is the digest of the file.
    feature_counts : sequence of int
        Length of each backbone's features.

    Raises
    ------
    DamageError
        If the file is another one.
    """
    classes, specs = len(config.classes), DtypeAndShapeByTensor()
    for index, features in enumerate(feature_counts):
        own_count = count_target_centres_per_class(config.ipc, index, config.centres)
        specs[f"{index}/class_means"] = ("F64", (classes, features))
        specs[f"{index}/own_centres"] = ("F64", (classes, own_count, features))
    max_bytes = sum(8 * int(np.prod(shape)) for _, shape in specs.values())
    try:
        with open_safetensors(path, "numpy", max_bytes) as opened:
            require_tensor_specs(opened, specs, path)
            arrays = {name: opened.get_tensor(name) for name in specs}
    except FileNotFoundError:
        return None
    except TensorFileError as error:
        raise DamageError(f"{error}: {REMEDY}") from error
    targets = [
        ClassCentres(arrays[f"{index}/class_means"], arrays[f"{index}/own_centres"])
        for index in range(len(feature_counts))
    ]
    if compute_targets_digest(targets) != config.targets:
        raise DamageError(f"{path} is not as the run wrote it: {REMEDY}")
    return targets

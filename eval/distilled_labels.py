"""Read the soft labels of a run, and refuse those of other images, classes or classifiers."""

import shlex
from pathlib import Path

from sfm.config_fields import has_spec_with_weights_file
from sfm.errors import InputError
from sfm.eval.distilled_run import DistilledRun, RunRecord
from sfm.soft_label_files import LABEL_FILE, SoftLabels, read_soft_labels
from sfm.tensor_files import TensorFileError

STORE_PLACEHOLDER = "STORE"
"""Placeholder of a store in a command."""


def read_run_soft_labels(
    run_directory: Path, run: DistilledRun, store_url: str = STORE_PLACEHOLDER
) -> SoftLabels | None:
    """Read the soft labels in a run's directory; None if there are none.

    They may be of images that were edited since, see :func:`require_soft_labels_of_images`.

    Parameters
    ----------
    run_directory : Path
    run : DistilledRun
    store_url : str
        Store that the run was distilled from, for messages.

    Raises
    ------
    InputError
        If the file is not what ``sfm distill --soft-labels`` writes for this run.
    """
    path = run_directory / LABEL_FILE
    try:
        labels = read_soft_labels(path, len(run.pixels), len(run.class_ids))
    except FileNotFoundError:
        return None
    except TensorFileError as error:
        remedy = describe_how_to_add_soft_labels(run_directory, run.record, store_url)
        raise InputError(f"{error}: delete it, or make it again {remedy}") from error
    header, record = labels.header, run.record
    found = header.class_ids, header.entry_digest, header.backbone_hash
    if found != (run.class_ids, record.entry_digest, record.backbone.hash):
        raise InputError(
            f"{path} holds labels of another run, by its classes or its classifier: delete it, or make it "
            f"again {describe_how_to_add_soft_labels(run_directory, record, store_url)}"
        )
    return labels


def require_soft_labels_of_images(
    labels: SoftLabels | None,
    pixel_digest: str,
    run_directory: Path,
    record: RunRecord,
    store_url: str = STORE_PLACEHOLDER,
) -> SoftLabels:
    """Return the soft labels of a run's images; refuse to go on without them.

    Parameters
    ----------
    labels : SoftLabels or None
        From :func:`read_run_soft_labels`.
    pixel_digest : str
        Digest of the images.
    run_directory : Path
    record : RunRecord
        Content of the run's ``run.json``.
    store_url : str
        As of :func:`read_run_soft_labels`.

    Raises
    ------
    InputError
        If there are none, or they are of other images.
    """
    if labels is None:
        raise InputError(
            f"mode soft needs soft labels, and {run_directory} has none: add them "
            f"{describe_how_to_add_soft_labels(run_directory, record, store_url)}"
        )
    if labels.header.images != pixel_digest:
        raise InputError(
            f"{run_directory / LABEL_FILE} is of other images than those in {run_directory / 'images'}: "
            f"delete it, or make it again {describe_how_to_add_soft_labels(run_directory, record, store_url)}"
        )
    return labels


def describe_how_to_add_soft_labels(
    run_directory: Path, record: RunRecord, store_url: str = STORE_PLACEHOLDER
) -> str:
    """Return how to add soft labels to a run: with a command, which needs the run's checkpoint.

    The command names the entry and all input sizes, since the store may hold several by now, and files of
    weights, which a config file may not name.
    """
    if not any((run_directory / "checkpoint").glob("step_*")):
        return f"in a copy of the run with its checkpoint, which {run_directory} lacks"
    words = ["--config", str(run_directory / "run.json"), "--store", store_url, "--out", str(run_directory)]
    words += ["--dataset", f"{record.dataset}@{record.entry_digest[:12]}"]
    for backbone in record.backbones:
        words += ["--image-size", str(backbone.image_size)]
    specs = [backbone.spec for backbone in record.backbones]
    if has_spec_with_weights_file(specs):
        for spec in specs:
            words += ["--backbone", spec]
    return f"with `{shlex.join(['sfm', 'distill', *words, '--resume', '--soft-labels'])}`"

"""Merge entries that are given by name, with the classifier that an extraction would train."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.class_moments import ClassMoments
from sfm.stats_store.dataset_names import find_dataset_name_problem, make_dataset_name
from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
from sfm.stats_store.entry_merge import ClassifierTrainer, MergedClassifier, MergeResult, merge_entries
from sfm.stats_store.entry_selection import select_only_summary
from sfm.stats_store.merge_inputs import SplitFeatures, require_mergeable
from sfm.stats_store.store import Entry, open_or_create_store, open_store


def merge_entries_by_name(
    store_url: str,
    input_names: Sequence[str],
    *,
    union_name: str | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    device: str = "auto",
    replace: bool = False,
    threads: int | None = None,
    progress: ProgressCallback = no_progress,
) -> MergeResult:
    """Publish the entry of the union of disjoint datasets, from the entries of these datasets.

    See :func:`~sfm.stats_store.entry_merge.merge_entries`. If every input stores its training features, the
    classifier is trained on them as at extraction; else it is the linear discriminant of the merged moments.

    Parameters
    ----------
    store_url : str
        URL of the store to publish to; created if it does not exist.
    input_names : sequence of str
        ``STORE#NAME``, ``STORE#NAME@DIGEST`` or ``STORE#NAME@tuning``; without ``STORE#``, in `store_url`.
    union_name : str, optional
        Dataset name of the union; default: the names of the inputs, joined by ``+``.
    backbone, image_size : optional
        Which entry of each input to merge, if it has several.
    device : str
        Where the classifier is trained: ``auto``, ``cpu`` or ``cuda``.
    replace : bool
        Publish the next generation if the same union is published already.
    threads : int, optional
        CPU threads that train the classifier.
    progress : callable, optional

    Raises
    ------
    InputError
        If an input is not found, or the inputs cannot be merged.
    """
    if union_name is not None and (
        not union_name or "#" in union_name or find_dataset_name_problem(union_name)
    ):
        raise InputError(
            f"--name {union_name!r} {find_dataset_name_problem(union_name) or 'must not contain #'}"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device!r} is not one of auto, cpu, cuda")
    entries = [open_named_entry(text, store_url, backbone, image_size) for text in input_names]
    require_mergeable(entries)
    target = open_or_create_store(store_url)
    union_name = union_name or make_dataset_name("+".join(sorted({entry.dataset.name for entry in entries})))
    trainer = make_disk_staging_trainer(device, threads)
    return merge_entries(target, entries, union_name, trainer, replace=replace, progress=progress)


def open_named_entry(
    entry_name: str, default_store_url: str, backbone: str | None, image_size: int | None
) -> Entry:
    """Open the entry that ``STORE#NAME`` names, or ``NAME`` in the default store."""
    url, mark, dataset = entry_name.rpartition("#")
    store = open_store(url if mark else default_store_url)
    summaries = list_visible_and_pinned_summaries(store, dataset)
    return store.open_entry(
        select_only_summary(summaries, dataset=dataset, backbone_spec=backbone, image_size=image_size)
    )


def make_disk_staging_trainer(device: str, threads: int | None) -> ClassifierTrainer:
    """Return a trainer that stages the features on disk, since training reads them hundreds of times."""

    def train_on_disk(features: SplitFeatures, moments: ClassMoments) -> MergedClassifier:
        import torch

        from sfm.backbones.execution.cpu_threads import limit_cpu_threads
        from sfm.pipeline.linear_classifier import train_classifier
        from sfm.pipeline.staged_features import StagedFeatures

        default_device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory(prefix="sfm-merge-") as folder:
            files, labels = [], []
            for number, (block, block_labels) in enumerate(features):
                files.append(Path(folder) / f"{number:06d}.npy")
                np.save(files[-1], block)
                labels.append(block_labels)
            with limit_cpu_threads(threads):
                trained = train_classifier(
                    StagedFeatures(tuple(files), tuple(labels)),
                    moments,
                    torch.device(default_device if device == "auto" else device),
                )
        return MergedClassifier(
            trained.weight,
            trained.bias,
            f"{trained.solver_description}, on the stored training features of all parts",
            trained.l2,
            trained.iterations,
            trained.converged,
        )

    return train_on_disk

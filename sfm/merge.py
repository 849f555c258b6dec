"""Merge entries that are named in words, with the classifier of the offline stage."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.history import known_summaries
from sfm.stats_store.merging import Merged, Rows, Trained, Trainer, merge_entries, require_mergeable
from sfm.stats_store.moments import Moments
from sfm.stats_store.names import name_from, problem_with_name
from sfm.stats_store.select import only
from sfm.stats_store.store import Entry, create_store, open_store


def merge(
    store: str,
    parts: Sequence[str],
    *,
    name: str | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    device: str = "auto",
    replace: bool = False,
    threads: int | None = None,
    progress: ProgressCallback = no_progress,
) -> Merged:
    """Publish the entry of the union of disjoint datasets, from the entries of these datasets.

    :func:`~sfm.stats_store.merging.merge_entries` says how. Where every part stores its training features,
    the classifier is trained on them as at extraction; else it is the linear discriminant of the merged
    moments.

    Parameters
    ----------
    store : str
        URL of the store to publish to; made if need be.
    parts : sequence of str
        ``STORE#NAME``, ``STORE#NAME@DIGEST`` or ``STORE#NAME@tuning``; without ``STORE#``, in `store`.
    name : str, optional
        Of the union; default: the names of the parts, joined by ``+``.
    backbone, image_size : optional
        Which entry of each part, where there are several.
    device : str
        Where the classifier is trained: ``auto``, ``cpu`` or ``cuda``.
    threads : int, optional
        CPU threads that it is trained with.

    Raises
    ------
    InputError
        If a part is not found, or the parts do not go together.
    """
    if name is not None and (not name or "#" in name or problem_with_name(name)):
        raise InputError(f"--name {name!r} {problem_with_name(name) or 'must not contain #'}")
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device!r} is none of auto, cpu, cuda")
    entries = [find(part, store, backbone, image_size) for part in parts]
    require_mergeable(entries)
    target = create_store(store)
    union = name or name_from("+".join(sorted({entry.dataset.name for entry in entries})))
    return merge_entries(target, entries, union, on_disk(device, threads), replace=replace, progress=progress)


def find(part: str, store: str, backbone: str | None, image_size: int | None) -> Entry:
    """Open the entry that a part's words mean."""
    url, mark, dataset = part.rpartition("#")
    place = open_store(url if mark else store)
    known = known_summaries(place, dataset)
    return place.open(only(known, dataset=dataset, backbone=backbone, image_size=image_size))


def on_disk(device: str, threads: int | None) -> Trainer:
    """Return a trainer that keeps the features on disk, since it reads them hundreds of times."""

    def train(rows: Rows, moments: Moments) -> Trained:
        import torch

        from sfm.backbones.execution.cpu_threads import limit_threads
        from sfm.pipeline.linear_classifier import train_classifier
        from sfm.pipeline.staged_features import StagedFeatures

        there = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory(prefix="sfm-merge-") as folder:
            files, labels = [], []
            for number, (features, own) in enumerate(rows):
                files.append(Path(folder) / f"{number:06d}.npy")
                np.save(files[-1], features)
                labels.append(own)
            chosen = torch.device(there if device == "auto" else device)
            with limit_threads(threads):
                found = train_classifier(StagedFeatures(tuple(files), tuple(labels)), moments, chosen)
        solver = f"{found.solver}, on the stored training features of all parts"
        return Trained(found.weight, found.bias, solver, found.l2, found.iterations, found.converged)

    return train

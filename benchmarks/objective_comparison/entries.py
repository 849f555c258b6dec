"""The statistics that arms are distilled from, found in their stores or extracted."""

import numpy as np
import torch
from objective_comparison.arms import EVALUATED_BACKBONES, IMAGE_SIZE, ComparedDataset, DistilledRole
from torch import Tensor

from sfm.api import Entry, ExtractConfig, extract, open_store
from sfm.errors import InputError


def extract_dataset(source: str, store: str, tune_fraction: float, limit: int | None) -> ComparedDataset:
    """Publish the statistics of a dataset, whole and without the tuning samples, unless they are there."""
    result = extract(
        ExtractConfig(
            source=source,
            store=store,
            backbone=list(EVALUATED_BACKBONES),
            image_size=IMAGE_SIZE,
            tune_fraction=tune_fraction,
            limit_per_class=limit,
        )
    )
    summary = result.published[0].summary
    return ComparedDataset(summary.dataset, store, summary.classes)


def open_compared_dataset(store: str, name: str) -> ComparedDataset:
    """Return a dataset whose statistics are in a store already.

    Raises
    ------
    InputError
        If they are not there for every backbone, whole and of role tuning.
    """
    classes = 0
    for spec in EVALUATED_BACKBONES:
        for role in ("full", "tuning"):
            classes = find_entry(ComparedDataset(name, store, 0), role, spec).summary.classes
    return ComparedDataset(name, store, classes)


def find_entry(dataset: ComparedDataset, role: DistilledRole, backbone: str) -> Entry:
    """Open the entry of a dataset, a role and a backbone.

    Raises
    ------
    InputError
        If the store has none.
    """
    store = open_store(dataset.store)
    for summary in store.list_summaries():
        key = (summary.dataset, summary.role, summary.backbone, summary.image_size)
        if key == (dataset.name, role, backbone, IMAGE_SIZE):
            return store.open_entry(summary)
    raise InputError(
        f"no entry of {dataset.name} through {backbone} at {IMAGE_SIZE} px of role {role} in "
        f"{dataset.store}: run `sfm extract` with --tune-fraction first"
    )


def read_held_out_tensors(entry: Entry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return features and labels of the samples that an entry holds out: of the training split for tuning."""
    features = torch.from_numpy(entry.read_array("test/feature").astype(np.float32))
    labels = torch.from_numpy(entry.read_array("test/label").astype(np.int64))
    return features.to(device), labels.to(device)

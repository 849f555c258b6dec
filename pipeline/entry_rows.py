"""Which staged rows make up an entry: the whole dataset, or a training split divided for tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.fingerprint import FingerprintBuilder
from sfm.pipeline.hold_out import make_held_out_mask, make_hold_out_keys
from sfm.pipeline.image_marks import ImageMarkCount, count_samples_by_image_mark
from sfm.pipeline.pass_result import PassResult
from sfm.pipeline.selection import UNUSED_LABEL
from sfm.pipeline.staged_features import StagedFeatures, StagedPartition
from sfm.pipeline.staging import Staging
from sfm.random_streams import make_rng

EntryRole = Literal["full", "tuning"]


@dataclass(frozen=True)
class EntryRows:
    """The rows of one entry.

    Attributes
    ----------
    role : {"full", "tuning"}
    train_partitions, test_partitions : list of StagedPartition
        Partitions that hold the training rows and the held-out rows.
    train_mask, test_mask : ndarray of bool
        Which rows of those partitions are in the entry.
    encoded_train_bytes : int
        Encoded bytes of the training samples.
    fingerprint : str
        Of the samples used, by split.
    mark_counts : dict of str to ImageMarkCount
        Counts of these rows by mark, see `sfm.pipeline.task_results.IMAGE_MARKS`.
    """

    role: EntryRole
    train_partitions: list[StagedPartition]
    test_partitions: list[StagedPartition]
    train_mask: npt.NDArray[np.bool_]
    test_mask: npt.NDArray[np.bool_]
    encoded_train_bytes: int
    fingerprint: str
    mark_counts: dict[str, ImageMarkCount]

    def open_train_features(self, staging: Staging, array_name: str) -> StagedFeatures:
        """Return the training rows of a staged feature array."""
        return staging.open_features(array_name, self.train_partitions).select_rows(self.train_mask)

    def open_test_features(self, staging: Staging, array_name: str) -> StagedFeatures:
        """Return the held-out rows of a staged feature array."""
        return staging.open_features(array_name, self.test_partitions).select_rows(self.test_mask)


def list_entry_roles(config: ExtractConfig) -> list[EntryRole]:
    """Return the roles of the requested entries."""
    return ["full", "tuning"] if config.tune_fraction else ["full"]


def make_entry_options(
    config: ExtractConfig, role: EntryRole, rendering_options: dict[str, Any]
) -> dict[str, Any]:
    """Return all options that determine an entry's arrays; their digest is in the key.

    Parameters
    ----------
    rendering_options : dict
        As :func:`sfm.pipeline.image_marks.make_rendering_entry_options` returns it.
    """
    options: dict[str, Any] = {
        "origin": "extracted",
        "role": role,
        "sub_classes": list(config.sub_classes),
        "exemplars": config.exemplars,
        "keep_train_features": config.keep_train_features,
        "no_held_out": config.no_held_out,
        "limit_per_class": config.limit_per_class,
        "tune_fraction": config.tune_fraction if role == "tuning" else None,
        "seed": config.seed,
        "precision": config.precision,
        "views": 1 + config.views,
        **rendering_options,
    }
    # Options of later versions are recorded where they differ from what was done before: keys stay.
    if config.hold_out is not None:
        options["hold_out"] = config.hold_out
    if config.classifier != "lbfgs":
        options["classifier"] = config.classifier
    return options


def iterate_digests_by_partition(
    staging: Staging, partitions: Sequence[StagedPartition]
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the sample digests of partitions, one array of shape (n, 32) each."""
    for partition in partitions:
        yield staging.read_digests(partition)


def read_row_digests(
    staging: Staging, partitions: Sequence[StagedPartition], row_indices: npt.NDArray[np.intp]
) -> npt.NDArray[np.uint8]:
    """Return the sample digests of some rows of partitions, of any shape (…): shape (…, 32)."""
    found = np.zeros((*row_indices.shape, 32), dtype=np.uint8)
    start = 0
    for digests in iterate_digests_by_partition(staging, partitions):
        here = (row_indices >= start) & (row_indices < start + len(digests))
        found[here] = digests[row_indices[here] - start]
        start += len(digests)
    return found


def select_entry_rows(config: ExtractConfig, result: PassResult, staging: Staging) -> list[EntryRows]:
    """Select the staged rows of each requested entry, and compute their fingerprints."""
    train = [p for p in result.partitions if p.split == "train"]
    test = [p for p in result.partitions if p.split == "test"]
    labels = np.concatenate([p.labels for p in train])
    class_ids = result.selection.class_ids
    sizes = np.concatenate([staging.read_encoded_bytes_per_sample(partition) for partition in train])
    in_use = labels != UNUSED_LABEL
    if config.hold_out is None:
        test_in_use = np.concatenate([p.labels for p in test]) != UNUSED_LABEL
        builder = FingerprintBuilder()
        for partition, digests in zip(
            (*train, *test), iterate_digests_by_partition(staging, (*train, *test)), strict=True
        ):
            rows = partition.labels != UNUSED_LABEL
            builder.add_samples(partition.split, class_ids, partition.labels[rows], digests[rows])
        encoded_train_bytes = int(sizes[in_use].sum())
        marked = count_samples_by_image_mark([(train, in_use), (test, test_in_use)])
        entries = [
            EntryRows(
                "full",
                train,
                test,
                in_use,
                test_in_use,
                encoded_train_bytes,
                builder.compute_fingerprint(),
                marked,
            )
        ]
    else:
        keys = np.concatenate(
            [
                make_hold_out_keys(digests, config.seed)
                for digests in iterate_digests_by_partition(staging, train)
            ]
        )
        held_out = make_held_out_mask(labels, keys, class_ids, config.hold_out)
        in_use = in_use & ~held_out
        entries = [
            make_entry_rows_within_train_split("full", train, in_use, held_out, class_ids, sizes, staging)
        ]
        labels = np.where(held_out, UNUSED_LABEL, labels).astype(np.int32)
    if config.tune_fraction is not None:
        held_out = draw_tuning_held_out_mask(labels, class_ids, config.tune_fraction, config.seed)
        entries.append(
            make_entry_rows_within_train_split(
                "tuning", train, in_use & ~held_out, held_out, class_ids, sizes, staging
            )
        )
    return entries


def make_entry_rows_within_train_split(
    role: EntryRole,
    train_partitions: list[StagedPartition],
    train_mask: npt.NDArray[np.bool_],
    held_out_mask: npt.NDArray[np.bool_],
    class_ids: Sequence[str],
    encoded_bytes_per_sample: npt.NDArray[np.int64],
    staging: Staging,
) -> EntryRows:
    """Return the rows of an entry whose training and held-out rows both come from the training split.

    Parameters
    ----------
    train_mask, held_out_mask : ndarray of bool, shape (n,)
        Which rows are for training, and which are held out.
    encoded_bytes_per_sample : ndarray of int64, shape (n,)
        Encoded bytes of the samples.
    """
    builder, start = FingerprintBuilder(), 0
    for partition, digests in zip(
        train_partitions, iterate_digests_by_partition(staging, train_partitions), strict=True
    ):
        own = slice(start, start + len(partition.labels))
        start = own.stop
        for split, rows in (("train", train_mask[own]), ("test", held_out_mask[own])):
            builder.add_samples(split, class_ids, partition.labels[rows], digests[rows])
    marked = count_samples_by_image_mark([(train_partitions, train_mask | held_out_mask)])
    encoded_train_bytes = int(encoded_bytes_per_sample[train_mask].sum())
    return EntryRows(
        role,
        train_partitions,
        train_partitions,
        train_mask,
        held_out_mask,
        encoded_train_bytes,
        builder.compute_fingerprint(),
        marked,
    )


def draw_tuning_held_out_mask(
    labels: npt.NDArray[np.int32], class_ids: Sequence[str], held_out_fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Mark a random fraction of every class, at least one sample and not all.

    Raises
    ------
    InputError
        If a class has a single sample.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for c, class_id in enumerate(class_ids):
        own = np.flatnonzero(labels == c)
        if len(own) < 2:
            raise InputError(f"class {class_id} has one training image; --tune-fraction needs two or more")
        count = min(max(1, round(held_out_fraction * len(own))), len(own) - 1)
        held_out[make_rng(seed, 4, c).permutation(own)[:count]] = True
    return held_out

"""Which rows make up an entry: the whole dataset, or a training split divided for tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sfm.backbones.views import stream
from sfm.errors import InputError
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.fingerprint import Tally
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import Partition, Staged, Staging

Role = Literal["full", "tuning"]


@dataclass(frozen=True)
class Part:
    """The rows of one entry.

    Attributes
    ----------
    role : {"full", "tuning"}
    train, test : list of Partition
        Where training rows and held-out rows lie.
    train_rows, test_rows : ndarray of bool
        Which rows of those partitions belong.
    fingerprint : str
        Of the samples used, by split.
    """

    role: Role
    train: list[Partition]
    test: list[Partition]
    train_rows: npt.NDArray[np.bool_]
    test_rows: npt.NDArray[np.bool_]
    fingerprint: str

    def staged_train(self, staging: Staging, backbone: str) -> Staged:
        """Return the training features through a backbone, given by its hash."""
        return staging.staged(backbone, self.train).only(self.train_rows)

    def staged_test(self, staging: Staging, backbone: str) -> Staged:
        """Return the held-out features through a backbone, given by its hash."""
        return staging.staged(backbone, self.test).only(self.test_rows)


def roles_of(config: ExtractConfig) -> list[Role]:
    """Return the roles of the entries that are asked for."""
    return ["full", "tuning"] if config.tune_fraction else ["full"]


def options_of(config: ExtractConfig, role: Role) -> dict[str, Any]:
    """Return everything besides backbone and data that shapes an entry's arrays; its digest is in the key."""
    return {
        "origin": "extracted",
        "role": role,
        "sub_classes": list(config.sub_classes),
        "exemplars": config.exemplars,
        "keep_train_features": config.keep_train_features,
        "no_held_out": config.no_held_out,
        "limit_per_class": config.limit_per_class,
        "tune_fraction": config.tune_fraction if role == "tuning" else None,
        "seed": config.seed,
        "precision": "float32",
        "views": 1,
    }


def digests_of(staging: Staging, work: Sequence[Partition]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the sample digests of partitions, one array of shape (n, 32) each."""
    for partition in work:
        yield np.load(staging.file("digests", partition))


def parts_of(
    config: ExtractConfig, source: Source, work: Sequence[Partition], staging: Staging
) -> list[Part]:
    """Decide which staged rows make up each entry that is asked for, and fingerprint them."""
    train = [p for p in work if p.split == "train"]
    test = [p for p in work if p.split == "test"]
    labels = np.concatenate([p.labels for p in train])
    every_test = np.ones(sum(len(p.labels) for p in test), dtype=bool)
    tally = Tally()
    for partition, digests in zip(work, digests_of(staging, work), strict=True):
        tally.add(partition.split, source.class_ids, partition.labels, digests)
    parts = [Part("full", train, test, np.ones(len(labels), dtype=bool), every_test, tally.fingerprint())]
    if config.tune_fraction is not None:
        held = held_out_rows(labels, source.class_ids, config.tune_fraction, config.seed)
        tally, start = Tally(), 0
        for partition, digests in zip(train, digests_of(staging, train), strict=True):
            mask = held[start : start + len(partition.labels)]
            start += len(mask)
            for split, rows in (("train", ~mask), ("test", mask)):
                tally.add(split, source.class_ids, partition.labels[rows], digests[rows])
        parts.append(Part("tuning", train, train, ~held, held, tally.fingerprint()))
    return parts


def held_out_rows(
    labels: npt.NDArray[np.int32], class_ids: Sequence[str], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Mark a random fraction of every class, at least one sample and not all.

    Raises
    ------
    InputError
        If a class has a single sample.
    """
    held = np.zeros(len(labels), dtype=bool)
    for c, class_id in enumerate(class_ids):
        own = np.flatnonzero(labels == c)
        if len(own) < 2:
            raise InputError(f"class {class_id} has one training image; --tune-fraction needs two or more")
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        held[stream(seed, 4, c).permutation(own)[:count]] = True
    return held

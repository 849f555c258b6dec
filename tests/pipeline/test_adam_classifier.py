"""``--classifier adam``: the published solver of the full-data classifier, on augmented views."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import cross_entropy

from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.errors import InputError
from sfm.pipeline.adam_classifier import ADAM_STREAM, iterate_shuffled_batches, train_classifier_with_adam
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.staged_features import StagedFeatures, StagedPartition
from sfm.pipeline.staging import Staging
from sfm.random_streams import make_rng
from sfm.stats_store.entry_selection import select_only_summary
from sfm.stats_store.store import open_store

CPU = torch.device("cpu")
CLASSES, FEATURES, SAMPLES = 5, 12, 300


@pytest.fixture
def views(tmp_path: Path) -> list[StagedFeatures]:
    """Features of three views of the same samples, in two partitions; a part of the rows is not in use."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, SAMPLES + 20).astype(np.int32)
    staging = Staging(tmp_path)
    parts = [
        StagedPartition("train", 0, np.arange(200), labels[:200]),
        StagedPartition("train", 1, np.arange(200, SAMPLES + 20), labels[200:]),
    ]
    in_use = np.arange(SAMPLES + 20) % 16 != 0
    opened = []
    for view in range(3):
        rows = (np.eye(CLASSES, FEATURES)[labels] + rng.standard_normal((len(labels), FEATURES))).astype("f4")
        for part in parts:
            staging.write_array(f"view-{view}", part, rows[part.positions_in_split])
        opened.append(staging.open_features(f"view-{view}", parts).select_rows(in_use))
    return opened


def test_adam_is_that_of_one_torch_layer_for_ten_epochs_of_views(views: list[StagedFeatures]) -> None:
    found = train_classifier_with_adam(views, CLASSES, FEATURES, 3, CPU)

    layer = nn.Linear(FEATURES, CLASSES)
    start = 0.01 * make_rng(3, ADAM_STREAM, 0).standard_normal((CLASSES, FEATURES))
    layer.weight.data, layer.bias.data = torch.from_numpy(start).float(), torch.zeros(CLASSES)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3 * 128 / 256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for epoch in range(10):
        for x, y in iterate_shuffled_batches(
            views[epoch % 3], make_rng(3, ADAM_STREAM, 1 + epoch), 128, 9999
        ):
            optimizer.zero_grad()
            cross_entropy(layer(torch.from_numpy(x)), torch.from_numpy(y).long()).backward()
            optimizer.step()
        scheduler.step()

    np.testing.assert_allclose(found.weight, layer.weight.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(found.bias, layer.bias.detach().numpy(), atol=1e-6)
    assert (found.iterations, found.l2, found.converged) == (30, 0.0, False)
    assert "3 augmented views" in found.solver_description


@pytest.mark.parametrize("max_rows", [9999, 150, 1])
def test_every_epoch_has_every_row_in_use_once(views: list[StagedFeatures], max_rows: int) -> None:
    expected_rows = np.concatenate([rows for rows, _ in views[0]])
    expected_labels = views[0].concatenate_labels()
    orders = []
    for epoch in (0, 1):
        batches = [*iterate_shuffled_batches(views[0], make_rng(0, epoch), 64, max_rows)]
        sizes = [len(labels) for _, labels in batches]
        assert sizes == [64] * (SAMPLES // 64) + [SAMPLES % 64]
        rows, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        own, expected = np.lexsort(rows.T), np.lexsort(expected_rows.T)
        np.testing.assert_array_equal(rows[own], expected_rows[expected])
        np.testing.assert_array_equal(labels[own], expected_labels[expected])
        orders.append(rows)
    assert not np.array_equal(*orders)


def test_adam_is_bit_for_bit_independent_of_the_thread_count(views: list[StagedFeatures]) -> None:
    found = set()
    for threads in (1, 2):
        with limit_cpu_threads(threads):
            trained = train_classifier_with_adam(views, CLASSES, FEATURES, 0, CPU)
        found.add(trained.weight.tobytes() + trained.bias.tobytes())
    assert len(found) == 1


def make_config(store: Path, **options: object) -> ExtractConfig:
    small = {"image_size": 32, "limit_per_class": 8, "sub_classes": (2,)}
    given = {"source": "builtin:fashion-mnist-6k", "store": str(store), "backbone": ["lite0"]}
    return ExtractConfig.model_validate(given | small | options)


def test_an_entry_with_the_other_classifier_stands_beside_the_first(tmp_path: Path) -> None:
    (lbfgs,) = extract(make_config(tmp_path, views=2)).published
    (adam,) = extract(make_config(tmp_path, classifier="adam", views=2)).published
    assert adam.outcome == "published"
    assert adam.summary.fingerprint == lbfgs.summary.fingerprint
    store = open_store(str(tmp_path))
    one, other = (store.open_entry(published.summary) for published in (lbfgs, adam))
    assert "classifier" not in one.extraction.options  # as before there was a choice: keys stay
    assert other.extraction.options["classifier"] == "adam"
    assert other.classifier.solver.startswith("softmax regression, Adam, learning rate 1e-3 * 128 / 256")
    for name in one.list_array_names():
        same = np.array_equal(one.read_array(name), other.read_array(name), equal_nan="centre_2" in name)
        assert same == (not name.startswith("classifier/")), name

    with pytest.raises(InputError, match="several entries fit"):
        select_only_summary(store.list_summaries(), dataset="fashion-mnist-6k")
    (again,) = extract(make_config(tmp_path, classifier="adam", views=2)).published
    assert (again.outcome, again.summary) == ("already there", adam.summary)


def test_adam_draws_a_view_for_every_epoch_unless_told_otherwise() -> None:
    assert make_config(Path("store"), classifier="adam").views == 10
    assert make_config(Path("store"), classifier="adam", views=1).views == 1
    assert make_config(Path("store")).views == 0
    with pytest.raises(ValidationError, match="trains on augmented views alone: give at least 1"):
        make_config(Path("store"), classifier="adam", views=0)

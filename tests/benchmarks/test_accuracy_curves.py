"""LGM and ours are compared on the same data, and time is read off the curves fairly."""

import numpy as np
import pytest
import torch
from comparison.accuracy_curves import average_curves, find_time_to_accuracy
from comparison.snapshots import select_training_rows

from sfm.backbones.build import load_backbone
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import open_source
from sfm.stats_store.store import open_store


@pytest.mark.parametrize("role", ["full", "tuning"])
def test_lgm_uses_the_images_of_our_statistics(fashion_store: str, role: str) -> None:
    lite0 = load_backbone("lite0", image_size=32, device="cpu")
    config = ExtractConfig(
        source="builtin:fashion-mnist-6k",
        store=fashion_store,
        backbone=["lite0"],
        image_size=32,
        limit_per_class=40,
        tune_fraction=0.25,
    )
    source = open_source(config.source)
    rows = select_training_rows(config, source, role)  # type: ignore[arg-type]
    store = open_store(fashion_store)
    (entry,) = (
        store.open_entry(known)
        for known in store.list_summaries()
        if (known.role, known.backbone_hash) == (role, lite0.card.hash)
    )
    images = np.stack(
        [
            resize_and_crop_image(source.decode(s.data), lite0.card.preprocessing)
            for s in source.train.read(rows)
        ]
    )
    assert source.train.labels is not None
    labels = source.train.labels[rows]
    with torch.no_grad():
        features = lite0.features(pixels_to_tensor(images)).double().numpy()
    means = np.stack([features[labels == c].mean(0) for c in range(10)])
    np.testing.assert_allclose(means, entry.read_array("train/mean"), atol=1e-4)


def make_curve(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step": 1.0, "seconds": seconds, "top1": top1} for seconds, top1 in pairs]


def test_curves_are_averaged_point_by_point() -> None:
    mean = average_curves([make_curve((1, 0.2), (3, 0.6)), make_curve((2, 0.4), (5, 0.8))])
    assert [(p["seconds"], p["top1"]) for p in mean] == [
        (1.5, pytest.approx(0.3)),
        (4, pytest.approx(0.7)),
    ]


def test_time_to_accuracy_is_the_first_point_that_reaches_it() -> None:
    assert find_time_to_accuracy(make_curve((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.9)), 0.45) == 2
    assert find_time_to_accuracy(make_curve((1, 0.2), (2, 0.5)), 0.5) == 2
    assert find_time_to_accuracy(make_curve((1, 0.2), (2, 0.5)), 0.6) is None

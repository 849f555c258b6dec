"""Soft labels are the mean over random views of what a linear classifier says, image by image."""

import numpy as np
import pytest
import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.crops import draw_crops
from sfm.backbones.soft_labels import LABEL_VIEW_STREAM, compute_average_soft_labels
from sfm.backbones.views import apply_crops
from sfm.random_streams import make_rng

CLASSES, VIEWS, TEMPERATURE, SEED = 5, 4, 2.5, 3


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=32, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 37, 37, 3), dtype=np.uint8)


def compute(lite0: Backbone, pixels: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    calls: list[tuple[int, int]] = []
    labels = compute_average_soft_labels(
        lite0,
        pixels,
        *make_classifier(lite0),
        views=VIEWS,
        temperature=TEMPERATURE,
        seed=SEED,
        on_views=lambda done, total: calls.append((done, total)),
    )
    return labels, calls


def make_classifier(lite0: Backbone) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(CLASSES, lite0.card.features), scale=0.3)
    return weight.astype(np.float32), rng.normal(size=CLASSES).astype(np.float32)


def test_a_label_is_the_mean_probability_over_the_views_of_its_image(
    lite0: Backbone, pixels: np.ndarray
) -> None:
    weight, bias = make_classifier(lite0)
    labels, _ = compute(lite0, pixels)
    for image in range(3):
        views = torch.from_numpy(pixels[image] / np.float32(255)).permute(2, 0, 1).expand(VIEWS, -1, -1, -1)
        crops = draw_crops(make_rng(SEED, LABEL_VIEW_STREAM, image), VIEWS, 37)
        with torch.no_grad():
            features = lite0.features(apply_crops(views, crops, 32)).double().numpy()
        odds = np.exp((features @ weight.T + bias) / TEMPERATURE)
        expected = (odds / odds.sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(labels[image], expected, atol=1e-5)
    assert labels.max() > 1.5 / CLASSES  # Not flat: the check above can fail.


def test_labels_depend_on_no_other_image_and_on_no_batch(
    lite0: Backbone, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = compute(lite0, pixels)
    assert calls == [(12, 12)]
    monkeypatch.setattr("sfm.backbones.view_batches.CPU_BATCH_PIXELS", 5 * 32**2)
    first, calls = compute(lite0, pixels[:2])
    assert calls == [(5, 8), (8, 8)]
    np.testing.assert_allclose(first, whole[:2], atol=1e-6)

import numpy as np
import pytest
import torch

from sfm.backbones.build import Backbone
from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.crops import Crops, select_crops
from sfm.backbones.views import apply_crops
from sfm.eval.view_features import LabelledImages, compute_view_features, draw_view_crops


@pytest.fixture(scope="session")
def images(real_pixels: np.ndarray) -> LabelledImages:
    return LabelledImages(real_pixels, np.arange(len(real_pixels)))


def select_view(crops: Crops, number: int) -> Crops:
    return select_crops(crops, slice(number, number + 1))


@pytest.mark.parametrize("edge", ["clip", "zero"])
def test_view_features_match_the_backbone_on_cropped_images(
    lite0: Backbone, images: LabelledImages, edge: CropEdge
) -> None:
    crops = draw_view_crops(images, 13, 0, edge)
    assert (np.maximum(crops.height, crops.width).max() > 32) == (edge == "zero")
    features = compute_view_features(lite0, images, crops)
    assert features.shape == (10, 13, 1280)
    for image, view in [(0, 0), (0, 12), (4, 7), (9, 12)]:
        pixels = torch.from_numpy(images.pixels[image].copy()).permute(2, 0, 1)[None] / 255
        expected = lite0.features(apply_crops(pixels, select_view(crops, 13 * image + view), 32))[0]
        torch.testing.assert_close(features[image, view], expected, rtol=1e-3, atol=1e-3)


def test_view_features_are_independent_of_the_batch_size(
    lite0: Backbone, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = draw_view_crops(images, 5, run_seed=0)
    calls: list[tuple[int, int]] = []
    whole = compute_view_features(lite0, images, crops)
    monkeypatch.setattr("sfm.backbones.view_batches.CPU_BATCH_PIXELS", 7 * 32**2)
    parts = compute_view_features(lite0, images, crops, lambda done, total: calls.append((done, total)))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
    assert calls == [(min(7 * n, 50), 50) for n in range(1, 9)]


def test_view_crops_are_independent_of_image_and_view_counts(images: LabelledImages) -> None:
    few = draw_view_crops(LabelledImages(images.pixels[:2], images.labels[:2]), 6, run_seed=2)
    many = draw_view_crops(images, 120, run_seed=2)
    for name in ("top", "left", "height", "width", "flip"):
        expected = getattr(many, name).reshape(10, 120)
        assert np.array_equal(getattr(few, name).reshape(2, 6), expected[:2, :6])
    boxes = np.stack([many.top, many.left, many.height, many.width])
    assert np.unique(boxes, axis=1).shape[1] == 1200

"""`sfm distill --soft-labels` labels the images of its run, at the end or when a finished run is resumed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfm.backbones.build import Backbone
from sfm.backbones.soft_labels import compute_average_soft_labels
from sfm.distill.config import DistillConfig
from sfm.distill.run import distill
from sfm.errors import InputError
from sfm.events import Progress
from sfm.soft_label_files import SoftLabelHeader, read_soft_labels
from sfm.stats_store.digests import compute_array_digest

CLASSES = 4


@pytest.fixture(scope="module")
def labelled_store(
    tmp_path_factory: pytest.TempPathFactory, features: np.ndarray, publish_entry: Callable[..., str]
) -> str:
    """A store whose entry ``patterns`` has a classifier: the nearest class mean, weakened."""
    path, means = tmp_path_factory.mktemp("labelled"), features.mean(1)
    arrays = {
        "train/count": np.full(CLASSES, features.shape[1]),
        "train/mean": means,
        "classifier/weight": (means / 10).astype(np.float32),
        "classifier/bias": (-np.square(means).sum(1) / 20).astype(np.float32),
    }
    publish_entry(path, "patterns", arrays)
    return str(path)


@pytest.fixture
def labelled_config(config: DistillConfig, labelled_store: str) -> DistillConfig:
    update = {"store": labelled_store, "steps": 3, "soft_labels": True, "label_views": 4, "seed": 5}
    return config.model_copy(update=update)


def read_image_pixels(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("images/*/*.png"))])


def read_run_labels(out: Path) -> tuple[SoftLabelHeader, list[list[float]]]:
    labels = read_soft_labels(out / "labels.safetensors", CLASSES, CLASSES)
    return labels.header, labels.probabilities.tolist()


def test_a_run_leaves_the_labels_that_the_classifier_gives_to_its_files(
    labelled_config: DistillConfig, lite0: Backbone, features: np.ndarray
) -> None:
    events: list[Progress] = []
    result = distill(labelled_config.model_copy(update={"label_temperature": 2.0}), events.append)
    out, pixels = labelled_config.out, read_image_pixels(labelled_config.out)
    found = read_soft_labels(out / "labels.safetensors", CLASSES, CLASSES)
    assert found.header.images == compute_array_digest(pixels) == result.record["images"]
    assert found.header.class_ids == result.record["resolved"]["classes"]
    assert found.header.entry_digest == result.record["entry_digest"]
    assert (found.header.views, found.header.temperature, found.header.seed) == (4, 2.0, 5)
    means = features.mean(1).astype(np.float32)
    expected = compute_average_soft_labels(
        lite0,
        pixels,
        means / 10,
        -np.square(means).sum(1) / 20,
        views=4,
        temperature=2.0,
        seed=5,
        on_views=lambda done, total: None,
    )
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    assert result.record["soft_labels"] == {
        "views": 4,
        "temperature": 2.0,
        "bytes": found.file_bytes,
        "image_bytes": sum(path.stat().st_size for path in out.glob("images/*/*.png")),
    }
    assert json.loads((out / "run.json").read_text()) == result.record
    assert events[-1].stage == "soft labels"
    assert events[-1].done == events[-1].total == 16


def test_a_finished_run_gets_the_labels_it_would_have_had_and_keeps_its_images(
    labelled_config: DistillConfig, tmp_path: Path
) -> None:
    distill(labelled_config.model_copy(update={"out": tmp_path / "at-once"}))
    later = distill(labelled_config.model_copy(update={"soft_labels": False}))
    file = labelled_config.out / "labels.safetensors"
    assert not file.exists()
    images = read_image_pixels(labelled_config.out)
    resumed = distill(labelled_config.model_copy(update={"resume": True}))
    at_once = read_run_labels(tmp_path / "at-once")
    assert read_run_labels(labelled_config.out) == at_once
    assert (read_image_pixels(labelled_config.out) == images).all()
    assert resumed.record["config"]["soft_labels"] is True
    changed = {"config", "soft_labels"}
    assert all(resumed.record[name] == value for name, value in later.record.items() if name not in changed)


def test_labels_of_the_same_options_stay_and_others_are_replaced(labelled_config: DistillConfig) -> None:
    distill(labelled_config)
    file, again = labelled_config.out / "labels.safetensors", {"resume": True}
    first, written = read_run_labels(labelled_config.out), file.stat().st_mtime_ns
    distill(labelled_config.model_copy(update=again))
    assert file.stat().st_mtime_ns == written
    distill(labelled_config.model_copy(update=again | {"label_temperature": 4.0}))
    assert read_run_labels(labelled_config.out)[0].temperature == 4
    file.write_bytes(b"damaged")
    distill(labelled_config.model_copy(update=again))
    assert read_run_labels(labelled_config.out) == first
    image = sorted(labelled_config.out.glob("images/*/*.png"))[0]
    Image.new("RGB", (37, 37)).save(image)
    distill(labelled_config.model_copy(update=again))
    edited = compute_array_digest(read_image_pixels(labelled_config.out))
    assert read_run_labels(labelled_config.out)[0].images == edited


def test_an_entry_without_a_classifier_is_refused_before_anything_is_written(config: DistillConfig) -> None:
    with pytest.raises(InputError, match="classifier of all real images, which the entry of patterns"):
        distill(config.model_copy(update={"soft_labels": True}))
    assert not list(config.out.glob("*"))

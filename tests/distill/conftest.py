from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.crops import draw_crops
from sfm.backbones.views import apply_crops
from sfm.distill.config import DistillConfig
from sfm.random_streams import make_rng
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard
from sfm.stats_store.digests import compute_sha256
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import open_or_create_store

SIZE = 32
NAMES = ["T-shirt/top", "sock, left", "Straße", "猫"]


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=SIZE, device="cpu")


def draw_pattern_crops(kind: int) -> torch.Tensor:
    """Eight crops of a picture that is unlike the other kinds': colour, stripes, direction."""
    rng = make_rng(7, kind)
    y, x = np.mgrid[0:64, 0:64] / 64
    waves = np.sin((2 + 3 * kind) * np.pi * (x * np.cos(kind) + y * np.sin(kind)))
    colour = rng.uniform(size=(3, 1, 1))
    whole = torch.from_numpy((colour * (0.6 + 0.4 * waves)).astype(np.float32))
    return apply_crops(whole.expand(8, -1, -1, -1), draw_crops(rng, 8, 64), SIZE).clamp(0, 1)


@pytest.fixture(scope="session")
def features(lite0: Backbone) -> np.ndarray:
    """Features of shape (class, sample, feature)."""
    with torch.no_grad():
        return (
            torch.stack([lite0.features(draw_pattern_crops(kind)) for kind in range(len(NAMES))])
            .double()
            .numpy()
        )


@pytest.fixture(scope="session")
def publish_entry(lite0: Backbone) -> Callable[..., str]:
    """Publish class means and centres, by array name, as the entry `name` of a store.

    The entry may be through another backbone than lite0, and of other images than `name` stands for.
    """

    def publish_arrays(
        store: Path,
        name: str,
        arrays: dict[str, np.ndarray],
        backbone: Backbone | None = None,
        images: str | None = None,
    ) -> str:
        fingerprint = compute_sha256((images or name).encode())
        draft = Draft(open_or_create_store(str(store)))
        for array, values in arrays.items():
            draft.write_array(array, values)
        ids = [f"class{index}" for index in range(len(arrays["train/mean"]))]
        dataset = DatasetCard(
            name=name,
            class_ids=ids,
            class_names=NAMES[: len(ids)],
            train_samples=8 * len(ids),
            test_samples=0,
            fingerprint=fingerprint,
            leaves=[fingerprint],
        )
        extraction = ExtractionCard(
            options={}, role="full", versions={}, device="cpu", threads=1, seconds=0.0, images_per_second=0.0
        )
        classifier = ClassifierCard(
            solver="none", l2=0.0, iterations=0, converged=True, held_out_top1=None, held_out_top5=None
        )
        published = publish_draft(draft, (backbone or lite0).card, dataset, extraction, classifier)
        return published.summary.entry_digest

    return publish_arrays


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory, features: np.ndarray, publish_entry: Callable[..., str]
) -> str:
    """A store with the entry ``patterns``: four classes, 1, 2 and 8 centres; the last fills only one of 2."""
    path = tmp_path_factory.mktemp("store")
    halves = features.reshape(len(NAMES), 2, 4, -1).mean(2).astype(np.float32)
    halves[-1, 1] = np.nan
    counts = np.array([[4, 4]] * (len(NAMES) - 1) + [[4, 0]])
    arrays = {
        "train/count": np.full(len(NAMES), features.shape[1]),
        "train/mean": features.mean(1),
        "train/centre_2": halves,
        "train/centre_count_2": counts,
        "train/centre_8": features.astype(np.float32),
        "train/centre_count_8": np.ones(features.shape[:2], dtype=np.int64),
    }
    publish_entry(path, "patterns", arrays)
    return str(path)


@pytest.fixture
def config(store: str, tmp_path: Path) -> DistillConfig:
    """A run of a few steps; tests change what they are about with ``model_copy(update=...)``."""
    return DistillConfig(
        store=store, backbone="lite0", dataset="patterns", out=tmp_path / "run", steps=12, device="cpu"
    )

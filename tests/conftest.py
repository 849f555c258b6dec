"""What every room's tests share: a small real store, and free loopback of the machine's threads."""

import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig

SIZE = 32

# No test asserts how long something takes: the machine may be busy.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

# Shells have what they start in the background ignore SIGINT, and all its children too; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fashion_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with lite0 and lite1 entries (full and tuning) of 40 + 40 real images per class, at 32 px.

    Shared by all tests: read it, never write to it.
    """
    url = str(tmp_path_factory.mktemp("fashion") / "store")
    extract(
        ExtractConfig(
            source="builtin:fashion-mnist-6k",
            store=url,
            backbone=["lite0", "lite1"],
            image_size=SIZE,
            limit_per_class=40,
            sub_classes=(2, 3),
            exemplars=6,
            tune_fraction=0.25,
        )
    )
    return url


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder dataset of real images: three classes, twelve training and eight held-out PNGs each."""
    from sfm.pipeline.sources import open_source

    source = open_source("builtin:fashion-mnist-6k")
    root = tmp_path / "garments"
    for name, split, count in (("train", source.train, 12), ("test", source.test, 8)):
        for label, class_id in enumerate(("bag", "boot", "trouser")):
            folder = root / name / class_id
            folder.mkdir(parents=True)
            own = np.flatnonzero(split.labels == (8, 9, 1)[label])[:count]
            for number, sample in enumerate(split.read(own)):
                source.decode(sample.data).save(folder / f"{number:03d}.png")
    return root

"""Fixtures that tests of several rooms share."""

import dataclasses
import fcntl
import gc
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

SIZE = 32

# No test asserts how long something takes: the machine may be busy.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

# Shells have what they start in the background ignore SIGINT, and all its children too; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported while tests are collected stays: searching it for garbage takes as long as importing it.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage again, but only among what tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def load_backbones_once() -> Iterator[None]:
    """Load every bundled backbone once for the commands of this process: loading takes a third of most."""
    build = sys.modules.get("sfm.backbones.build")
    if build is None:
        yield
        return
    load_backbone, loaded = build.load_backbone, {}

    def load_once(spec: str, **options: Any) -> Any:
        if spec not in ("lite0", "lite1", "lite2"):
            return load_backbone(spec, **options)
        key = spec, *sorted((name, value) for name, value in options.items() if name != "progress")
        if key not in loaded:
            loaded[key] = load_backbone(spec, **options)
        return dataclasses.replace(loaded[key])

    commands = [module for name, module in sys.modules.items() if name.startswith("sfm.") and module != build]
    with pytest.MonkeyPatch.context() as patch:
        for module in commands:
            if vars(module).get("load_backbone") is load_backbone:
                patch.setattr(module, "load_backbone", load_once)
        yield


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with most slow tests, then with most tests, first: no worker ends with a long file."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Return a function that makes a folder once for all workers of pytest-xdist.

    It takes the folder's name and a function that fills the new, empty folder. The first worker calls that
    function, the others wait. Tests may read the folder, never write to it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
        folder.parent.mkdir(exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                complete.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def fashion_store(make_once: MakeOnce) -> str:
    """A store with lite0 and lite1 entries (full and tuning) of 40 + 40 real images per class, at 32 px."""

    # Not at the top: the process that only distributes tests needs no torch.
    from sfm.pipeline.extract import extract
    from sfm.pipeline.extract_config import ExtractConfig

    def fill(folder: Path) -> None:
        extract(
            ExtractConfig(
                source="builtin:fashion-mnist-6k",
                store=str(folder / "store"),
                backbone=["lite0", "lite1"],
                image_size=SIZE,
                limit_per_class=40,
                sub_classes=(2, 3),
                exemplars=6,
                tune_fraction=0.25,
            )
        )

    return str(make_once("fashion", fill) / "store")


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

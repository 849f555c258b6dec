import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfm.backbones.build import Backbone, load_backbone
from sfm.eval.distilled_run import read_distilled_run
from sfm.soft_label_files import LABEL_FILE, SoftLabelHeader, serialize_soft_labels
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.entry_selection import select_model_summaries_of_one_size
from sfm.stats_store.store import Entry, open_store

WriteRun = Callable[..., Path]
MakeOnce = Callable[[str, Callable[[Path], object]], Path]
LITE0, LITE1 = "tf_efficientnet_lite0", "tf_efficientnet_lite1"


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=32, device="cpu")


@pytest.fixture(scope="session")
def lite0_entry(fashion_store: str) -> Entry:
    store = open_store(fashion_store)
    return store.open_entry(
        select_model_summaries_of_one_size(store.list_summaries(), dataset="fashion-mnist-6k", model=LITE0)[0]
    )


@pytest.fixture(scope="session")
def lite1_entry(fashion_store: str) -> Entry:
    store = open_store(fashion_store)
    return store.open_entry(
        select_model_summaries_of_one_size(store.list_summaries(), dataset="fashion-mnist-6k", model=LITE1)[0]
    )


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    def write(directory: Path, entry: Entry, ipc: int = 1, canvas: int = 37) -> Path:
        """Write what a distillation of an entry leaves; its images being the first exemplars."""
        summary, images = entry.summary, entry.read_array("exemplar/image")
        classes = entry.dataset.class_ids
        for c in range(len(classes)):
            folder = directory / "images" / f"{c:0{len(str(len(classes) - 1))}d}_class"
            folder.mkdir(parents=True)
            for i in range(ipc):
                Image.fromarray(images[c, i]).resize((canvas, canvas)).save(folder / f"{i}.png")
        named = zip(classes, entry.dataset.class_names, strict=True)
        listed = [{"index": c, "class_id": id_, "name": name} for c, (id_, name) in enumerate(named)]
        (directory / "classes.json").write_text(json.dumps(listed))
        record = {
            "command": "distill",
            "config": {"backbone": entry.backbone.spec},
            "store": "where/it/was",
            "entry_digest": summary.entry_digest,
            "fingerprint": summary.fingerprint,
            "dataset": summary.dataset,
            "backbone": entry.backbone.model_dump(mode="json"),
            "image_size": summary.image_size,
            "canvas": canvas,
            "ipc": ipc,
            "seed": 0,
        }
        (directory / "run.json").write_text(json.dumps(record))
        return directory

    return write


@pytest.fixture
def new_run(tmp_path: Path, lite0_entry: Entry, write_run: WriteRun) -> Callable[..., Path]:
    """Make the directory of a run distilled on lite0 at 32 px."""

    def make(name: str = "run", **options: int) -> Path:
        return write_run(tmp_path / name, lite0_entry, **options)

    return make


@pytest.fixture(scope="session")
def write_labels() -> Callable[..., None]:
    def write(run: Path, entry: Entry, probabilities: np.ndarray, **header: object) -> None:
        """Write soft labels into the directory of a run distilled from an entry."""
        values = {
            "images": compute_array_digest(read_distilled_run(run).pixels),
            "class_ids": json.dumps(entry.dataset.class_ids),
            "backbone": entry.backbone.spec,
            "backbone_hash": entry.backbone.hash,
            "entry_digest": entry.summary.entry_digest,
            "views": 1,
            "temperature": 1.0,
            "seed": 0,
        }
        about = SoftLabelHeader.model_validate(values | header)
        data = serialize_soft_labels(probabilities.astype(np.float32), about)
        (run / LABEL_FILE).write_bytes(data)

    return write


@pytest.fixture(scope="session")
def real_pixels(lite0_entry: Entry) -> np.ndarray:
    """One real image of each of ten classes, 32 px."""
    pixels: np.ndarray = lite0_entry.read_array("exemplar/image")[:, 0]
    return pixels


@pytest.fixture(scope="session")
def finished_run(make_once: MakeOnce, fashion_store: str) -> Path:
    """A short real run: two images per class on lite0, evaluated on lite0 and lite1. Copy it to change it."""
    return make_once("finished", lambda folder: write_finished_run(folder / "run", fashion_store)) / "run"


def write_finished_run(out: Path, fashion_store: str) -> None:
    from sfm.distill.config import DistillConfig
    from sfm.distill.run import distill
    from sfm.eval.config import EvaluateConfig
    from sfm.eval.evaluation import evaluate_with_reader

    asked = DistillConfig(
        store=fashion_store,
        backbone="lite0",
        dataset="fashion-mnist-6k",
        out=out,
        ipc=2,
        steps=14,
        learning_rate=0.05,
        device="cpu",
    )
    distill(asked)
    evaluate_with_reader(
        EvaluateConfig(
            run=out,
            store=fashion_store,
            backbone=["lite0", "lite1"],
            epochs=20,
            views=4,
            projector_views=6,
            save=True,
            device="cpu",
        )
    )


@pytest.fixture(scope="session")
def two_backbone_run(make_once: MakeOnce, fashion_store: str) -> Path:
    """A short real run on lite0 and lite1, evaluated on those that this implies. Copy it to change it."""
    return (
        make_once("two-backbones", lambda folder: write_two_backbone_run(folder / "run", fashion_store))
        / "run"
    )


def write_two_backbone_run(out: Path, fashion_store: str) -> None:
    from sfm.distill.config import DistillConfig
    from sfm.distill.run import distill
    from sfm.eval.config import EvaluateConfig
    from sfm.eval.evaluation import evaluate_with_reader

    asked = DistillConfig(
        store=fashion_store,
        backbone=["lite0", "lite1"],
        backbone_weight=[1.0, 0.5],
        dataset="fashion-mnist-6k",
        out=out,
        steps=3,
        device="cpu",
    )
    distill(asked)
    short = {"epochs": 20, "views": 4, "projector_views": 6, "save": True, "device": "cpu"}
    evaluate_with_reader(EvaluateConfig.model_validate({"run": out, "store": fashion_store} | short))


@pytest.fixture(scope="session")
def partial_run(make_once: MakeOnce, fashion_store: str) -> Path:
    """A short real run of three of the ten classes: 1, 4 and 9. Not evaluated."""
    return make_once("partial", lambda folder: write_partial_run(folder, fashion_store)) / "run"


def write_partial_run(folder: Path, fashion_store: str) -> None:
    from sfm.distill.config import DistillConfig
    from sfm.distill.run import distill

    (folder / "classes.txt").write_text("Trouser\nCoat\nAnkle boot\n")
    asked = DistillConfig(
        store=fashion_store,
        backbone="lite0",
        dataset="fashion-mnist-6k",
        classes=folder / "classes.txt",
        out=folder / "run",
        steps=3,
        device="cpu",
    )
    distill(asked)

"""Mode `soft`: labels that travel with distilled images, and the same for the real ones beside them."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sfm.backbones.build import Backbone
from sfm.backbones.soft_labels import compute_average_soft_labels
from sfm.cli import app
from sfm.errors import InputError
from sfm.eval.caveats import SOFT_LABELS_KNOW_REAL_IMAGES
from sfm.eval.config import EvaluateConfig
from sfm.eval.distilled_run import read_distilled_run
from sfm.eval.evaluation import Evaluation, evaluate_with_reader
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run_export import export
from sfm.eval.report.provenance import make_cost_table
from sfm.eval.report.reported_runs import read_reported_runs
from sfm.eval.report.run_summaries import list_run_warnings, make_size_fact
from sfm.events import Progress
from sfm.soft_label_files import LABEL_FILE, read_soft_labels
from sfm.stats_store.store import Entry

pytestmark = pytest.mark.slow

NewRun = Callable[..., Path]
WriteLabels = Callable[..., None]
VIEWS, SEED = 4, 9


def make_config(run: Path, store: str, **options: object) -> EvaluateConfig:
    short = {"epochs": 40, "views": 8, "seeds": 2, "device": "cpu", "mode": ["linear", "soft"]}
    return EvaluateConfig.model_validate({"run": run, "store": store} | short | options)


@pytest.fixture
def labelled_run(new_run: NewRun, lite0_entry: Entry, lite0: Backbone, write_labels: WriteLabels) -> Path:
    """A run distilled on lite0, whose images are the nearest exemplars, labelled as by `sfm distill`."""
    run = new_run(canvas=32)
    probabilities = compute_average_soft_labels(
        lite0,
        read_distilled_run(run).pixels,
        lite0_entry.read_array("classifier/weight"),
        lite0_entry.read_array("classifier/bias"),
        views=VIEWS,
        temperature=2.0,
        seed=SEED,
        on_views=lambda done, total: None,
    )
    write_labels(run, lite0_entry, probabilities, views=VIEWS, temperature=2.0, seed=SEED)
    return run


def find_top1(evaluation: Evaluation, images: str, mode: str) -> list[float]:
    (found,) = [r.top1 for r in evaluation.rows if (r.images, r.mode) == (images, mode)]
    return found


def test_real_images_have_rows_on_labels_from_the_same_classifier(
    labelled_run: Path, fashion_store: str
) -> None:
    events: list[Progress] = []
    found = evaluate_with_reader(make_config(labelled_run, fashion_store, backbone=["lite1"]), events.append)
    assert [(r.images, r.mode) for r in found.rows] == [
        (images, mode)
        for images in ("distilled", "random", "nearest", "neighbour")
        for mode in ("linear", "soft")
    ]
    # The distilled images are the nearest exemplars: labelled here, they have the labels of the file.
    assert find_top1(found, "distilled", "soft") == pytest.approx(
        find_top1(found, "nearest", "soft"), abs=0.01
    )
    assert find_top1(found, "distilled", "soft") != find_top1(found, "distilled", "linear")
    file_bytes = (labelled_run / LABEL_FILE).stat().st_size
    for row in found.rows:
        assert (row.labels is not None) == (row.mode == "soft")
        if row.labels:
            assert (row.labels.bytes, row.labels.backbone, row.labels.views) == (file_bytes, "lite0", VIEWS)
    (note,) = [n for n in found.notes if n.startswith(SOFT_LABELS_KNOW_REAL_IMAGES)]
    assert f"{file_bytes} bytes" in note.replace(",", "")
    assert "soft labels of random images by lite0" in {event.stage for event in events}


def test_hard_labels_in_the_file_give_the_rows_of_linear(
    labelled_run: Path, fashion_store: str, lite0_entry: Entry, write_labels: WriteLabels
) -> None:
    write_labels(labelled_run, lite0_entry, np.eye(10))
    found = evaluate_with_reader(make_config(labelled_run, fashion_store))
    assert find_top1(found, "distilled", "soft") == find_top1(found, "distilled", "linear")
    assert find_top1(found, "nearest", "soft") != find_top1(found, "nearest", "linear")


def test_the_line_about_missing_labels_names_the_command_that_adds_them(
    finished_run: Path, tmp_path: Path, fashion_store: str
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    flags = [
        "evaluate",
        str(run),
        "--store",
        fashion_store,
        "--mode",
        "soft",
        "--epochs",
        "2",
        "--views",
        "2",
    ]
    refused = CliRunner().invoke(app, flags)
    assert refused.exit_code == 2
    assert "Traceback" not in refused.stderr
    (command,) = re.findall("`sfm (.*?)`", refused.stderr.replace("\n", " "))
    digest = json.loads((run / "run.json").read_text())["entry_digest"]
    assert f" --dataset fashion-mnist-6k@{digest[:12]} --image-size 32 " in command
    added = CliRunner().invoke(app, [*shlex.split(command), "--label-views", "3"], catch_exceptions=False)
    assert added.exit_code == 0
    assert "Soft labels: " in added.stdout
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 0
    assert "soft" in done.stdout
    (run / LABEL_FILE).unlink()
    shutil.rmtree(run / "checkpoint")
    refused = CliRunner().invoke(app, flags)
    assert refused.exit_code == 2
    assert "in a copy of the run with its checkpoint, which" in refused.stderr.replace("\n", " ")
    assert "`sfm" not in refused.stderr


@pytest.mark.parametrize(
    ("probabilities", "header", "message"),
    [
        (np.eye(10), {"images": "a" * 64}, "is of other images than those in .*which .* lacks"),
        (np.eye(10) * 2, {}, "no probabilities.*delete it"),
        (np.eye(9), {}, "not F32 of shape"),
        (np.eye(10), {"backbone_hash": "a" * 64}, "of another run"),
        (np.eye(10), {"entry_digest": "a" * 64}, "of another run"),
        (np.eye(10), {"class_ids": json.dumps(list("9876543210"))}, "of another run"),
    ],
)
def test_labels_of_something_else_are_refused_in_one_line(
    labelled_run: Path,
    fashion_store: str,
    lite0_entry: Entry,
    write_labels: WriteLabels,
    probabilities: np.ndarray,
    header: dict[str, object],
    message: str,
) -> None:
    write_labels(labelled_run, lite0_entry, probabilities, **header)
    with pytest.raises(InputError, match=message) as caught:
        evaluate_with_reader(make_config(labelled_run, fashion_store, mode=["soft"]))
    assert "\n" not in str(caught.value)
    assert not (labelled_run / "evaluation.json").exists()


def test_rows_of_replaced_labels_are_dropped(
    labelled_run: Path, fashion_store: str, lite0_entry: Entry, write_labels: WriteLabels
) -> None:
    short = {"epochs": 2, "views": 2, "seeds": 1}
    evaluate_with_reader(make_config(labelled_run, fashion_store, **short))
    write_labels(labelled_run, lite0_entry, np.eye(10))
    again = evaluate_with_reader(make_config(labelled_run, fashion_store, backbone=["lite1"], **short))
    together = Evaluation.model_validate_json((labelled_run / "evaluation.json").read_bytes())
    assert [(r.backbone, r.mode) for r in together.rows if r.images == "distilled"] == [
        ("lite1", "linear"),
        ("lite1", "soft"),
        ("lite0", "linear"),
    ]
    assert "dropped: 4 rows of entries or labels that were replaced since" in again.changes
    assert len([n for n in together.notes if n.startswith(SOFT_LABELS_KNOW_REAL_IMAGES)]) == 1


@contextmanager
def hide_weights_of_lite0(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from sfm.eval import evaluation

    load = evaluation.load_backbone

    def refuse(spec: str, **options: object) -> Backbone:
        if spec == "lite0":
            raise InputError("lite0 is not installed")
        return load(spec, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "load_backbone", refuse)
        yield


def test_labels_travel_to_where_their_backbone_is_not(
    labelled_run: Path, fashion_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hide_weights_of_lite0(monkeypatch):
        found = evaluate_with_reader(
            make_config(labelled_run, fashion_store, backbone=["lite1"], mode=["soft"])
        )
    assert [(r.images, r.mode) for r in found.rows if r.mode == "soft"] == [("distilled", "soft")]
    assert any("left out of mode soft" in n and "lite0 is not installed" in n for n in found.notes)


@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "parquet"])
def test_exports_carry_the_labels(labelled_run: Path, tmp_path: Path, form: str) -> None:
    expected = read_soft_labels(labelled_run / LABEL_FILE, 10, 10).probabilities
    out = tmp_path / "out"
    export(ExportConfig.model_validate({"run": labelled_run, "out": out, "format": form}))
    if form == "imagefolder":
        found = read_soft_labels(out / LABEL_FILE, 10, 10).probabilities
    elif form == "webdataset":
        import webdataset

        reader = webdataset.WebDataset(str(out / "train.tar"), shardshuffle=False).decode()
        found = np.stack([label for (label,) in reader.to_tuple("soft_label.npy")])
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(out / "data" / "train-00000-of-00001.parquet")
        found = np.array(table["soft_label"].to_pylist(), np.float32)
    assert (found == expected).all()
    assert "Every image also has a soft label" in (out / "README.md").read_text()


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_datasets_loads_the_labels_by_the_card(
    labelled_run: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    export(ExportConfig.model_validate({"run": labelled_run, "out": out, "format": form}))
    found = datasets.load_dataset(
        str(out), split="train", cache_dir=str(tmp_path / "cache"), verification_mode="all_checks"
    )
    name = "soft_label.npy" if form == "webdataset" else "soft_label"
    expected = read_soft_labels(labelled_run / LABEL_FILE, 10, 10).probabilities
    assert (np.array(found[name], np.float32) == expected).all()


def test_labels_of_edited_images_are_not_exported_and_the_report_warns(
    labelled_run: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32)).save(sorted(labelled_run.glob("images/*/0.png"))[3])
    with pytest.raises(InputError, match="is of other images"):
        export(ExportConfig(run=labelled_run, out=tmp_path / "out", format="parquet"))
    assert not (tmp_path / "out").exists()
    (run,) = read_reported_runs([labelled_run], [])
    assert any("soft labels are of other images" in warning for warning in list_run_warnings(run))


def test_the_report_counts_labels_in_the_size_of_the_set(
    labelled_run: Path, fashion_store: str, lite0_entry: Entry
) -> None:
    record = json.loads((labelled_run / "run.json").read_text())
    record["train_samples"] = lite0_entry.dataset.train_samples
    (labelled_run / "run.json").write_text(json.dumps(record))
    (run,) = read_reported_runs([labelled_run], [fashion_store])
    images = sum(path.stat().st_size for path in labelled_run.glob("images/*/*.png"))
    labels = (labelled_run / LABEL_FILE).stat().st_size
    assert run.image_file_bytes + run.label_file_bytes == images + labels
    fact = make_size_fact(run)
    assert fact.value == f"{(images + labels) / 1000:.3g} kB"
    assert f"soft labels {labels / 1000:.3g} kB" in fact.note or f"soft labels {labels} B" in fact.note
    cells = {label: row[0].text for label, row in make_cost_table([run]).rows}
    real = lite0_entry.extraction.train_bytes
    assert real
    assert cells["Bytes of real images per distilled byte"] == f"{real / (images + labels):,.1f}"
    (labelled_run / LABEL_FILE).unlink()
    (run,) = read_reported_runs([labelled_run], [fashion_store])
    assert (make_size_fact(run).note, run.label_file_bytes) == ("as PNG files", 0)

"""Images of other programs are evaluated like runs, and what is unknown of them is said."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from sfm.api import EvaluateConfig, evaluate
from sfm.cli import app
from sfm.errors import InputError
from sfm.eval.distilled_run import read_distilled_run
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run_export import export
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report
from sfm.eval.result import AccuracyRow, Evaluation
from sfm.stats_store.store import Entry

pytestmark = pytest.mark.slow

NewRun = Callable[..., Path]
SHORT = {"epochs": 15, "views": 3, "projector_views": 4, "seeds": 2, "device": "cpu"}


def make_config(path: Path, store: str, **options: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"run": path, "store": store} | SHORT | options)


def save_tensors(path: Path, pixels: np.ndarray, labels: list[int]) -> Path:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    torch.save({"images": images, "labels": torch.tensor(labels)}, path)
    return path


@pytest.fixture
def lgm_file(tmp_path: Path, real_pixels: np.ndarray) -> Path:
    """Ten real images of 32 px, in the way LGM ships its own; shuffled."""
    order = np.random.default_rng(0).permutation(10)
    return save_tensors(tmp_path / "data.pth", real_pixels[order], order.tolist())


def list_own_rows(evaluation: Evaluation) -> list[AccuracyRow]:
    return [row for row in evaluation.rows if row.images in ("distilled", "none")]


def run_evaluate(*words: object) -> Result:
    short = ["--epochs", 15, "--views", 3, "--seeds", 2, "--device", "cpu", "--quiet"]
    return CliRunner().invoke(app, ["evaluate", *map(str, words), *map(str, short)], env={"COLUMNS": "160"})


def test_images_of_a_run_have_the_accuracies_of_that_run(
    tmp_path: Path, new_run: NewRun, fashion_store: str
) -> None:
    run = new_run(canvas=37)
    pixels = read_distilled_run(run).pixels
    file = save_tensors(tmp_path / "data.pth", pixels, list(range(10)))
    expected = evaluate(make_config(run, fashion_store, backbone=["lite1"], mode=["linear", "inherit"]))
    foreign = evaluate(
        make_config(
            file, fashion_store, backbone=["lite1"], mode=["linear", "inherit"], distilled_on=["lite0"]
        )
    )
    assert foreign.rows == expected.rows
    assert foreign.provenance.images == expected.provenance.images
    assert foreign.provenance.image_source == str(file)
    assert foreign.provenance.distilled_from_entries == expected.provenance.distilled_from_entries


def test_an_unknown_backbone_is_marked_and_nothing_is_inherited(lgm_file: Path, fashion_store: str) -> None:
    done = run_evaluate(lgm_file, "--store", fashion_store, "--backbone", "lite0")
    assert done.exit_code == 0, done.stderr
    assert "distilled on an unknown backbone" in done.stdout
    assert "resized to 37 x 37" in done.stdout
    assert "Left out: inherit and inherit-statistics" in done.stdout
    folder = lgm_file.with_name("data.pth-evaluation")
    stored = json.loads((folder / "evaluation.json").read_text())
    assert stored["provenance"]["distilled_on"] == "unknown"
    assert stored["provenance"]["distilled_on_known"] is False
    assert stored["provenance"]["distilled_from_entries"] is None
    assert {row["unseen"] for row in (*stored["rows"], *stored["full_data"])} == {None}
    assert {row["mode"] for row in stored["rows"]} == {"linear"}
    page = report(ReportConfig(runs=[lgm_file], out=lgm_file.with_name("report.html"), store=[fashion_store]))
    text = page.read_text()
    assert "Unknown whether distilled on" in text
    assert "Unseen backbones" not in text
    assert '<th scope="col">LRS</th>' in text
    with pytest.raises(InputError, match="images of another program"):
        export(ExportConfig(run=folder, format="parquet", out=lgm_file.with_name("exported")))


def test_several_methods_share_one_table_and_report(
    tmp_path: Path, lgm_file: Path, new_run: NewRun, fashion_store: str
) -> None:
    run = new_run(canvas=37)
    done = run_evaluate(
        run, lgm_file, "--store", fashion_store, "--backbone", "lite0", "--mode", "linear", "--json"
    )
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(cell["distilled_on"], cell["unseen"]) for cell in document["matrix"]] == [
        ("lite0", False),
        ("unknown", None),
    ]
    assert all(0 < cell["label_robust_score"] < 1 for cell in document["matrix"])
    page = report(ReportConfig(runs=[run, lgm_file], out=tmp_path / "report.html"))
    assert "Label-robust score on fashion-mnist-6k, %" in page.read_text()


def test_later_commands_add_rows_and_may_name_the_backbone(lgm_file: Path, fashion_store: str) -> None:
    first = evaluate(make_config(lgm_file, fashion_store, backbone=["lite0"]))
    second = evaluate(
        make_config(lgm_file, fashion_store, backbone=["lite1"], distilled_on=["lite0"], mode=["inherit"])
    )
    (inherited,) = list_own_rows(second)
    assert (inherited.mode, inherited.unseen) == ("inherit", True)
    folder = lgm_file.with_name("data.pth-evaluation")
    stored = Evaluation.model_validate_json((folder / "evaluation.json").read_text())
    assert {(row.mode, row.backbone, row.unseen) for row in list_own_rows(stored)} == {
        ("linear", "lite0", False),
        ("inherit", "lite1", True),
    }
    assert list_own_rows(first)[0].top1 == list_own_rows(stored)[-1].top1
    with pytest.raises(InputError, match="distilled on lite0"):
        evaluate(make_config(folder, fashion_store, distilled_on=["lite1"]))


def test_classes_may_have_different_numbers_of_images(
    tmp_path: Path, lite0_entry: Entry, fashion_store: str
) -> None:
    images = lite0_entry.read_array("exemplar/image")
    counts = [1 + c % 2 for c in range(10)]
    for c, count in enumerate(counts):
        folder = tmp_path / "set" / str(c)
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(images[c, i]).resize((20 + c, 30)).save(folder / f"{i}.png")
    evaluation = evaluate(make_config(tmp_path / "set", fashion_store, backbone=["lite0"]))
    assert evaluation.provenance.images_per_class == counts
    assert "Images: 1 to 2 per class." in evaluation.notes
    rows = {row.images: row for row in evaluation.rows}
    assert {"distilled", "random", "nearest", "neighbour"} <= set(rows)
    assert [len(chosen) for chosen in rows["neighbour"].chosen or []] == counts
    page = report(ReportConfig(runs=[tmp_path / "set"], out=tmp_path / "r.html", store=[fashion_store]))
    assert "1 to 2 per class" in page.read_text()
    assert len(re.findall('alt="Distilled image of', page.read_text())) == sum(counts)


def test_mismatched_classes_are_listed_and_nothing_is_written(tmp_path: Path, fashion_store: str) -> None:
    for name in ("hat", "cap"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "0.png")
    done = run_evaluate(tmp_path / "set", "--store", fashion_store, "--backbone", "lite0")
    (line,) = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (2, "")
    assert "2 are no classes there: cap, hat; 10 classes have no image" in line
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backbone": []}, "name the backbones"),
        ({"mode": ["kd"]}, "--distilled-on"),
        ({"mode": ["soft"]}, "no soft labels"),
        ({"dataset": "fashoin"}, "no dataset"),
        ({"distilled_on": ["lite2"]}, "no entry"),
        ({"distilled_on": ["lite0", "lite0"]}, "more than once"),
        ({"out": Path("x.json")}, "one file"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_before_anything_is_written(
    lgm_file: Path, fashion_store: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        evaluate(make_config(lgm_file, fashion_store, **{"backbone": ["lite0"]} | options))
    assert [path.name for path in lgm_file.parent.iterdir()] == ["data.pth"]


def test_a_folder_of_something_else_is_not_written_to(lgm_file: Path, fashion_store: str) -> None:
    folder = lgm_file.with_name("data.pth-evaluation")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        evaluate(make_config(lgm_file, fashion_store, backbone=["lite0"]))
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_run_directory_names_its_own_dataset(new_run: NewRun, fashion_store: str) -> None:
    with pytest.raises(InputError, match="--distilled-on"):
        evaluate(make_config(new_run(), fashion_store, distilled_on=["lite0"]))


def test_other_images_of_the_same_name_are_refused(
    lgm_file: Path, real_pixels: np.ndarray, fashion_store: str
) -> None:
    evaluate(make_config(lgm_file, fashion_store, backbone=["lite0"], mode=["linear"]))
    save_tensors(lgm_file, real_pixels[::-1].copy(), list(range(10)))
    with pytest.raises(InputError, match="other images"):
        evaluate(make_config(lgm_file, fashion_store, backbone=["lite0"]))

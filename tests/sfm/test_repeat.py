"""A run.json and an evaluation.json hold everything needed to repeat, from another folder too."""

import json
import shutil
from pathlib import Path

import pytest

from sfm.cli import app


@pytest.fixture
def project_folder(tmp_path: Path, fashion_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a store, a file of weights, and a list of classes in it."""
    import timm
    from safetensors.torch import save_file

    place = tmp_path / "work place"
    shutil.copytree(fashion_store, place / "store")
    (place / "garden.txt").write_text("Sneaker\nBag\n")
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), place / "other.safetensors")
    monkeypatch.chdir(place)
    return place


def run_sfm(*arguments: object) -> None:
    """Run a command that ends well."""
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in [*arguments, "--quiet"]])
    assert not end.value.code


def read_images(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("images/*/*.png"))}


def test_distill_and_evaluate_are_reproduced_from_their_json_in_another_folder(
    project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", "store", "--backbone", "lite0", "--dataset", "fashion-mnist-6k"]
    run_sfm("distill", *where, "--classes", "garden.txt", "--out", "one", "--steps", 2, "--device", "cpu")
    run_sfm(
        "evaluate", "one", "--store", "store", "--mode", "linear", "--epochs", 1, "--views", 1, "--seeds", 1
    )
    assert "held-out features: one, distilled" in capsys.readouterr().out
    record = json.loads((project_folder / "one" / "run.json").read_text())
    classes = json.loads((project_folder / "one" / "classes.json").read_text())
    assert record["config"]["classes"] == [one["class_id"] for one in classes]
    assert len(classes) == 2

    (project_folder / "garden.txt").unlink()
    monkeypatch.chdir(tmp_path)
    store = project_folder / "store"
    run_sfm("distill", "--config", project_folder / "one" / "run.json", "--store", store, "--out", "two")
    assert read_images(tmp_path / "two") == read_images(project_folder / "one")
    again = json.loads((tmp_path / "two" / "run.json").read_text())["config"]
    assert again == record["config"] | {"out": str(tmp_path / "two")}

    evaluated = json.loads((project_folder / "one" / "evaluation.json").read_text())
    (project_folder / "one" / "evaluation.json").rename(tmp_path / "evaluation.json")
    run_sfm("evaluate", project_folder / "one", "--config", tmp_path / "evaluation.json", "--store", store)
    repeated = json.loads((project_folder / "one" / "evaluation.json").read_text())
    assert repeated["rows"] == evaluated["rows"]


def test_run_json_resumes_a_run_from_another_working_directory(
    project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--store", "store", "--backbone", "lite0", "--dataset", "fashion-mnist-6k"]
    run_sfm("distill", *where, "--out", "one", "--steps", 1, "--device", "cpu")
    monkeypatch.chdir(tmp_path)
    run_sfm("distill", "--config", project_folder / "one" / "run.json", "--trust-config", "--resume")
    assert not (tmp_path / "one").exists()


def test_weights_paths_and_store_urls_are_made_absolute(project_folder: Path) -> None:
    from sfm.backbones.spec import make_spec_weights_path_absolute
    from sfm.stats_store.location import make_url_absolute

    spec = "timm/tf_efficientnet_lite0@other.safetensors"
    assert (
        make_spec_weights_path_absolute(spec)
        == f"timm/tf_efficientnet_lite0@{project_folder}/other.safetensors"
    )
    assert make_spec_weights_path_absolute("lite0") == "lite0"
    assert make_url_absolute("store") == str(project_folder / "store")
    assert make_url_absolute("s3://team/stats") == "s3://team/stats"


def test_unknown_class_in_a_config_file_is_refused_by_name(
    project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"store": "store", "backbone": "lite0", "dataset": "fashion-mnist-6k", "out": "one"}
    (project_folder / "run.json").write_text(
        json.dumps({"command": "distill", "config": where | {"classes": ["Bag", "Sandals"]}})
    )
    with pytest.raises(SystemExit) as end:
        app(["distill", "--config", "run.json", "--trust-config", "--quiet"])
    assert end.value.code == 2
    assert "fashion-mnist-6k has no class 'Sandals'" in capsys.readouterr().err

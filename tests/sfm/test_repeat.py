"""A run.json and an evaluation.json hold everything needed to repeat, from another folder too."""

import json
import shutil
from pathlib import Path

import pytest

from sfm.cli import app


@pytest.fixture
def workplace(tmp_path: Path, fashion_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def test_distilling_and_evaluating_are_repeated_in_another_folder(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", "store", "--backbone", "lite0", "--dataset", "fashion-mnist-6k"]
    run_sfm("distill", *where, "--classes", "garden.txt", "--out", "one", "--steps", 2, "--device", "cpu")
    run_sfm(
        "evaluate", "one", "--store", "store", "--mode", "linear", "--epochs", 1, "--views", 1, "--seeds", 1
    )
    assert "held-out features: one, distilled" in capsys.readouterr().out
    record = json.loads((workplace / "one" / "run.json").read_text())
    classes = json.loads((workplace / "one" / "classes.json").read_text())
    assert record["config"]["classes"] == [one["class_id"] for one in classes]
    assert len(classes) == 2

    (workplace / "garden.txt").unlink()
    monkeypatch.chdir(tmp_path)
    store = workplace / "store"
    run_sfm("distill", "--config", workplace / "one" / "run.json", "--store", store, "--out", "two")
    assert read_images(tmp_path / "two") == read_images(workplace / "one")
    again = json.loads((tmp_path / "two" / "run.json").read_text())["config"]
    assert again == record["config"] | {"out": str(tmp_path / "two")}

    evaluated = json.loads((workplace / "one" / "evaluation.json").read_text())
    (workplace / "one" / "evaluation.json").rename(tmp_path / "evaluation.json")
    run_sfm("evaluate", workplace / "one", "--config", tmp_path / "evaluation.json", "--store", store)
    repeated = json.loads((workplace / "one" / "evaluation.json").read_text())
    assert repeated["rows"] == evaluated["rows"]


def test_a_run_is_resumed_from_another_folder_by_its_run_json(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--store", "store", "--backbone", "lite0", "--dataset", "fashion-mnist-6k"]
    run_sfm("distill", *where, "--out", "one", "--steps", 1, "--device", "cpu")
    monkeypatch.chdir(tmp_path)
    run_sfm("distill", "--config", workplace / "one" / "run.json", "--trust-config", "--resume")
    assert not (tmp_path / "one").exists()


def test_paths_in_a_configuration_are_whole(workplace: Path) -> None:
    from sfm.backbones.spec import make_spec_weights_path_absolute
    from sfm.stats_store.location import make_url_absolute

    spec = "timm/tf_efficientnet_lite0@other.safetensors"
    assert (
        make_spec_weights_path_absolute(spec) == f"timm/tf_efficientnet_lite0@{workplace}/other.safetensors"
    )
    assert make_spec_weights_path_absolute("lite0") == "lite0"
    assert make_url_absolute("store") == str(workplace / "store")
    assert make_url_absolute("s3://team/stats") == "s3://team/stats"


def test_a_class_of_the_configuration_that_is_not_there_is_refused_by_name(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"store": "store", "backbone": "lite0", "dataset": "fashion-mnist-6k", "out": "one"}
    (workplace / "run.json").write_text(
        json.dumps({"command": "distill", "config": where | {"classes": ["Bag", "Sandals"]}})
    )
    with pytest.raises(SystemExit) as end:
        app(["distill", "--config", "run.json", "--trust-config", "--quiet"])
    assert end.value.code == 2
    assert "fashion-mnist-6k has no class 'Sandals'" in capsys.readouterr().err

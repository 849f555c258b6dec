"""Exports, each read back by the library that owns its format."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image
from typer.testing import CliRunner

from sfm.cli import app
from sfm.errors import InputError
from sfm.eval.config import get_classifier_folder
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run_export import export
from sfm.eval.output_files import create_folder_atomically
from sfm.eval.work_folder import KEY_CHARACTERS, WorkFolder
from sfm.stats_store.store import Entry

SFM = str(Path(sys.executable).with_name("sfm"))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def export_run(run: Path, out: Path, form: str, **options: object) -> Path:
    config = ExportConfig.model_validate({"run": run, "out": out, "format": form} | options)
    done = export(config)
    assert done.out == out
    assert done.file_count == sum(path.is_file() for path in out.rglob("*"))
    return out


def read_image_files(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "images").glob("*/*.png"))]


def read_pixels(run: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted((run / "images").glob("*/*.png"))])


def read_class_names(run: Path) -> list[str]:
    return [one["name"] for one in json.loads((run / "classes.json").read_text())]


def rename_class(run: Path, index: int, name: str) -> None:
    classes = json.loads((run / "classes.json").read_text())
    classes[index]["name"] = name
    (run / "classes.json").write_text(json.dumps(classes))


def test_torchvision_reads_an_exported_image_folder_in_label_order(
    finished_run: Path, tmp_path: Path
) -> None:
    from torchvision.datasets import ImageFolder

    out = export_run(finished_run, tmp_path / "out", "imagefolder")
    found = ImageFolder(str(out))
    assert [label for _, label in found] == [label for label in range(10) for _ in range(2)]
    assert found.classes[0] == "0_t-shirt-top"
    assert (np.stack([np.asarray(image) for image, _ in found]) == read_pixels(finished_run)).all()
    assert [Path(path).read_bytes() for path, _ in found.samples] == read_image_files(finished_run)


def test_webdataset_reads_images_labels_and_classes_from_the_tar(finished_run: Path, tmp_path: Path) -> None:
    import webdataset

    out = export_run(finished_run, tmp_path / "out", "webdataset")
    reader = webdataset.WebDataset(str(out / "train.tar"), shardshuffle=False).decode("pil")
    samples = list(reader.to_tuple("png", "cls", "json"))
    assert [label for _, label, _ in samples] == [label for label in range(10) for _ in range(2)]
    assert samples[19][2] == {"label": 9, "class_id": "9", "name": "Ankle boot"}
    assert (np.stack([np.asarray(image) for image, _, _ in samples]) == read_pixels(finished_run)).all()


def test_equal_images_give_byte_identical_tars(finished_run: Path, tmp_path: Path) -> None:
    first, second = (export_run(finished_run, tmp_path / name, "webdataset") for name in ("a", "b"))
    assert (first / "train.tar").read_bytes() == (second / "train.tar").read_bytes()


@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "parquet"])
def test_datasets_loads_every_exported_format_from_its_card(
    finished_run: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    out = export_run(finished_run, tmp_path / "out", form)
    found = datasets.load_dataset(
        str(out), split="train", cache_dir=str(tmp_path / "cache"), verification_mode="all_checks"
    )
    assert found.num_rows == 20
    info = datasets.info.DatasetInfosDict.from_directory(str(out))["default"]
    card = DatasetCard.load(out / "README.md").data.to_dict()["dataset_info"]
    assert info.splits["train"].num_examples == 20
    assert info.splits["train"].num_bytes == sum(map(len, read_image_files(finished_run))) + 20 * 8
    assert info.dataset_size == info.splits["train"].num_bytes == card["dataset_size"]
    assert info.download_size == card["download_size"] > 0
    image, label = ("png", "cls") if form == "webdataset" else ("image", "label")
    assert sorted(found[label]) == [label for label in range(10) for _ in range(2)]
    shown = {np.asarray(one).tobytes() for one in found[image]}
    assert shown == {one.tobytes() for one in read_pixels(finished_run)}
    if form == "parquet":
        assert found.features["label"].names == read_class_names(finished_run)


def test_a_parquet_export_declares_its_own_features(finished_run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = export_run(finished_run, tmp_path / "out", "parquet")
    (out / "README.md").unlink()
    file = out / "data" / "train-00000-of-00001.parquet"
    found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert isinstance(found.features["image"], datasets.Image)
    assert found.features["label"].int2str(9) == "Ankle boot"
    assert (np.stack([np.asarray(one) for one in found["image"]]) == read_pixels(finished_run)).all()


def test_equal_class_names_are_disambiguated_in_a_parquet_export(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rename_class(run, 1, "crane | bird")
    rename_class(run, 2, "crane | bird")
    out = export_run(run, tmp_path / "out", "parquet")
    file = out / "data" / "train-00000-of-00001.parquet"
    found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert found.features["label"].names[:3] == ["T-shirt/top", "crane | bird (1)", "crane | bird (2)"]
    assert "| 1 | crane \\| bird | 1 |" in (out / "README.md").read_text()


def test_a_run_in_a_folder_with_a_non_utf8_name_is_exported(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / os.fsdecode(b"caf\xe9")))
    out = export_run(run, tmp_path / os.fsdecode(b"out\xe9"), "webdataset")
    assert r"caf\xe9-again" in (out / "README.md").read_text(encoding="utf-8")


def test_arbitrary_names_are_exported_unchanged_and_escaped_on_the_card(run: Path, tmp_path: Path) -> None:
    rename_class(run, 1, "cat\nFelis [x](http://evil)\x1b[2J")
    rename_class(run, 2, "x" * 1000)
    record = json.loads((run / "run.json").read_text()) | {"dataset": "pets [raw]\n# evil <b>"}
    (run / "run.json").write_text(json.dumps(record))
    out = export_run(run, tmp_path / "out", "webdataset")
    card = DatasetCard.load(out / "README.md")
    assert card.data.pretty_name.startswith("pets [raw]\n# evil <b>, distilled on")
    assert "# pets \\[raw\\] # evil \\<b>, distilled on lite0\n" in card.text
    assert "| 1 | cat Felis \\[x\\](http://evil)\\\\x1b\\[2J | 1 |\n" in card.text
    assert "\x1b" not in (out / "README.md").read_text()
    assert json.loads((out / "classes.json").read_text())[1]["name"] == "cat\nFelis [x](http://evil)\x1b[2J"


@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "parquet"])
def test_the_dataset_card_has_valid_hub_metadata(finished_run: Path, tmp_path: Path, form: str) -> None:
    card = DatasetCard.load(export_run(finished_run, tmp_path / "out", form) / "README.md")
    assert card.data.license == "mit"
    assert card.data.task_categories == ["image-classification"]
    assert card.data.size_categories == "n<1K"
    assert card.data.to_dict()["configs"][0]["data_files"][0]["split"] == "train"
    assert "20 images that stand for the 400 training images of fashion-mnist-6k" in card.text
    assert "| lite1 (unseen) | Distilled, inherit |" in card.text
    assert "were edited" not in card.text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("unknown", {"license": "unknown"}),
        ("ImageNet terms", {"license": "other", "license_name": "ImageNet terms"}),
    ],
)
def test_the_data_licence_is_written_to_the_dataset_card(
    run: Path, tmp_path: Path, given: str, shown: dict[str, str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"licence": given}))
    card = DatasetCard.load(export_run(run, tmp_path / "out", "imagefolder") / "README.md")
    assert shown.items() <= card.data.to_dict().items()


def test_the_licence_option_overrides_the_record_and_a_missing_one_is_reported(
    run: Path, tmp_path: Path
) -> None:
    out = export_run(run, tmp_path / "named", "imagefolder", licence="CC0-1.0")
    card = DatasetCard.load(out / "README.md")
    assert card.data.license == "cc0-1.0"
    assert "| licence of the real data | MIT |" in card.text
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"licence": "unknown"}))
    command = ["export", str(run), "--format", "imagefolder", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.stdout.splitlines()[0].endswith("; licence: unknown")
    assert "then give --licence" in done.stdout


def test_the_dataset_card_explains_its_accuracies(finished_run: Path, tmp_path: Path) -> None:
    text = (export_run(finished_run, tmp_path / "out", "imagefolder") / "README.md").read_text()
    assert "| lite0 | Distilled, inherit (own backbone) |" in text
    assert "shows that classifier more than the images" in " ".join(text.split())
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    for note in evaluation["notes"]:
        assert note in text
    assert "comes close to" not in text


@pytest.mark.slow
def test_the_code_on_a_classifier_card_classifies_an_image(
    run: Path, fashion_store: str, lite0_entry: Entry, tmp_path: Path
) -> None:
    out = export_run(run, tmp_path / "out", "classifier", store=fashion_store)
    text = (out / "README.md").read_text()
    assert f"the training split, 400 real images of {lite0_entry.dataset.name}" in text
    assert "| resampling | bicubic |" in text
    Image.fromarray(lite0_entry.read_array("exemplar/image")[9, 0]).save(out / "image.png")
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.strip() in read_class_names(run)


def test_a_projector_of_edited_images_is_not_exported(run: Path, fashion_store: str, tmp_path: Path) -> None:
    image = sorted((run / "images").rglob("*.png"))[0]
    Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    with pytest.raises(InputError, match="no projector from lite1 to lite0"):
        export_run(run, tmp_path / "out", "classifier", store=fashion_store, backbone="lite1")


def test_edited_images_are_exported_unchanged_and_noted_on_the_card(run: Path, tmp_path: Path) -> None:
    image = sorted((run / "images").rglob("*.png"))[0]
    Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    out = export_run(run, tmp_path / "out", "imagefolder")
    assert (out / image.parent.name / image.name).read_bytes() == image.read_bytes()
    card = DatasetCard.load(out / "README.md")
    assert "The images were edited after they were distilled." in card.text
    assert "top-1" not in card.text  # the figures at hand are of other images


def test_safetensors_reads_the_exported_full_data_classifier(
    finished_run: Path, fashion_store: str, lite0_entry: Entry, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    out = export_run(finished_run, tmp_path / "out", "classifier", store=fashion_store)
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == {"weight", "bias"}
    assert (tensors["weight"] == lite0_entry.read_array("classifier/weight")).all()
    logits = lite0_entry.read_array("test/feature").astype(np.float32) @ tensors["weight"].T + tensors["bias"]
    right = (logits.argmax(1) == lite0_entry.read_array("test/label")).mean()
    about = json.loads((out / "config.json").read_text())
    assert about["backbone"]["hash"] == lite0_entry.backbone.hash
    assert about["held_out_top1"] == pytest.approx(right, abs=0.003)
    assert about["class_names"] == read_class_names(finished_run)


def test_a_run_of_a_class_subset_exports_its_rows_of_the_classifier(
    partial_run: Path, fashion_store: str, lite0_entry: Entry, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    out = export_run(partial_run, tmp_path / "out", "classifier", store=fashion_store)
    tensors = load_file(out / "model.safetensors")
    for name in ("weight", "bias"):
        assert (tensors[name] == lite0_entry.read_array(f"classifier/{name}")[[1, 4, 9]]).all()
    about = json.loads((out / "config.json").read_text())
    assert about["class_names"] == ["Trouser", "Coat", "Ankle boot"]
    assert about["held_out_top1"] is None  # what the store knows is of all ten


def test_exported_projector_and_classifier_reproduce_the_evaluated_accuracy(
    finished_run: Path, fashion_store: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    from sfm.stats_store.entry_selection import select_model_summaries_of_one_size
    from sfm.stats_store.store import open_store

    out = export_run(finished_run, tmp_path / "out", "classifier", store=fashion_store, backbone="lite1")
    tensors = load_file(out / "model.safetensors")
    store = open_store(fashion_store)
    (summary,) = select_model_summaries_of_one_size(
        store.list_summaries(), dataset="fashion-mnist-6k", model="tf_efficientnet_lite1"
    )
    entry = store.open_entry(summary)
    features = entry.read_array("test/feature").astype(np.float32)
    logits = features @ tensors["weight"].T + tensors["bias"]
    rows = json.loads((finished_run / "evaluation.json").read_text())["rows"]
    (row,) = [r for r in rows if (r["backbone"], r["mode"]) == ("lite1", "inherit")]
    right = (logits.argmax(1) == entry.read_array("test/label")).mean()
    assert right == pytest.approx(row["top1"][0], abs=0.003)
    projected = features @ tensors["projector_weight"].T + tensors["projector_bias"]
    in_two_steps = projected @ tensors["classifier_weight"].T + tensors["classifier_bias"]
    np.testing.assert_allclose(in_two_steps, logits, rtol=1e-3, atol=1e-3)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    (figure,) = card.data.eval_results
    assert (figure.metric_type, figure.metric_value) == ("accuracy", row["top1_mean"])
    assert json.loads((out / "config.json").read_text())["backbone"]["hash"] == entry.backbone.hash


@pytest.mark.slow
def test_a_missing_projector_error_is_one_line_with_the_command_to_train_it(
    run: Path, fashion_store: str, tmp_path: Path
) -> None:
    shutil.rmtree(run / "classifiers")
    asked = ["export", run, "--format", "classifier", "--store", fashion_store, "--backbone", "lite1"]
    command = [SFM, *map(str, asked), "--out", str(tmp_path / "out")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: no projector from lite1 to lite0 in {run}: make it with `sfm ")
    assert not list(tmp_path.glob("*out*"))
    words = shlex.split(refused.stderr.split("`")[1])
    short = ["--epochs", "2", "--views", "2", "--projector-views", "2", "--seeds", "1"]
    made = subprocess.run([SFM, *words[1:], *short], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["files"] == 3


@pytest.mark.parametrize("result", ["r.json", "results/evaluation.json"])
def test_evaluation_option_finds_results_and_projectors_outside_the_run(
    run: Path, fashion_store: str, tmp_path: Path, result: str
) -> None:
    elsewhere = tmp_path / result
    get_classifier_folder(elsewhere).parent.mkdir(exist_ok=True)
    (run / "classifiers").rename(get_classifier_folder(elsewhere))
    (run / "evaluation.json").rename(elsewhere)
    given = elsewhere if result == "r.json" else elsewhere.parent
    options = {"store": fashion_store, "backbone": "lite1", "evaluation": [given]}
    about = json.loads(
        (export_run(run, tmp_path / "out", "classifier", **options) / "config.json").read_text()
    )
    rows = json.loads(elsewhere.read_text())["rows"]
    (row,) = [r for r in rows if (r["backbone"], r["mode"]) == ("lite1", "inherit")]
    assert about["held_out_top1"] == row["top1_mean"]
    (get_classifier_folder(elsewhere) / "lite1-inherit.safetensors").unlink()
    with pytest.raises(InputError, match=f"make it with `sfm evaluate .* --out {given}`"):
        export_run(run, tmp_path / "again", "classifier", **options)


def test_a_projector_of_other_classes_is_refused(
    finished_run: Path, partial_run: Path, fashion_store: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(partial_run, tmp_path / "run"))
    shutil.copytree(finished_run / "classifiers", run / "classifiers")
    with pytest.raises(InputError, match="is not of the run in"):
        export_run(run, tmp_path / "out", "classifier", store=fashion_store, backbone="lite1")


def test_a_damaged_projector_is_refused(run: Path, fashion_store: str, tmp_path: Path) -> None:
    (run / "classifiers" / "lite1-inherit.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(InputError, match=r"lite1-inherit\.safetensors is damaged"):
        export_run(run, tmp_path / "out", "classifier", store=fashion_store, backbone="lite1")


def test_exporting_a_classifier_requires_a_store(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--store is required for a classifier"):
        export_run(finished_run, tmp_path / "out", "classifier")


def test_system_files_in_the_output_folder_are_ignored_and_kept(tmp_path: Path) -> None:
    left = {".DS_Store", "Thumbs.db", "lost+found"}
    for name in left:
        (tmp_path / name).mkdir()
    with suppress(RuntimeError), create_folder_atomically(tmp_path) as partial:
        (partial / "half").write_text("")
        raise RuntimeError
    assert {path.name for path in tmp_path.iterdir()} == left
    with create_folder_atomically(tmp_path) as partial:
        (partial / "images").mkdir()
    assert {path.name for path in tmp_path.iterdir()} == left | {"images"}
    with pytest.raises(InputError, match="is not empty"), create_folder_atomically(tmp_path):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_export_deletes_nothing_through_a_symlink(tmp_path: Path, there: bool) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("mine")
    if there:
        out.mkdir()
    ((out if there else tmp_path) / ".out.partial").symlink_to(victim)
    with suppress(RuntimeError), create_folder_atomically(out) as partial:
        (partial / "half").write_text("")
        raise RuntimeError
    with create_folder_atomically(out) as partial:
        (partial / "images").mkdir()
    assert [path.name for path in out.iterdir()] == ["images"]
    assert (victim / "thesis.tex").read_text() == "mine"


def test_partial_results_are_neither_written_nor_deleted_through_a_symlink(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, victim = "a" * KEY_CHARACTERS, tmp_path / "victim"
    victim.mkdir()
    (victim / f"{key}.json").write_text("mine")
    (tmp_path / "work").symlink_to(victim)
    work = WorkFolder(tmp_path / "work")
    work.used_keys.append(key)
    work.try_write_file(f"{key}.json", b"x")
    work.delete_used_files()
    assert (victim / f"{key}.json").read_text() == "mine"
    assert "work is a symbolic link" in caplog.text


def test_export_writes_only_to_a_new_or_empty_folder(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_run(finished_run, tmp_path / "empty", "imagefolder")
    before = sorted((tmp_path / "empty").rglob("*"))
    with pytest.raises(InputError, match="is not empty: give a new folder"):
        export_run(finished_run, tmp_path / "empty", "parquet")
    assert sorted((tmp_path / "empty").rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: give a folder"):
        export_run(finished_run, tmp_path / "file", "parquet")


def test_an_unknown_format_exits_with_code_2_and_lists_the_formats(
    finished_run: Path, tmp_path: Path
) -> None:
    command = [SFM, "export", str(finished_run), "--format", "zip", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--format zip" in done.stderr
    assert "'parquet'" in done.stderr

"""Evaluations of one run add up, go on where they were interrupted, and are never lost without a word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from sfm.cli import app
from sfm.errors import InputError
from sfm.eval import work_folder
from sfm.eval.caveats import EARLIER_TRAINING
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.evaluation import NotWrittenError, evaluate_runs_with_reader, evaluate_with_reader
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report
from sfm.eval.report.row_selection import make_row_label
from sfm.eval.result import Evaluation
from sfm.events import Progress

NewRun = Callable[..., Path]
SHORT = {"epochs": 10, "views": 4, "projector_views": 6, "seeds": 2, "device": "cpu"}
FLAGS = ["--epochs", "10", "--views", "4", "--projector-views", "6", "--seeds", "2", "--device", "cpu"]


def make_config(run: Path, store: str, **options: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"run": run, "store": store} | SHORT | options)


def read_evaluation(path: Path) -> Evaluation:
    return Evaluation.model_validate_json(path.read_bytes())


def list_row_names(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    return [(row.images, row.backbone, row.mode) for row in evaluation.rows]


def test_a_later_evaluation_keeps_the_rows_of_earlier_ones(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    first = evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]))
    second = evaluate_with_reader(
        make_config(run, fashion_store, backbone=["lite1"], mode=["inherit"], epochs=5)
    )
    together = read_evaluation(run / "evaluation.json")
    assert together.rows == [*second.rows, *first.rows]
    assert together.full_data == [*second.full_data, *first.full_data]
    assert [e.backbone for e in together.provenance.entries] == ["lite1", "lite0"]
    assert together.config == second.config
    assert [one.config for one in together.earlier] == [first.config]
    assert second.changes == [f"kept: {len(first.rows)} rows of earlier evaluations"]


def test_rows_of_another_crop_edge_or_kd_weight_stand_beside_earlier_ones(
    new_run: NewRun, fashion_store: str
) -> None:
    run = new_run()
    first = evaluate_with_reader(make_config(run, fashion_store, mode=["linear", "kd"], kd_weight=0))
    linear, kd = (row for row in first.rows if row.images == "distilled")
    # Without weight, soft labels train the head of `linear`.
    assert kd.top1 == linear.top1
    options = {"crop_edge": "zero", "kd_weight": 1, "kd_temperature": 2}
    second = evaluate_with_reader(make_config(run, fashion_store, mode=["kd"], **options))
    together = read_evaluation(run / "evaluation.json")
    assert together.rows == [*second.rows, *first.rows]
    distilled = [row for row in together.rows if row.images == "distilled"]
    assert [(row.mode, row.crop_edge, row.kd_temperature, row.kd_weight) for row in distilled] == [
        ("kd", "zero", 2, 1),
        ("linear", "clip", 4, 0.5),
        ("kd", "clip", 4, 0),
    ]


def test_a_repeated_measurement_replaces_the_earlier_row_and_reports_it(
    new_run: NewRun, fashion_store: str
) -> None:
    run = new_run()
    asked = make_config(run, fashion_store, mode=["linear"])
    found = evaluate_with_reader(asked)
    path = run / "evaluation.json"
    other = found.rows[0].model_copy(update={"top1": [0.1, 0.3], "top1_mean": 0.2})
    path.write_text(found.model_copy(update={"rows": [other, *found.rows[1:]]}).model_dump_json())
    again = evaluate_with_reader(asked)
    shown = f"{100 * found.rows[0].top1_mean:.1f}"
    assert again.changes == [
        f"replaced: lite0 linear, 2 seeds: 20.0 -> {shown}",
        f"measured again, and the same: {len(found.rows) - 1} rows",
    ]
    assert read_evaluation(path).rows == found.rows
    assert read_evaluation(path).earlier == []


def test_another_protocol_adds_another_row(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    for options in ({}, {"epochs": 5}, {"seeds": 3}, {"views": 3}, {"seed": 1}):
        evaluate_with_reader(make_config(run, fashion_store, **{"mode": ["linear"]} | options))
    rows = [row for row in read_evaluation(run / "evaluation.json").rows if row.images == "distilled"]
    assert [(r.epochs, r.seeds, r.views, r.seed) for r in rows] == [
        (10, 2, 4, 1),
        (10, 2, 3, 0),
        (10, 3, 4, 0),
        (5, 2, 4, 0),
        (10, 2, 4, 0),
    ]


def test_earlier_commands_are_kept_as_long_as_their_rows(new_run: NewRun, fashion_store: str) -> None:
    run, quick = new_run(), {"mode": ["inherit-ridge"], "epochs": 1, "views": 1, "projector_views": 1}
    for options in ({"seeds": 1}, {"backbone": ["lite1"]}, {"backbone": ["lite1"]}, {"seeds": 1}):
        evaluate_with_reader(make_config(run, fashion_store, **quick | options))
    (lite1,) = read_evaluation(run / "evaluation.json").earlier
    hashes = {
        e.backbone: e.backbone_hash for e in read_evaluation(run / "evaluation.json").provenance.entries
    }
    assert (lite1.config["backbone"], lite1.backbones) == (["lite1"], [hashes["lite1"]])
    for seeds in (3, 1):
        evaluate_with_reader(make_config(run, fashion_store, **quick | {"seeds": seeds}))
    earlier = [
        (one.config["backbone"], one.config["seeds"])
        for one in read_evaluation(run / "evaluation.json").earlier
    ]
    assert earlier == [([], 3), (["lite1"], 2)]


def test_rows_of_changed_images_are_dropped_and_reported(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    before = evaluate_with_reader(make_config(run, fashion_store))
    image = next((run / "images").rglob("*.png"))
    Image.open(image).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(image)
    found = evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]))
    assert found.changes == [
        f"dropped: {len(before.rows)} rows of images or data that are no longer those of the run"
    ]
    assert read_evaluation(run / "evaluation.json").rows == found.rows


def test_the_evaluation_file_of_an_older_version_is_extended(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    found = evaluate_with_reader(make_config(run, fashion_store, mode=["linear", "inherit"]))
    old = json.loads((run / "evaluation.json").read_text())
    for row in [*old["rows"], *old["full_data"]]:
        for name in ("backbone_hash", "epochs", "views", "seed", "per_class"):
            row.pop(name, None)
    for name in ("earlier", "changes"):
        old.pop(name)
    (run / "evaluation.json").write_text(json.dumps(old))
    evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]))
    together = read_evaluation(run / "evaluation.json")
    assert list_row_names(together) == [n for n in list_row_names(found) if n[2] == "linear"] + [
        ("distilled", "lite0", "inherit")
    ]
    kept, measured = together.rows[-1], found.rows[1]
    assert kept.model_copy(update={"per_class": measured.per_class}) == measured


def test_projectors_of_another_start_add_rows_and_classifiers(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    for projector_init in ("default", "zero"):
        options = {"mode": ["inherit", "joint"], "backbone": ["lite1"], "projector_init": projector_init}
        evaluate_with_reader(make_config(run, fashion_store, save=True, **options))
    together = read_evaluation(run / "evaluation.json")
    rows = [row for row in together.rows if row.images == "distilled"]
    assert [(r.mode, r.projector_init) for r in rows] == [
        ("inherit", "zero"),
        ("joint", "default"),
        ("inherit", "default"),
    ]
    assert rows[0].top1 != rows[2].top1
    assert make_row_label(rows[2], together) == "Distilled, inherit (projector from default start)"
    assert len([*(run / "classifiers").glob("lite1-inherit*")]) == 2
    assert len([*(run / "classifiers").glob("lite1-joint*")]) == 1


def test_rows_of_joint_and_stage_of_an_earlier_version_are_marked_until_they_are_measured_again(
    new_run: NewRun, fashion_store: str, tmp_path: Path
) -> None:
    """Their training was another one, under the same names."""
    run, path = new_run(), tmp_path / "run" / "evaluation.json"
    evaluate_with_reader(
        make_config(run, fashion_store, mode=["inherit", "joint", "stage"], backbone=["lite1"])
    )
    old = json.loads(path.read_text())
    del old["config"]["projector_init"]
    for row in old["rows"]:
        del row["projector_init"]
    path.write_text(json.dumps(old))
    report(ReportConfig(runs=[run], out=tmp_path / "report.html"))
    assert "Distilled, joint (earlier training)" in (tmp_path / "report.html").read_text()

    again = evaluate_with_reader(
        make_config(run, fashion_store, mode=["joint"], backbone=["lite1"], epochs=5)
    )
    assert "dropped: 1 row of joint or stage as an earlier version trained them" in again.changes
    kept = read_evaluation(path)
    starts = {row.mode: row.projector_init for row in kept.rows if row.images == "distilled"}
    assert starts == {"joint": "default", "inherit": "zero", "stage": None}
    assert kept.earlier[0].config == old["config"]
    (note,) = [note for note in kept.notes if note.startswith(EARLIER_TRAINING)]
    assert f"{EARLIER_TRAINING}: stage on lite1. " in note


def test_an_evaluation_file_of_unknown_content_is_not_overwritten(
    new_run: NewRun, fashion_store: str
) -> None:
    run = new_run()
    (run / "evaluation.json").write_text("my notes")
    with pytest.raises(
        InputError, match=r"evaluation\.json is not what this version of `sfm evaluate` writes"
    ):
        evaluate_with_reader(make_config(run, fashion_store))
    assert (run / "evaluation.json").read_text() == "my notes"


def test_classifiers_of_another_protocol_are_kept(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    for epochs in (10, 5, 10):
        evaluate_with_reader(make_config(run, fashion_store, mode=["linear"], save=True, epochs=epochs))
    files = sorted((run / "classifiers").iterdir())
    assert len(files) == 2
    headers = [safe_open(path, framework="pt").metadata() for path in files]
    assert {header["epochs"] for header in headers} == {"10", "5"}
    assert (run / "classifiers" / "lite0-linear.safetensors") in files


def test_out_writes_results_and_classifiers_to_another_place(
    new_run: NewRun, fashion_store: str, tmp_path: Path
) -> None:
    run, other = new_run(), new_run("other")
    options = {"store": fashion_store, "mode": ["linear"], "save": True, **SHORT}
    evaluate_with_reader(
        make_config(run, fashion_store, mode=["linear"], save=True, out=tmp_path / "results" / "one.json")
    )
    evaluate_runs_with_reader(
        EvaluateRunsConfig.model_validate({"run": [run, other], "out": tmp_path / "many"} | options)
    )
    assert not (run / "evaluation.json").exists()
    assert not (run / "classifiers").exists()
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} >= {
        "results/one.json",
        "results/one-classifiers/lite0-linear.safetensors",
        "many/run/evaluation.json",
        "many/run/classifiers/lite0-linear.safetensors",
        "many/other/evaluation.json",
    }
    with pytest.raises(InputError, match="is one file, for 2 runs: give a folder"):
        evaluate_runs_with_reader(
            EvaluateRunsConfig.model_validate({"run": [run, other], "out": tmp_path / "x.json"} | options)
        )


def test_results_in_one_folder_have_separate_classifier_folders(
    new_run: NewRun, fashion_store: str, tmp_path: Path
) -> None:
    for name, ipc in (("a", 1), ("b", 2)):
        run, out = new_run(name, ipc=ipc), tmp_path / "results" / f"{name}.json"
        found = evaluate_with_reader(make_config(run, fashion_store, mode=["linear"], save=True, out=out))
        path = tmp_path / "results" / f"{name}-classifiers" / "lite0-linear.safetensors"
        assert safe_open(path, framework="pt").metadata()["images"] == found.provenance.images
    first = tmp_path / "results" / "a-classifiers" / "lite0-linear.safetensors"
    assert safe_open(first, framework="pt").metadata()["images"] != found.provenance.images


def test_the_result_of_another_run_is_not_overwritten(
    new_run: NewRun, fashion_store: str, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    found = evaluate_with_reader(make_config(new_run(), fashion_store, mode=["linear"], out=out))
    with pytest.raises(InputError, match="holds the result of other images than those in"):
        evaluate_with_reader(make_config(new_run("other", ipc=2), fashion_store, mode=["linear"], out=out))
    assert read_evaluation(out / "evaluation.json").rows == found.rows


def test_an_unwritable_output_is_refused_before_any_computation(new_run: NewRun, fashion_store: str) -> None:
    run, events = new_run(), list[Progress]()
    (run / "evaluation.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*evaluation\.json: .*; give --out"):
        evaluate_with_reader(make_config(run, fashion_store), events.append)
    assert events == []


def make_result_unwritable(run: Path) -> Callable[[Progress], None]:
    """Make the result unwritable once all is being trained."""
    return lambda event: (run / "evaluation.json").mkdir(exist_ok=True)


def test_a_failed_write_raises_an_error_that_holds_the_results(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    with pytest.raises(NotWrittenError, match=r"cannot .*evaluation\.json: Is a directory") as refused:
        evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]), make_result_unwritable(run))
    (found,) = refused.value.evaluations
    assert found.rows[0].mode == "linear"
    (run / "evaluation.json").rmdir()
    events = list[Progress]()
    assert (
        evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]), events.append).rows
        == found.rows
    )
    assert not any("heads" in event.stage for event in events)


@pytest.mark.parametrize("form", ["table", "json"])
def test_the_command_prints_results_that_it_could_not_write(
    new_run: NewRun, fashion_store: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfm.eval import evaluation as stage

    run = new_run()
    monkeypatch.setattr(stage, "write_output", lambda path, data: raise_disk_full(path))
    flags = [*FLAGS, "--mode", "linear", "--quiet", *(["--json"] if form == "json" else [])]
    done = CliRunner().invoke(app, ["evaluate", str(run), "--store", fashion_store, *flags])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"error: cannot write {run / 'evaluation.json'}: disk full"
    if form == "json":
        assert json.loads(done.stdout)["rows"][0]["mode"] == "linear"
    else:
        assert "distilled" in done.stdout
        assert "Written to" not in done.stdout


def raise_disk_full(path: Path) -> None:
    raise InputError(f"cannot write {path}: disk full")


@pytest.mark.parametrize("moment", ["views", "blocks", "epochs"])
def test_an_interrupted_evaluation_resumes_with_the_same_numbers(
    new_run: NewRun, fashion_store: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfm.backbones.view_batches.CPU_BATCH_PIXELS", 7 * 32**2)
    whole = evaluate_with_reader(make_config(new_run("whole"), fashion_store))
    run = new_run()

    def interrupt(event: Progress) -> None:
        if event.unit == moment and ("random" in event.stage or moment == "blocks") and event.done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_with_reader(make_config(run, fashion_store), interrupt)
    assert any((run / "evaluation.partial").iterdir())
    for path in [*(run / "evaluation.partial").iterdir()][:1]:
        path.write_bytes(path.read_bytes()[:-3])  # as no atomic write leaves it, and worth nothing
    events = list[Progress]()
    found = evaluate_with_reader(make_config(run, fashion_store), events.append)
    assert found.rows == whole.rows
    assert found.full_data == whole.full_data
    assert not (run / "evaluation.partial").exists()


def test_computed_views_are_not_recomputed_after_an_interrupt(
    new_run: NewRun, fashion_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfm.backbones.view_batches.CPU_BATCH_PIXELS", 10 * 32**2)
    monkeypatch.setattr(work_folder, "SECONDS_BETWEEN_WRITES", 0.0)
    run, events = new_run(), list[Progress]()

    def interrupt(event: Progress) -> None:
        if event.done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]), interrupt)
    assert len(list((run / "evaluation.partial").iterdir())) == 3
    evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]), events.append)
    first = [event.done for event in events if "distilled" in event.stage and event.unit == "views"]
    assert first == [30, 40, 50, 60, 70, 80]


def test_a_finished_evaluation_keeps_the_partial_results_of_another(
    new_run: NewRun, fashion_store: str
) -> None:
    run, events = new_run(), list[Progress]()
    interrupted = make_config(run, fashion_store, mode=["linear"])

    def interrupt(event: Progress) -> None:
        if "random" in event.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_with_reader(interrupted, interrupt)
    evaluate_with_reader(make_config(run, fashion_store, mode=["inherit-statistics"], views=3, epochs=2))
    evaluate_with_reader(interrupted, events.append)
    assert not any("distilled" in event.stage for event in events)
    assert not (run / "evaluation.partial").exists()


def test_an_interrupted_command_says_whether_it_resumes_or_starts_over(
    new_run: NewRun, fashion_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfm.eval import evaluation as stage

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    run = new_run()
    monkeypatch.setattr("sfm.eval.row_training.fit_heads_by_mode", stop)
    command = ["evaluate", str(run), "--store", fashion_store, *FLAGS, "--quiet"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 130
    kept = run / "evaluation.partial"
    assert f"partial results are in {kept}: run the same command again to resume" in done.stderr
    shutil.rmtree(kept)
    monkeypatch.setattr(stage, "read_distilled_run", stop)
    assert "run the same command again to start over" in CliRunner().invoke(app, command).stderr
    monkeypatch.setattr("sfm.cli.show_progress", stop)  # as while the stage is being imported
    assert "run the same command again to start over" in CliRunner().invoke(app, command).stderr


def test_an_unwritable_work_folder_is_a_warning_and_the_evaluation_finishes(
    new_run: NewRun, fashion_store: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run()
    (run / "evaluation.partial").write_text("a file where the folder should be")
    evaluate_with_reader(make_config(run, fashion_store, mode=["linear"]))
    assert [record.message.split(":")[0] for record in caplog.records] == ["an interruption would start over"]

"""Several runs, all backbones, and evaluations that are repeated from their own record."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfm.cli import app
from sfm.errors import InputError
from sfm.eval.backbone_matrix import make_matrix
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.evaluation import evaluate_runs_with_reader, evaluate_with_reader
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.store import Entry, open_store

pytestmark = pytest.mark.slow

NewRun = Callable[..., Path]
SHORT = {"epochs": 20, "views": 4, "projector_views": 6, "seeds": 2, "device": "cpu"}
FLAGS = ["--epochs", "20", "--views", "4", "--projector-views", "6", "--seeds", "2", "--device", "cpu"]


@pytest.fixture
def two_runs(tmp_path: Path, write_run: NewRun, lite0_entry: Entry, lite1_entry: Entry) -> list[Path]:
    return [write_run(tmp_path / "on0", lite0_entry), write_run(tmp_path / "on1", lite1_entry)]


def test_two_runs_on_all_backbones_give_a_matrix_of_every_mode(
    two_runs: list[Path], fashion_store: str
) -> None:
    config = EvaluateRunsConfig.model_validate(
        {"run": two_runs, "store": fashion_store, "backbone": ["all"]} | SHORT
    )
    found = evaluate_runs_with_reader(config)
    cells = make_matrix(found)
    assert [(c.run, c.distilled_on, c.backbone, c.mode) for c in cells] == [
        (str(run), on, backbone, mode)
        for run, on in zip(two_runs, ("lite0", "lite1"), strict=True)
        for backbone in ("lite0", "lite1")
        for mode in ("linear", "inherit", "inherit-statistics")
    ]
    for run, evaluation in zip(two_runs, found, strict=True):
        assert json.loads((run / "evaluation.json").read_text()) == evaluation.model_dump(mode="json")
        alone = evaluate_with_reader(EvaluateConfig.model_validate(evaluation.config))
        assert alone.rows == evaluation.rows
        assert alone.full_data == evaluation.full_data


def test_backbone_all_selects_entries_of_the_same_data_and_role(
    tmp_path: Path, fashion_store: str, write_run: NewRun
) -> None:
    store = open_store(fashion_store)
    (tuning,) = [s for s in store.list_summaries() if s.role == "tuning" and s.backbone == "lite1"]
    run = write_run(tmp_path / "run", store.open_entry(tuning))
    found = evaluate_with_reader(
        EvaluateConfig.model_validate(
            {"run": run, "store": fashion_store, "backbone": ["all"], "mode": ["inherit-statistics"]} | SHORT
        )
    )
    assert [e.backbone for e in found.provenance.entries] == ["lite0", "lite1"]
    assert {e.held_out_samples for e in found.provenance.entries} == {tuning.test_samples}


def test_backbone_all_skips_backbones_that_cannot_be_loaded_and_notes_them(
    two_runs: list[Path], fashion_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfm.eval import evaluation

    load = evaluation.load_backbone

    def without_lite1(spec: str, **options: object) -> object:
        if spec == "lite1":
            raise InputError("no such weights on this machine")
        return load(spec, **options)

    monkeypatch.setattr(evaluation, "load_backbone", without_lite1)
    options = {"store": fashion_store, "mode": ["inherit-statistics"]} | SHORT
    found = evaluate_with_reader(
        EvaluateConfig.model_validate({"run": two_runs[0], "backbone": ["all"]} | options)
    )
    assert {r.backbone for r in found.rows} == {"lite0"}
    assert "lite1 is left out: no such weights on this machine." in found.notes
    for asked in (["all", "lite1"], ["lite1"]):
        with pytest.raises(InputError, match="no such weights"):
            evaluate_with_reader(
                EvaluateConfig.model_validate({"run": two_runs[0], "backbone": asked} | options)
            )


def test_evaluating_runs_of_different_data_together_is_refused(
    tmp_path: Path, lite0_entry: Entry, write_run: NewRun, fashion_store: str
) -> None:
    store = open_store(fashion_store)
    (tuning,) = [s for s in store.list_summaries() if s.role == "tuning" and s.backbone == "lite0"]
    runs = [write_run(tmp_path / "a", lite0_entry), write_run(tmp_path / "b", store.open_entry(tuning))]
    with pytest.raises(InputError, match="are of different data"):
        evaluate_runs_with_reader(EvaluateRunsConfig(run=runs, store=fashion_store))
    assert not any((run / "evaluation.json").exists() for run in runs)


def test_no_run_is_evaluated_while_another_is_incomplete(two_runs: list[Path], fashion_store: str) -> None:
    shutil.rmtree(two_runs[1] / "images")
    with pytest.raises(InputError, match="on1/images is missing"):
        evaluate_runs_with_reader(EvaluateRunsConfig(run=two_runs, store=fashion_store))
    assert not (two_runs[0] / "evaluation.json").exists()


@pytest.mark.parametrize("digest", [None, "as distilled", "another"])
def test_edited_images_are_evaluated_and_noted(
    new_run: NewRun, fashion_store: str, digest: str | None
) -> None:
    from sfm.eval.distilled_run import read_distilled_run

    run = new_run()
    record = json.loads((run / "run.json").read_text())
    if digest is not None:
        record["images"] = (
            compute_array_digest(read_distilled_run(run).pixels) if digest == "as distilled" else "0" * 64
        )
        (run / "run.json").write_text(json.dumps(record))
    found = evaluate_with_reader(EvaluateConfig.model_validate({"run": run, "store": fashion_store} | SHORT))
    assert found.provenance.edited == {None: None, "as distilled": False, "another": True}[digest]
    assert any("edited" in note for note in found.notes) == (digest == "another")


def test_the_command_prints_the_matrix_and_can_be_repeated_from_its_output(
    two_runs: list[Path], fashion_store: str
) -> None:
    runner, runs = CliRunner(), [str(run) for run in two_runs]
    modes = ["--mode", "linear", "--mode", "inherit-statistics"]
    asked = ["evaluate", *runs, "--store", fashion_store, "--backbone", "all", *modes, *FLAGS, "--quiet"]
    shown = runner.invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "Top-1 %, by the backbone evaluated on" in shown.output
    document = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    assert len(document["evaluations"]) == 2
    assert len(document["matrix"]) == 2 * 2 * 2

    first = document["evaluations"][0]
    (two_runs[0] / "evaluation.json").rename(two_runs[0] / "before.json")
    repeat = ["--config", f"{runs[0]}/before.json", "--trust-config", "--quiet", "--json"]
    again = runner.invoke(app, ["evaluate", *repeat])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["rows"] == first["rows"]
    assert json.loads((two_runs[0] / "evaluation.json").read_text())["rows"] == first["rows"]
    other = runner.invoke(app, ["evaluate", runs[1], *repeat, "--seed", "5"])
    assert json.loads(other.stdout)["config"] == first["config"] | {"run": runs[1], "seed": 5}


@pytest.mark.parametrize(
    ("mode", "guess"), [("inhert", "did you mean inherit"), ("KD", "should be 'linear'"), ("joit", "joint?")]
)
def test_an_unknown_mode_raises_a_one_line_error_with_close_matches(
    new_run: NewRun, fashion_store: str, mode: str, guess: str
) -> None:
    asked = ["evaluate", str(new_run()), "--store", fashion_store, "--mode", mode]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --mode {mode}: ")
    assert guess in line

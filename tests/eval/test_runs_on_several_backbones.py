"""Runs that were distilled on several backbones: each is one "distilled on", every other one is unseen."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from rich.console import Console
from safetensors.numpy import load_file, safe_open

from sfm import accuracies, tables
from sfm.errors import InputError
from sfm.eval.backbone_matrix import make_matrix
from sfm.eval.combined_results import combine_evaluations, read_evaluation_if_exists
from sfm.eval.config import EvaluateConfig
from sfm.eval.distilled_labels import describe_how_to_add_soft_labels
from sfm.eval.distilled_run import RunRecord, read_distilled_run
from sfm.eval.evaluated_backbones import list_requested_backbones
from sfm.eval.evaluation import evaluate_with_reader
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.hub_cards import list_accuracy_table_rows
from sfm.eval.export.run_export import export
from sfm.eval.report.page import render_page
from sfm.eval.report.report_content import make_report_content
from sfm.eval.report.reported_runs import ReportedRun, read_reported_runs
from sfm.eval.report.reproduction_commands import make_distill_command
from sfm.eval.result import Evaluation
from sfm.stats_store.store import Entry, open_store

Change = Callable[[list[dict]], object]


@pytest.fixture
def run(two_backbone_run: Path, tmp_path: Path) -> Path:
    """A copy of the run on two backbones that a test may change."""
    return Path(shutil.copytree(two_backbone_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def evaluation(two_backbone_run: Path) -> Evaluation:
    return read_evaluation(two_backbone_run)


@pytest.fixture(scope="module")
def reported_run(two_backbone_run: Path, fashion_store: str) -> ReportedRun:
    return read_reported_runs([two_backbone_run], [fashion_store])[0]


def read_evaluation(run: Path) -> Evaluation:
    evaluation = read_evaluation_if_exists(run / "evaluation.json")
    assert evaluation
    return evaluation


def add_unseen_backbone(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation that was also made on lite2: with the accuracies on lite1, listed first."""
    other = {"backbone": "lite2", "unseen": True}
    rows = [
        r.model_copy(update=other | {"backbone_hash": "2"}) for r in evaluation.rows if r.backbone == "lite1"
    ]
    full = [f.model_copy(update=other) for f in evaluation.full_data if f.backbone == "lite1"]
    return evaluation.model_copy(
        update={"rows": [*rows, *evaluation.rows], "full_data": [*full, *evaluation.full_data]}
    )


def change_backbones(run: Path, change: Change) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record["backbones"])
    (run / "run.json").write_text(json.dumps(record))


def test_a_run_is_evaluated_on_all_backbones_that_it_was_distilled_on(
    evaluation: Evaluation, lite0_entry: Entry, lite1_entry: Entry
) -> None:
    assert list(dict.fromkeys(row.backbone for row in evaluation.rows)) == ["lite0", "lite1"]
    assert [entry.entry_digest for entry in evaluation.provenance.source_entries] == [
        lite0_entry.summary.entry_digest,
        lite1_entry.summary.entry_digest,
    ]
    assert evaluation.provenance.distilled_from == lite0_entry.summary.entry_digest
    assert {row.unseen for row in (*evaluation.rows, *evaluation.full_data)} == {False}
    assert {cell.unseen for cell in make_matrix([evaluation])} == {False}
    assert {cell.distilled_on for cell in make_matrix([evaluation])} == {"lite0 and lite1"}


@pytest.mark.parametrize("backbone", ["lite0", "lite1"])
def test_a_backbone_distilled_on_inherits_its_own_classifier(
    two_backbone_run: Path, lite0_entry: Entry, lite1_entry: Entry, backbone: str
) -> None:
    own = {"lite0": lite0_entry, "lite1": lite1_entry}[backbone]
    for mode in ("inherit", "inherit-statistics"):
        path = two_backbone_run / "classifiers" / f"{backbone}-{mode}.safetensors"
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()["distilled_on_hash"] == own.backbone.hash
        tensors = load_file(path)
        composed = own.read_array("classifier/weight") @ tensors["projector_weight"]
        np.testing.assert_allclose(tensors["weight"], composed, rtol=1e-3, atol=1e-4)


def test_any_other_backbone_is_unseen(finished_run: Path) -> None:
    found = read_evaluation(finished_run)
    assert {(row.backbone, row.unseen) for row in (*found.rows, *found.full_data)} == {
        ("lite0", False),
        ("lite1", True),
    }


def test_whether_a_row_is_unseen_follows_from_the_run_whatever_a_file_says(finished_run: Path) -> None:
    found = read_evaluation(finished_run)
    own, other = ([r for r in found.rows if r.backbone == name] for name in ("lite0", "lite1"))
    lies = [
        row.model_copy(update={"unseen": claim}) for row, claim in zip(other, [None, False] * 9, strict=False)
    ]
    combined = combine_evaluations(
        found.model_copy(update={"rows": own}), found.model_copy(update={"rows": lies}), 20
    )
    assert {(row.backbone, row.unseen) for row in combined.rows} == {("lite0", False), ("lite1", True)}


def test_the_backbones_asked_for_have_their_sizes_and_specs_of_the_run(two_backbone_run: Path) -> None:
    record = json.loads((two_backbone_run / "run.json").read_text())
    first, second = record["backbones"]
    other_size = json.loads(json.dumps(first)) | {"image_size": 64, "entry_digest": "6" * 64, "spec": "lite0"}
    other_size["backbone"]["preprocessing"]["input_size"] = 64  # another hash
    second["spec"] = "lite1@/weights.safetensors"
    record["backbones"] = [first, second, other_size]
    read = RunRecord.model_validate(record)
    assert read.largest_image_size == 64
    assert read.format_backbones_with_sizes() == "lite0 at 32 px, lite1 at 32 px and lite0 at 64 px"
    assert read.format_backbone_names() == "lite0 at 32 px, lite1 and lite0 at 64 px"

    def list_asked(*specs: str, image_size: int | None = None) -> list[tuple[str, int | None]]:
        config = EvaluateConfig(run=Path("run"), store="store", backbone=list(specs), image_size=image_size)
        return [(asked.spec, asked.image_size) for asked in list_requested_backbones(config, read, [])]

    own = [("lite0", 32), ("lite1@/weights.safetensors", 32), ("lite0", 64)]
    assert list_asked() == own
    assert list_asked("lite0") == [("lite0", 32), ("lite0", 64)]
    assert list_asked("lite2", "lite0", image_size=96) == [("lite2", 96), ("lite0", 96)]
    assert list_asked("all") == [("lite0", 32), ("lite0", 64), ("lite1@/weights.safetensors", 32)]


@pytest.fixture(scope="module")
def two_size_evaluation(evaluation: Evaluation) -> Evaluation:
    """The evaluation as of one backbone at two sizes: lite1 is renamed to lite0 at 48 px."""
    document = json.loads(evaluation.model_dump_json())
    provenance = document["provenance"]
    for part in (
        *(document["rows"] + document["full_data"]),
        *(provenance["entries"] + provenance["distilled_from_entries"]),
    ):
        if part["backbone"] == "lite1":
            part |= {"backbone": "lite0", "image_size": 48}
    return Evaluation.model_validate(document)


def test_one_backbone_at_two_sizes_has_two_columns_and_rows_with_sizes(
    two_size_evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [cell.model_dump(mode="json") for cell in make_matrix([two_size_evaluation])]
    accuracies.print_cross_backbone_matrix(cells)
    matrix = capsys.readouterr().out
    for cell in cells:
        assert f"{100 * cell['top1_mean']:.1f}" in matrix
    accuracies.print_evaluation_rows_and_notes(two_size_evaluation.model_dump(mode="json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(", distilled on lite0 at 32 px and lite0 at 48 px")
    for name in ("lite0 at 32 px", "lite0 at 48 px"):
        assert name in matrix
        assert any(name in line and " linear " in line for line in lines[1:])


def test_a_card_names_one_backbone_at_two_sizes_by_its_sizes(
    reported_run: ReportedRun, two_size_evaluation: Evaluation
) -> None:
    rows = list_accuracy_table_rows(replace(reported_run, evaluation=two_size_evaluation))
    assert {name for name, _, _ in rows} == {"lite0 at 32 px", "lite0 at 48 px"}
    assert len({(name, label) for name, label, _ in rows}) == len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda backbones: backbones.clear(), "backbones: list should have at least 1 item"),
        (lambda backbones: backbones.reverse(), "backbones: the first is another one than the run names"),
        (lambda backbones: backbones.append(backbones[1]), "backbones: one backbone is there twice"),
        (
            lambda backbones: backbones[1].update(entry_digest=backbones[0]["entry_digest"]),
            "backbones: one entry is there twice",
        ),
        (
            lambda backbones: backbones.extend(backbones * 100),
            "backbones: list should have at most 100 items",
        ),
        (lambda backbones: backbones[1].update(weight=-1), "backbones.1.weight: input should be greater"),
        (lambda backbones: backbones[1].update(weight=1e308), "backbones.1.weight: input should be less"),
        (
            lambda backbones: backbones[1].update(spec="x" * 10**6),
            "backbones.1.spec: string should have",
        ),
        (lambda backbones: backbones[1].pop("backbone"), "backbones.1.backbone: field required"),
    ],
)
def test_backbones_that_no_run_has_are_refused_in_one_line(run: Path, change: Change, message: str) -> None:
    change_backbones(run, change)
    with pytest.raises(InputError, match=message) as refused:
        read_distilled_run(run)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500 + len(str(run))


def test_entries_that_the_store_lacks_or_that_are_of_other_data_are_refused_in_one_line(
    run: Path, fashion_store: str
) -> None:
    store = open_store(fashion_store)
    (tuning,) = [s for s in store.list_summaries() if (s.role, s.backbone) == ("tuning", "lite1")]
    config = EvaluateConfig(run=run, store=fashion_store)
    for digest, message in [
        ("0" * 64, "holds no such entry"),
        (tuning.entry_digest, r"run.json names entries of different data: .*\(tuning\)"),
    ]:
        change_backbones(run, lambda backbones, digest=digest: backbones[1].update(entry_digest=digest))
        with pytest.raises(InputError, match=message) as refused:
            evaluate_with_reader(config)
        assert "\n" not in str(refused.value)


@pytest.fixture
def print_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    def print_lines(print_function: Callable[..., None], document: object) -> list[str]:
        monkeypatch.setattr(
            tables,
            "open_console",
            lambda: Console(width=80, force_terminal=True, color_system=None, highlight=False),
        )
        print_function(document)
        return capsys.readouterr().out.splitlines()

    return print_lines


def test_the_table_has_a_second_block_for_unseen_backbones_only_if_there_are_any(
    evaluation: Evaluation, print_80_columns: Callable[..., list[str]]
) -> None:
    lines = print_80_columns(accuracies.print_evaluation_rows_and_notes, evaluation.model_dump(mode="json"))
    assert sum(line.startswith("Accuracy on ") for line in lines) == 1
    assert lines[0].endswith(", distilled on lite0 and lite1")
    assert not any("nseen" in line for line in lines)
    assert any(line.endswith("seeds") and len(line) <= 80 for line in lines)
    more = add_unseen_backbone(evaluation).model_dump(mode="json")
    lines = print_80_columns(accuracies.print_evaluation_rows_and_notes, more)
    (first, second) = [i for i, line in enumerate(lines) if line.startswith("Accuracy on ")]
    assert lines[second].startswith("Accuracy on unseen backbones: ")
    assert not any("lite2" in line for line in lines[first:second])
    assert any("lite2" in line for line in lines[second:])
    rows = [line for line in lines[second + 1 :] if not line.startswith("LRS of the distilled images: ")]
    assert not any(name in line for line in rows for name in ("lite0 ", "lite1 "))
    assert any(line.startswith("Unseen: the images were not distilled on") for line in lines)


def test_the_matrix_tells_cells_and_columns_that_are_unseen(
    evaluation: Evaluation, finished_run: Path, print_80_columns: Callable[..., list[str]]
) -> None:
    both = [add_unseen_backbone(evaluation), read_evaluation(finished_run)]
    cells = [cell.model_dump(mode="json") for cell in make_matrix(both)]
    lines = print_80_columns(accuracies.print_cross_backbone_matrix, cells)
    note = lines.index("In parentheses: unseen, that run was not distilled on this backbone.")
    (seen, unseen) = [i for i, line in enumerate(lines) if line.startswith("Top-1 %, ")]
    assert seen < note < unseen
    # The run on lite0 alone has its accuracies on lite1 in parentheses, the run on both has none.
    assert sum(line.count("(") for line in lines[seen:note]) == 3
    assert any("lite2" in line for line in lines[unseen:])
    assert not any("(" in line for line in lines[unseen:])


def test_the_report_names_all_backbones_and_shows_unseen_ones_last(
    reported_run: ReportedRun, evaluation: Evaluation
) -> None:
    alone = make_report_content([reported_run])
    (section,) = alone.accuracy_sections
    assert [(b.title, [g.backbone for g in b.backbone_groups]) for b in section.blocks] == [
        ("", ["lite0", "lite1"])
    ]
    more = replace(reported_run, evaluation=add_unseen_backbone(evaluation))
    content = make_report_content([more])
    assert "distilled on lite0 and lite1 at 32 px" in content.title
    (section,) = content.accuracy_sections
    assert [(b.title, [g.backbone for g in b.backbone_groups]) for b in section.blocks] == [
        ("Distilled on", ["lite0", "lite1"]),
        ("Unseen backbones", ["lite2"]),
    ]
    assert "lite2 (unseen)" in section.chart
    facts = [
        (f.label, f.note.partition(":")[0]) for f in content.run_summaries[0].facts if "Top-1" in f.label
    ]
    assert facts == [
        ("Top-1 accuracy", "linear on lite0"),
        ("Top-1 accuracy", "linear on lite1"),
        ("Top-1, unseen", "inherit on lite2"),
    ]
    for table in content.matrix_tables:
        assert table.columns == ["lite0", "lite1", "lite2"]
        assert table.column_groups == [("distilled on", 2), ("unseen", 1)]
        assert [name for name, _ in table.rows] == ["lite0 and lite1", "all real images"]
    (provenance,) = content.provenance_sections
    assert [f.value.partition(",")[0] for f in provenance.facts if f.label == "Backbone"] == [
        "lite0",
        "lite1",
    ]
    assert [f.note for f in provenance.facts if f.label == "Backbone"] == ["", "weight 0.5"]
    assert sum(f.label == "Entry" for f in provenance.facts) == 2
    assert 'colspan="2">distilled on</th>' in render_page(content)


def test_runs_side_by_side_have_accuracies_on_unseen_backbones_in_parentheses(
    reported_run: ReportedRun, finished_run: Path
) -> None:
    (other,) = read_reported_runs([finished_run], [])
    content = make_report_content([reported_run, replace(other, name="lite0 alone")])
    table = content.comparison_tables[0]
    cells = {name: [cell.text for cell in cells] for name, cells in table.rows}
    for name, (on_both, on_lite0) in cells.items():
        assert not on_both.startswith("(")
        assert on_lite0.startswith("(") == (name.startswith("lite1: Distilled") and on_lite0 != "–")
    assert "In parentheses: unseen" in table.note


def test_the_command_in_the_report_names_all_backbones(reported_run: ReportedRun) -> None:
    words = shlex.split(make_distill_command(reported_run))
    given = [(flag, value) for flag, value in pairwise(words) if flag.startswith("--")]
    assert [value for flag, value in given if flag == "--backbone"] == ["lite0", "lite1"]
    assert [value for flag, value in given if flag == "--image-size"] == ["32", "32"]
    assert [value for flag, value in given if flag == "--backbone-weight"] == ["1.0", "0.5"]


def test_the_command_that_adds_labels_names_sizes_and_files_of_weights(two_backbone_run: Path) -> None:
    document = json.loads((two_backbone_run / "run.json").read_text())
    command = describe_how_to_add_soft_labels(two_backbone_run, RunRecord.model_validate(document))
    assert f"@{document['entry_digest'][:12]} --image-size 32 --image-size 32 --resume" in command
    document["backbones"][1]["spec"] = "timm/net@/weights.safetensors"
    command = describe_how_to_add_soft_labels(two_backbone_run, RunRecord.model_validate(document))
    assert "--backbone lite0 --backbone timm/net@/weights.safetensors --resume --soft-labels`" in command


def test_a_card_names_all_backbones(two_backbone_run: Path, tmp_path: Path) -> None:
    export(ExportConfig(run=two_backbone_run, out=tmp_path / "out", format="imagefolder"))
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.pretty_name == "fashion-mnist-6k, distilled on lite0 and lite1"
    assert "each of the frozen backbones `lite0` and `lite1` in the place" in card.text
    assert "| lite1 | 32 px | 0.5, 0.5, 0.5 | 0.5, 0.5, 0.5 |" in card.text
    assert card.text.count("| backbone | lite") == 2
    assert "made for 2 backbones" in card.text


def test_the_classifier_of_any_backbone_distilled_on_is_exported_without_a_projector(
    two_backbone_run: Path, fashion_store: str, lite1_entry: Entry, tmp_path: Path
) -> None:
    asked = {"run": two_backbone_run, "format": "classifier", "store": fashion_store, "backbone": "lite1"}
    export(ExportConfig.model_validate(asked | {"out": tmp_path / "out"}))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == {"weight", "bias"}
    assert (tensors["weight"] == lite1_entry.read_array("classifier/weight")).all()

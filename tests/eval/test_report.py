import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfm.errors import InputError
from sfm.eval.backbone_matrix import make_matrix
from sfm.eval.output_files import make_distinct_directory_names
from sfm.eval.report.charts import AccuracyBar, draw_bar_chart
from sfm.eval.report.comparison_tables import describe_training_mismatch
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.gallery import MAX_GALLERY_CLASSES, MAX_GALLERY_IMAGES
from sfm.eval.report.page import render_page, report
from sfm.eval.report.report_content import make_report_content
from sfm.eval.report.reported_runs import ReportedRun, read_reported_runs
from sfm.eval.report.row_selection import find_headline_row, list_unseen_inherit_rows, make_row_label
from sfm.eval.report.text_format import format_decimal_bytes, format_sfm_command, format_wall_time
from sfm.eval.result import ConfusedPair
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import Entry, open_or_create_store
from sfm.text import format_percent

SFM = str(Path(sys.executable).with_name("sfm"))


class Page(HTMLParser):
    """What is in a page, as a browser would find it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.quiet = 0
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.quiet += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.quiet -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self.quiet:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_report(out: Path, *runs: Path, store: list[str] | None = None) -> Page:
    return Page(report(ReportConfig(runs=list(runs), out=out, store=store or [])).read_text())


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(finished_run: Path, fashion_store: str, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(out, finished_run, store=[fashion_store])


@pytest.fixture(scope="module")
def reported_run(finished_run: Path) -> ReportedRun:
    return read_reported_runs([finished_run], [])[0]


def edit_image(image: Path) -> None:
    pixels = np.asarray(Image.open(image)).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(image)


def publish_without_exemplars(entry: Entry, place: Path) -> str:
    """Publish an entry again, in a store of its own, without its real images; return its digest."""
    draft = Draft(open_or_create_store(str(place)))
    for name in entry.list_array_names():
        if not name.startswith("exemplar/"):
            draft.write_array(name, entry.read_array(name))
    published = publish_draft(draft, entry.backbone, entry.dataset, entry.extraction, entry.classifier)
    return published.summary.entry_digest


def test_a_report_has_no_external_references(page: Page) -> None:
    places = [a.get(name) for _, a in page.tags for name in ("src", "href", "xlink:href") if a.get(name)]
    assert len(places) > 40
    assert all(place.startswith(("data:", "#")) for place in places if place)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_image_has_alt_text_with_its_class_name(page: Page) -> None:
    shown = [image for image in page.all("img") if (image["alt"] or "").startswith("Distilled image of ")]
    assert len(shown) == 20
    assert shown[0]["alt"] == "Distilled image of T-shirt/top: distilled 1"
    assert shown[-1]["alt"] == "Distilled image of Ankle boot: distilled 2"
    assert all(image["alt"] for image in page.all("img")[:-1])  # the last is filled in by zooming


def test_real_images_are_shown_only_if_a_store_is_given(
    page: Page, finished_run: Path, tmp_path: Path
) -> None:
    def list_real_images(found: Page) -> list[str]:
        return [i["alt"] or "" for i in found.all("img") if (i["alt"] or "").startswith("Real image")]

    assert len(list_real_images(page)) == 20
    assert list_real_images(page)[1] == "Real image of T-shirt/top: the real image nearest to distilled 2"
    assert list_real_images(write_report(tmp_path / "plain.html", finished_run)) == []


def test_without_an_evaluation_the_real_image_nearest_to_the_mean_is_shown(
    run: Path, fashion_store: str, tmp_path: Path
) -> None:
    (run / "evaluation.json").unlink()
    page = write_report(tmp_path / "r.html", run, store=[fashion_store])
    real = [i["alt"] for i in page.all("img") if (i["alt"] or "").startswith("Real image")]
    assert len(real) == 10
    assert real[0] == "Real image of T-shirt/top: the real image nearest to the class mean"


def test_a_store_without_exemplars_still_reports_its_cost(
    run: Path, lite0_entry: Entry, tmp_path: Path
) -> None:
    digest = publish_without_exemplars(lite0_entry, tmp_path / "store")
    record = json.loads((run / "run.json").read_text())
    record["entry_digest"] = record["backbones"][0]["entry_digest"] = digest
    (run / "run.json").write_text(json.dumps(record))
    page = write_report(tmp_path / "r.html", run, store=[str(tmp_path / "store")])
    assert "Statistics in the store" in page.text
    assert not any((i["alt"] or "").startswith("Real image") for i in page.all("img"))


def test_a_report_compares_the_bytes_of_distilled_and_real_images(
    page: Page, finished_run: Path, fashion_store: str
) -> None:
    record = json.loads((finished_run / "run.json").read_text())
    distilled = sum(path.stat().st_size for path in finished_run.glob("images/*/*.png"))
    real = record["train_samples"] * 28 * 28
    assert format_decimal_bytes(real) in page.text
    assert f"Bytes of real images per distilled byte{real / distilled:,.1f}" in page.text


def test_reported_accuracies_match_the_evaluation(page: Page, finished_run: Path) -> None:
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    for row in evaluation["rows"]:
        if row["seeds"] > 1:
            assert f"{100 * row['top1_mean']:.1f} ± {100 * row['top1_std']:.1f}" in page.text
    for row in evaluation["full_data"]:
        assert f"{100 * row['top1']:.1f}" in page.text
    row = next(r for r in evaluation["rows"] if r["mode"] == "linear" and r["backbone"] == "lite0")
    pair = row["confused"][0]
    names = [c["name"] for c in json.loads((finished_run / "classes.json").read_text())]
    share = pair["count"] / sum(row["confusion"][pair["right"]])
    assert f"{names[pair['right']]}{names[pair['predicted']]}{100 * share:.1f} %" in page.text


def test_the_summary_shows_linear_and_cross_backbone_inherit_accuracy(
    reported_run: ReportedRun,
) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    rows = {(r.images, r.backbone, r.mode): r for r in evaluation.rows}
    (summary,) = make_report_content([reported_run]).run_summaries
    accuracies = [(f.label, f.value, f.note.partition(":")[0]) for f in summary.facts if "Top-1" in f.label]
    assert accuracies == [
        (
            "Top-1 accuracy",
            f"{format_percent(rows['distilled', 'lite0', 'linear'].top1_mean)} %",
            "linear on lite0",
        ),
        (
            "Top-1, unseen",
            f"{format_percent(rows['distilled', 'lite1', 'inherit'].top1_mean)} %",
            "inherit on lite1",
        ),
    ]
    alone = [r for r in evaluation.rows if (r.backbone, r.mode) == ("lite0", "inherit")]
    only_own = replace(reported_run, evaluation=evaluation.model_copy(update={"rows": alone}))
    (summary,) = make_report_content([only_own]).run_summaries
    assert [f.value for f in summary.facts if "Top-1" in f.label] == ["not measured"]


@pytest.mark.parametrize("has_hashes", [True, False])
def test_the_source_backbone_at_another_input_size_is_another_backbone(
    reported_run: ReportedRun, has_hashes: bool
) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    at_32 = [row for row in evaluation.rows if row.backbone == "lite0"]
    changes = {"image_size": 48, "backbone_hash": "another", "top1_mean": 0.99}
    rows = [*(row.model_copy(update=changes) for row in at_32), *at_32]
    provenance = evaluation.provenance
    if not has_hashes:  # files of older versions tell backbones apart by input size alone
        rows = [row.model_copy(update={"backbone_hash": None}) for row in rows]
        provenance = provenance.model_copy(update={"distilled_on_hash": None})
    both = evaluation.model_copy(update={"rows": rows, "provenance": provenance})
    headline = find_headline_row(both)
    assert headline
    assert headline.image_size == 32
    assert [row.image_size for row in list_unseen_inherit_rows(both)] == [48]
    assert [row.image_size for row in rows if "own backbone" in make_row_label(row, both)] == [32]
    assert [(cell.mode, cell.own_backbone) for cell in make_matrix([both])] == [
        ("linear", False),
        ("inherit", False),
        ("inherit-statistics", False),
        ("linear", True),
        ("inherit", True),
        ("inherit-statistics", True),
    ]


def test_without_the_source_backbone_the_summary_says_what_to_evaluate(
    reported_run: ReportedRun,
) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    elsewhere = [row for row in evaluation.rows if row.backbone == "lite1"]
    changed = replace(reported_run, evaluation=evaluation.model_copy(update={"rows": elsewhere}))
    (summary,) = make_report_content([changed]).run_summaries
    fact = summary.facts[1]
    assert (fact.value, fact.note) == (
        "not measured",
        "linear on lite0 at 32 px: evaluate with --mode linear",
    )


def test_the_source_backbone_of_an_older_evaluation_is_inferred(run: Path) -> None:
    path = run / "evaluation.json"
    old = json.loads(path.read_text())
    for name in ("distilled_on_hash", "distilled_at", "distilled_from_entries"):
        old["provenance"].pop(name)
    path.write_text(json.dumps(old))
    (reported_run,) = read_reported_runs([run], [])
    assert reported_run.evaluation
    assert reported_run.evaluation.provenance.distilled_on_hash == reported_run.distilled.record.backbone.hash
    assert reported_run.evaluation.provenance.distilled_at == 32


def test_the_summary_warns_if_random_images_are_as_good_as_distilled_ones(reported_run: ReportedRun) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    worse = [
        r.model_copy(update={"top1_mean": 0.05}) if r.images == "distilled" else r for r in evaluation.rows
    ]
    lost = replace(reported_run, evaluation=evaluation.model_copy(update={"rows": worse}))
    (summary,) = make_report_content([lost]).run_summaries
    assert [text.split(":")[1].split(",")[0] for text in summary.warnings] == [
        " through lite0 at 32 px",
        " through lite0 at 32 px",
        " through lite1 at 32 px",
        " through lite1 at 32 px",
    ]
    assert all("no better than as many real ones picked at random" in text for text in summary.warnings)


def test_the_summary_notes_accuracy_above_full_data(reported_run: ReportedRun) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    better = [r.model_copy(update={"top1_mean": 0.99}) if r.mode == "linear" else r for r in evaluation.rows]
    found = replace(reported_run, evaluation=evaluation.model_copy(update={"rows": better}))
    (summary,) = make_report_content([found]).run_summaries
    (note,) = [f.note for f in summary.facts if f.label == "Top-1 accuracy"]
    assert note.startswith("linear on lite0: more than the classifier of all real images, see the notes")


def test_classes_are_sorted_worst_first_and_confusions_most_frequent_first(reported_run: ReportedRun) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    confusion = [[0] * 10 for _ in range(10)]
    confusion[0][1], confusion[0][0] = 30, 70
    confusion[2][3], confusion[2][2] = 4, 4
    pairs = [ConfusedPair(right=0, predicted=1, count=30), ConfusedPair(right=2, predicted=3, count=4)]
    changed = {"confusion": confusion, "confused": pairs, "per_class": None}
    rows = [r.model_copy(update=changed) for r in evaluation.rows]
    shown = make_report_content(
        [replace(reported_run, evaluation=evaluation.model_copy(update={"rows": rows}))]
    )
    assert [(right, cell.text) for right, _, cell in shown.confusion_tables[0].pairs] == [
        ("Pullover", "50.0 %"),
        ("T-shirt/top", "30.0 %"),
    ]
    (found,) = shown.class_tables
    assert found.columns == ["distilled", "all real"]
    assert [(name, cells[0].text) for name, cells in found.rows] == [
        ("Pullover", "50.0"),
        ("T-shirt/top", "70.0"),
    ]


def test_per_class_accuracies_match_the_held_out_samples(
    reported_run: ReportedRun, lite0_entry: Entry
) -> None:
    assert reported_run.evaluation
    (full,) = [
        f for f in reported_run.evaluation.full_data if (f.backbone, f.classifier) == ("lite0", "linear")
    ]
    labels = lite0_entry.read_array("test/label")
    features = lite0_entry.read_array("test/feature").astype(np.float32)
    logits = features @ lite0_entry.read_array("classifier/weight").T + lite0_entry.read_array(
        "classifier/bias"
    )
    right = logits.argmax(1) == labels
    assert full.per_class == pytest.approx([right[labels == c].mean() for c in range(10)], abs=0.026)
    for row in reported_run.evaluation.rows:
        if row.confusion:
            assert row.per_class == pytest.approx([n[c] / sum(n) for c, n in enumerate(row.confusion)])


def test_headings_of_runs_on_one_dataset_state_what_differs(reported_run: ReportedRun) -> None:
    other = replace(
        reported_run,
        name="longer",
        details=reported_run.details.model_copy(
            update={"config": {**reported_run.details.config, "steps": 900}, "seed": 7}
        ),
    )
    shown = make_report_content([reported_run, other])
    assert [summary.description for summary in shown.run_summaries] == [
        "fashion-mnist-6k, distilled on lite0 at 32 px, 2 per class, 14 steps, seed 0",
        "fashion-mnist-6k, distilled on lite0 at 32 px, 2 per class, 900 steps, seed 7",
    ]
    assert (
        make_report_content([other]).title
        == "fashion-mnist-6k, distilled on lite0 at 32 px, 2 per class (longer)"
    )


def test_rows_state_their_protocol_and_the_most_thorough_is_compared(
    reported_run: ReportedRun,
) -> None:
    evaluation = reported_run.evaluation
    assert evaluation
    more = [r.model_copy(update={"epochs": 900, "top1_mean": 0.5}) for r in evaluation.rows if r.epochs]
    both = evaluation.model_copy(update={"rows": [*evaluation.rows, *more]})
    shown = make_report_content([replace(reported_run, evaluation=both), replace(reported_run, name="other")])
    groups = [group for block in shown.accuracy_sections[0].blocks for group in block.backbone_groups]
    labels = [line.label for group in groups for line in group.lines]
    assert {"Distilled, linear (20 epochs)", "Distilled, linear (900 epochs)"} <= set(labels)
    table, scores = shown.comparison_tables
    assert scores.title.startswith("Label-robust score")
    rows = dict(table.rows)
    assert rows["lite0: Distilled, linear"][0].text.startswith("50.0")
    assert table.note.startswith("Not measured alike: run: 900 epochs, 3 seeds, 4 views; other: 20")


def test_the_protocol_mismatch_note_lists_only_runs_that_differ(reported_run: ReportedRun, run: Path) -> None:
    assert reported_run.evaluation
    path = run / "evaluation.json"
    old = json.loads(path.read_text())
    for row in old["rows"]:
        for name in ("backbone_hash", "epochs", "views", "seed"):
            row.pop(name, None)
    path.write_text(json.dumps(old))
    (older,) = read_reported_runs([run], [])
    assert older.evaluation
    assert older.evaluation.rows == reported_run.evaluation.rows
    inherited = [row for row in reported_run.evaluation.rows if row.mode == "inherit"]
    bare = replace(
        reported_run, name="b", evaluation=reported_run.evaluation.model_copy(update={"rows": inherited})
    )
    assert describe_training_mismatch([reported_run, replace(older, name="a"), bare]) == ""
    short = [
        row.model_copy(update={"epochs": 1 if row.epochs else None}) for row in reported_run.evaluation.rows
    ]
    other = replace(
        reported_run, name="c", evaluation=reported_run.evaluation.model_copy(update={"rows": short})
    )
    assert describe_training_mismatch([reported_run, bare, other]).endswith(
        "3 seeds, 4 views; c: 1 epochs, 3 seeds, 4 views"
    )
    assert "b:" not in describe_training_mismatch([reported_run, bare, other])


def test_results_outside_the_run_are_found_by_the_evaluation_option(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "results" / run.name
    elsewhere.mkdir(parents=True)
    (run / "evaluation.json").rename(elsewhere / "evaluation.json")
    (bare,) = read_reported_runs([run], [])
    assert bare.evaluation is None
    for place in (elsewhere, elsewhere.parent, elsewhere / "evaluation.json"):
        (found,) = read_reported_runs([run], [], [place])
        assert found.evaluation
        assert len(found.evaluation.rows) == 12
    edit_image(next((run / "images").rglob("*.png")))
    with pytest.raises(InputError, match="it holds no result of the images of these runs"):
        read_reported_runs([run], [], [elsewhere])


def test_a_report_has_all_its_sections(page: Page) -> None:
    for part in ("Images", "Accuracy on held-out data", "Across backbones", "what is confused", "Cost"):
        assert part in page.text
    for part in ("How they were made", "Provenance", "To reproduce"):
        assert part in page.text
    growth = [i["alt"] for i in page.all("img") if (i["alt"] or "").startswith("The first images at")]
    assert growth[0] == "The first images at 1 px, step 1"
    assert growth[-1] == "The first images at 37 px, step 14"
    charts = [a["aria-label"] or "" for a in page.all("svg") if a.get("role") == "img"]
    assert [label.split(" of ")[0] for label in charts] == ["Bar chart", "Line chart"]


def test_headings_tables_and_ids_are_accessible(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {a["scope"] for a in page.all("th")} == {"col", "colgroup", "row", "rowgroup"}
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_distill_command_in_a_report_reproduces_the_images(
    page: Page, finished_run: Path, tmp_path: Path
) -> None:
    (line,) = re.findall(r"sfm distill .*?-again", page.text)
    words = shlex.split(line)
    words[words.index("--out") + 1] = str(tmp_path / "again")
    done = subprocess.run([SFM, *words[1:], "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = sorted((finished_run / "images").rglob("*.png"))
    again = sorted((tmp_path / "again" / "images").rglob("*.png"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    assert len(again) == 20


def test_the_evaluate_command_in_a_report_reproduces_the_config(page: Page, finished_run: Path) -> None:
    from sfm.cli import app
    from sfm.command_builder import make_config_from_file_and_options
    from sfm.eval.config import EvaluateRunsConfig

    assert app
    (line,) = re.findall(r"sfm evaluate .*?--seed \d+", page.text)
    words = shlex.split(line)
    assert words[2] == str(finished_run)
    given: dict[str, object] = {"run": [words[2]], "backbone": [], "mode": []}
    rest = iter(words[3:])
    for flag in rest:
        name = flag.removeprefix("--").replace("-", "_")
        if name == "save":
            given[name] = True
        elif isinstance(found := given.get(name), list):
            found.append(next(rest))
        else:
            given[name] = next(rest)
    asked = make_config_from_file_and_options(EvaluateRunsConfig, "evaluate", None, given)
    assert isinstance(asked, EvaluateRunsConfig)
    kept = json.loads((finished_run / "evaluation.json").read_text())["config"]
    assert asked.split_by_run()[0].model_dump(mode="json") == kept


def test_a_report_without_an_evaluation_gives_the_evaluate_command(run: Path, tmp_path: Path) -> None:
    (run / "evaluation.json").unlink()
    page = write_report(tmp_path / "r.html", run)
    assert f"There are no figures yet. To measure them: sfm evaluate {run} --store" in page.text
    assert "Accuracy on held-out data" not in page.text


def test_a_run_with_images_alone_is_reported(run: Path, tmp_path: Path) -> None:
    for name in ("evaluation.json", "history.csv"):
        (run / name).unlink()
    shutil.rmtree(run / "growth")
    record = json.loads((run / "run.json").read_text())
    kept = ("command", "config", "store", "entry_digest", "fingerprint", "dataset", "backbone")
    bare = {name: record[name] for name in (*kept, "image_size", "canvas", "ipc")}
    (run / "run.json").write_text(json.dumps(bare))
    page = write_report(tmp_path / "r.html", run)
    assert "How they were made" not in page.text
    assert sum((i["alt"] or "").startswith("Distilled image") for i in page.all("img")) == 20


def test_edited_images_are_shown_with_a_warning(run: Path, tmp_path: Path) -> None:
    assert "some were edited" not in write_report(tmp_path / "before.html", run).text
    edit_image(next((run / "images").rglob("*.png")))
    page = write_report(tmp_path / "after.html", run)
    assert "The images are not those that were distilled: some were edited since." in page.text
    assert f"Evaluate again: sfm evaluate {run} --config {run / 'evaluation.json'} --store " in page.text
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["provenance"]["images"] = read_reported_runs([run], [])[0].pixel_digest
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "The figures are of the edited images." in write_report(tmp_path / "again.html", run).text


def test_several_runs_are_compared_side_by_side(
    run: Path, finished_run: Path, fashion_store: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    run.rename(other)
    page = write_report(tmp_path / "r.html", finished_run, other, store=[fashion_store])
    assert "2 distilled datasets compared" in page.text
    assert "Top-1 accuracy on fashion-mnist-6k, %" in page.text
    assert sum((i["alt"] or "").startswith("Distilled image") for i in page.all("img")) == 40
    assert page.text.count("To reproduce:") == 2
    assert "lite0 (run, 2 per class)" in page.text
    assert "lite0 (other, 2 per class)" in page.text


def test_a_run_of_a_class_subset_shows_its_own_real_images(
    partial_run: Path, fashion_store: str, lite0_entry: Entry
) -> None:
    (reported_run,) = read_reported_runs([partial_run], [fashion_store])
    assert reported_run.source_data
    assert reported_run.source_data.exemplar_pixels is not None
    assert (
        reported_run.source_data.exemplar_pixels == lite0_entry.read_array("exemplar/image")[[1, 4, 9]]
    ).all()
    assert reported_run.details.train_samples == 3 * 40
    (gallery,) = make_report_content([reported_run]).galleries
    assert [class_row.name for class_row in gallery.class_rows] == ["Trouser", "Coat", "Ankle boot"]
    assert [[picture.is_real for picture in class_row.pictures] for class_row in gallery.class_rows] == [
        [False, True]
    ] * 3


def test_directory_names_are_shortened_as_far_as_distinct() -> None:
    assert make_distinct_directory_names([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert make_distinct_directory_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


def test_runs_of_different_data_are_not_compared(run: Path, finished_run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "evaluation.json"):
        path = run / name
        path.write_text(re.sub(r'"fingerprint": "\w+"', f'"fingerprint": "{"0" * 64}"', path.read_text()))
    page = write_report(tmp_path / "r.html", finished_run, run)
    assert "Top-1 accuracy on" not in page.text
    # Every run has its own gallery and matrices; a matrix of several would name them in its rows.
    assert page.text.count("Ankle boot") >= 2
    assert "per class)" not in page.text


def test_markup_in_names_is_escaped(run: Path, tmp_path: Path) -> None:
    classes = json.loads((run / "classes.json").read_text())
    classes[0]["name"] = '"><script>alert(1)</script> $x$ & more'
    (run / "classes.json").write_text(json.dumps(classes))
    hostile = run.rename(tmp_path / "<img src=x onerror=alert(2)> $a$")
    page = write_report(tmp_path / "r.html", hostile)
    assert len(page.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert '"><script>alert(1)</script> $x$ & more' in page.text
    assert "<img src=x onerror=alert(2)>" in page.text


def test_a_report_of_many_classes_is_bounded_in_size(reported_run: ReportedRun) -> None:
    count = 300
    many = replace(
        reported_run.distilled,
        class_ids=[str(c) for c in range(count)],
        class_names=[f"class {c}" for c in range(count)],
        image_files=reported_run.distilled.image_files * 30,
        pixels=np.tile(reported_run.distilled.pixels, (30, 1, 1, 1)),
        labels=np.repeat(np.arange(count), 2),
    )
    shown = make_report_content([replace(reported_run, distilled=many, evaluation=None)])
    (gallery,) = shown.galleries
    assert len(gallery.class_rows) == MAX_GALLERY_CLASSES
    assert sum(len(class_row.pictures) for class_row in gallery.class_rows) <= MAX_GALLERY_IMAGES
    assert "The first 100 of 300 classes." in gallery.notes
    assert len(render_page(shown)) < 2_000_000


def test_charts_use_css_colours_and_hatches() -> None:
    kinds = ("distilled", "few real", "all real", "no images")
    bars = [AccuracyBar(f"$ {kind} <", 50.0, 2.0, kind) for kind in kinds]
    svg = str(draw_bar_chart([("lite0", bars)], 'a "chart"'))
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert all(f"var(--{kind.replace(' ', '-')})" in svg for kind in kinds)
    assert len(set(re.findall(r"url\(#h\w+\)", svg))) == 3  # three hatches, and one that is filled
    assert 'aria-label="a &#34;chart&#34;"' in svg
    assert len(svg) < 60_000


def test_a_report_overwrites_only_another_report(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    write_report(out, run)
    first = out.read_bytes()
    write_report(out, run)
    assert out.read_bytes() == first
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html> mine")
    with pytest.raises(InputError, match=r"notes\.html exists and is not a report"):
        write_report(notes, run)
    assert notes.read_text() == "<!doctype html> mine"


def test_a_report_path_that_cannot_be_written_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder: give a file"):
        write_report(tmp_path, run)
    with pytest.raises(InputError, match="there is no folder"):
        write_report(tmp_path / "nowhere" / "r.html", run)


def test_reporting_an_unfinished_run_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(InputError, match="no run directory at"):
        write_report(out, tmp_path / "nothing")
    with pytest.raises(InputError, match="is given more than once"):
        write_report(out, run, run / "images" / "..")
    (run / "run.json").unlink()
    with pytest.raises(InputError, match="is not a finished run of `sfm distill`, but holds a checkpoint"):
        write_report(out, run)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", '{"rows": []}', "is not what this version of `sfm evaluate` writes"),
        ("history.csv", "step,loss,resolution\n1,low,1\n", "is not what `sfm distill` writes"),
        ("run.json", "[]", "is not what `sfm distill` writes"),
        ("growth/step_00000001.png", "not an image", "cannot read"),
    ],
)
def test_a_damaged_run_file_is_named_in_the_error(
    run: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (run / name).write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        write_report(tmp_path / "r.html", run)
    assert name in str(refused.value)


def test_a_folder_in_place_of_evaluation_json_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "evaluation.json").unlink()
    (run / "evaluation.json").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*evaluation\.json: Is a directory; move it away"):
        write_report(tmp_path / "r.html", run)


def test_missing_and_extra_images_are_refused(run: Path, tmp_path: Path) -> None:
    image = sorted((run / "images").rglob("*.png"))[3]
    extra = image.with_name("2.png")
    shutil.copy(image, extra)
    with pytest.raises(InputError, match=r"unexpected .*2\.png"):
        write_report(tmp_path / "r.html", run)
    extra.unlink()
    image.unlink()
    with pytest.raises(InputError, match="number 1 is missing"):
        write_report(tmp_path / "r.html", run)


def test_a_store_without_the_source_entry_is_refused(run: Path, tmp_path: Path) -> None:
    open_or_create_store(str(tmp_path / "store"))
    with pytest.raises(InputError, match=r"holds no entry that .* was distilled from"):
        write_report(tmp_path / "r.html", run, store=[str(tmp_path / "store")])


def test_a_report_is_written_without_importing_torch(
    finished_run: Path, fashion_store: str, tmp_path: Path
) -> None:
    out = tmp_path / "r.html"
    code = (
        f"import sys; sys.argv = ['sfm', 'report', {str(finished_run)!r}, '--out', {str(out)!r}, '--json', "
        f"'--store', {fashion_store!r}]\n"
        "from sfm.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert json.loads(done.stdout) == {"out": str(out), "bytes": out.stat().st_size}


def test_bytes_times_percentages_and_commands_are_formatted() -> None:
    assert [format_decimal_bytes(n) for n in (0, 999, 1000, 143_210, 99_600_000, 13_400_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "143 kB",
        "99.6 MB",
        "13.4 GB",
    ]
    assert [format_wall_time(s) for s in (0.26, 48.2, 59.7, 200, 7500)] == [
        "0.3 s",
        "48 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert format_percent(0.7112, 0.007) == "71.1 ± 0.7"
    line = format_sfm_command(
        "evaluate", "a b", {"seeds": 3, "save": True, "x": None, "mode": ["kd", "linear"]}
    )
    assert line == "sfm evaluate 'a b' --seeds 3 --save --mode kd --mode linear"

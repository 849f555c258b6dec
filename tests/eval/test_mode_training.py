"""All modes on real features: what their rows say, what they cost, what is left of them on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sfm.eval.config import (
    MODES,
    VIEWS_BY_SEED_MODES,
    EvaluateConfig,
    EvaluateOptions,
    count_views_per_image_and_seed,
)
from sfm.eval.evaluation import Evaluation, evaluate_with_reader
from sfm.eval.result import AccuracyRow
from sfm.events import Progress
from sfm.stats_store.store import Entry

pytestmark = pytest.mark.slow

NewRun = Callable[..., Path]
WITH_PROJECTOR = set(MODES) - VIEWS_BY_SEED_MODES


@pytest.fixture(scope="module")
def all_modes_evaluation(
    tmp_path_factory: pytest.TempPathFactory,
    write_run: NewRun,
    write_labels: Callable[..., None],
    lite0_entry: Entry,
    fashion_store: str,
) -> Evaluation:
    """Every mode on another backbone than the one distilled on, classifiers saved.

    The images are the nearest exemplars, untouched.
    """
    run = write_run(tmp_path_factory.mktemp("modes") / "run", lite0_entry, canvas=32)
    write_labels(run, lite0_entry, 0.8 * np.eye(10) + 0.02)
    options = {"epochs": 300, "views": 20, "projector_views": 30, "seeds": 2, "device": "cpu", "save": True}
    given = {"run": run, "store": fashion_store, "backbone": ["lite1"], "mode": list(MODES)}
    return evaluate_with_reader(EvaluateConfig.model_validate(given | options))


def index_by_mode(evaluation: Evaluation) -> dict[str, AccuracyRow]:
    return {r.mode: r for r in evaluation.rows if r.images in ("distilled", "none")}


def test_every_mode_beats_chance_and_rows_keep_the_requested_order(all_modes_evaluation: Evaluation) -> None:
    rows = index_by_mode(all_modes_evaluation)
    assert list(rows) == list(MODES)
    for mode, found in rows.items():
        # Chance is a tenth. After 300 epochs fresh heads have only begun.
        assert found.top1_mean > 0.17, mode


def test_closed_form_modes_have_one_seed_and_a_penalty(all_modes_evaluation: Evaluation) -> None:
    closed_form = {"inherit-ridge", "inherit-statistics"}
    for mode, found in index_by_mode(all_modes_evaluation).items():
        assert found.seeds == (1 if mode in closed_form else 2)
        assert (found.penalty is not None) == (mode in closed_form)


def test_a_projector_to_the_same_backbone_recovers_the_full_data_accuracy(
    all_modes_evaluation: Evaluation,
) -> None:
    changed = {"backbone": ["lite0"], "mode": ["inherit-ridge"], "save": False}
    found = evaluate_with_reader(EvaluateConfig.model_validate(all_modes_evaluation.config | changed))
    assert found.rows[0].recovered == pytest.approx(1, abs=0.1)


def test_every_row_reports_its_share_of_the_full_data_accuracy(all_modes_evaluation: Evaluation) -> None:
    full = {f.backbone: f.top1 for f in all_modes_evaluation.full_data if f.classifier == "linear"}
    for r in (*all_modes_evaluation.rows, *all_modes_evaluation.full_data):
        top1 = r.top1_mean if isinstance(r, AccuracyRow) else r.top1
        assert r.recovered == pytest.approx(top1 / full[r.backbone])


def test_rows_of_real_images_report_their_exemplar_count(all_modes_evaluation: Evaluation) -> None:
    held = {r.images: r.exemplars for r in all_modes_evaluation.rows}
    assert held == {"distilled": None, "none": None, "random": 3, "nearest": 3, "neighbour": 6}


def test_confusions_count_every_held_out_sample_once_per_seed(all_modes_evaluation: Evaluation) -> None:
    for r in all_modes_evaluation.rows:
        if r.exemplars is not None:
            assert (r.confusion, r.confused) == (None, None)
            continue
        counts = np.array(r.confusion)
        assert counts.sum() == 400 * r.seeds
        assert np.trace(counts) / counts.sum() == pytest.approx(r.top1_mean)
        assert r.confused is not None
        assert sum(p.count for p in r.confused) == counts.sum() - np.trace(counts)
        assert [p.count for p in r.confused] == sorted((p.count for p in r.confused), reverse=True)
        assert all(counts[p.right, p.predicted] == p.count and p.right != p.predicted for p in r.confused)


def test_with_many_classes_only_the_most_frequent_confusions_are_kept(
    all_modes_evaluation: Evaluation, fashion_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfm.eval.scores.MAX_CONFUSION_CLASSES", 9)
    monkeypatch.setattr("sfm.eval.scores.MAX_CONFUSED_PAIRS", 3)
    changed = {"mode": ["inherit-statistics"], "save": False}
    config = EvaluateConfig.model_validate(all_modes_evaluation.config | changed)
    whole, (few, *_) = (
        index_by_mode(all_modes_evaluation)["inherit-statistics"],
        evaluate_with_reader(config).rows,
    )
    assert few.confusion is None
    assert few.confused == (whole.confused or [])[:3]


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_classifier_reproduces_the_accuracy_of_the_first_seed(
    all_modes_evaluation: Evaluation, lite0_entry: Entry, lite1_entry: Entry, mode: str
) -> None:
    path = Path(all_modes_evaluation.config["run"]) / "classifiers" / f"lite1-{mode}.safetensors"
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert about["mode"] == mode
    assert (about["backbone"], about["distilled_on"]) == ("lite1", "lite0")
    assert about["backbone_hash"] == lite1_entry.backbone.hash
    assert about["distilled_on_hash"] == lite0_entry.backbone.hash
    assert json.loads(about["class_ids"]) == lite0_entry.dataset.class_ids
    features, labels = (
        lite1_entry.read_array("test/feature").astype(np.float32),
        lite1_entry.read_array("test/label"),
    )
    predicted = (features @ tensors["weight"].T + tensors["bias"]).argmax(1)
    expected = index_by_mode(all_modes_evaluation)[mode].top1[0]
    assert np.mean(predicted == labels) == pytest.approx(expected, abs=0.006)
    assert ("projector_weight" in tensors) == (mode in WITH_PROJECTOR)
    if mode.startswith("inherit"):
        projected = features @ tensors["projector_weight"].T + tensors["projector_bias"]
        inherited = projected @ lite0_entry.read_array("classifier/weight").T + lite0_entry.read_array(
            "classifier/bias"
        )
        assert np.mean(inherited.argmax(1) == predicted) > 0.99


def test_classifiers_are_saved_only_on_request(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    evaluate_with_reader(
        EvaluateConfig(run=run, store=fashion_store, mode=["inherit-statistics"], epochs=2, views=2)
    )
    assert not (run / "classifiers").exists()


def test_inherit_statistics_does_not_run_the_source_backbone(new_run: NewRun, fashion_store: str) -> None:
    events: list[Progress] = []
    asked = EvaluateConfig(
        run=new_run(),
        store=fashion_store,
        backbone=["lite1"],
        mode=["inherit-statistics"],
        epochs=2,
        views=2,
    )
    found = evaluate_with_reader(asked, events.append)
    assert not any("lite0" in p.stage for p in events)
    # A classifier of another backbone, behind a projector that no image shaped.
    assert found.rows[0].top1_mean > 0.6


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [(10, {}, 300), (100, {}, 50), (7, {}, 429), (10, {"views": 400}, 400), (10, {"projector_views": 7}, 7)],
)
def test_projector_modes_divide_3000_views_among_the_images(
    images: int, given: dict[str, int], expected: int
) -> None:
    options = EvaluateOptions(store="somewhere", **given)
    assert count_views_per_image_and_seed(options, "inherit", images) == expected
    assert count_views_per_image_and_seed(options, "linear", images) == given.get("views", 50)

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sfm.errors import InputError
from sfm.eval.config import MODES, EvaluateConfig
from sfm.eval.evaluation import Evaluation, evaluate_with_reader
from sfm.eval.result import AccuracyRow
from sfm.events import Progress
from sfm.stats_store.publication import Draft, publish_draft
from sfm.stats_store.store import Entry, open_or_create_store, open_store

pytestmark = pytest.mark.slow

NewRun = Callable[..., Path]


def make_config(run: Path, store: str, **options: object) -> EvaluateConfig:
    """A short evaluation; tests name what they are about."""
    short = {"epochs": 40, "views": 8, "projector_views": 12, "seeds": 2, "device": "cpu"}
    return EvaluateConfig.model_validate({"run": run, "store": store} | short | options)


def find_row(evaluation: Evaluation, images: str, backbone: str, mode: str) -> AccuracyRow:
    (found,) = [r for r in evaluation.rows if (r.images, r.backbone, r.mode) == (images, backbone, mode)]
    return found


def republish(entry: Entry, url: Path, *, classes: int = 10, without: str = "nothing") -> str:
    """Publish the first classes of an entry in a store of its own, some arrays left out; return its URL."""
    draft = Draft(open_or_create_store(str(url)))
    kept = entry.read_array("test/label") < classes
    for name in entry.list_array_names():
        if not name.startswith(without):
            array = entry.read_array(name)
            of_classes = array[kept] if name.startswith("test/") else array[:classes]
            draft.write_array(name, array if name == "train/within_scatter" else of_classes)
    dataset = entry.dataset.model_copy(
        update={
            "class_ids": entry.dataset.class_ids[:classes],
            "class_names": entry.dataset.class_names[:classes],
            "train_samples": int(entry.read_array("train/count")[:classes].sum()),
            "test_samples": 0 if without == "test/" else int(kept.sum()),
        }
    )
    publish_draft(draft, entry.backbone, dataset, entry.extraction, entry.classifier)
    return str(url)


def open_only_entry(url: str) -> Entry:
    store = open_store(url)
    (summary,) = store.list_summaries()
    return store.open_entry(summary)


@pytest.fixture(scope="module")
def events() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def full_evaluation(
    tmp_path_factory: pytest.TempPathFactory,
    write_run: NewRun,
    lite0_entry: Entry,
    fashion_store: str,
    events: list[Progress],
) -> Evaluation:
    """One evaluation on two backbones in both modes; the images are the nearest exemplars, untouched."""
    run = write_run(tmp_path_factory.mktemp("whole") / "run", lite0_entry, canvas=32)
    asked = make_config(
        run, fashion_store, backbone=["lite0", "lite1"], seeds=3, epochs=300, views=20, projector_views=30
    )
    return evaluate_with_reader(asked, events.append)


def test_each_backbone_has_rows_of_all_modes_real_baselines_and_full_data(
    full_evaluation: Evaluation,
) -> None:
    assert [(r.images, r.backbone, r.mode) for r in full_evaluation.rows] == [
        (images, backbone, mode)
        for backbone in ("lite0", "lite1")
        for images, mode in (
            ("distilled", "linear"),
            ("distilled", "inherit"),
            ("none", "inherit-statistics"),
            ("random", "linear"),
            ("nearest", "linear"),
            ("neighbour", "linear"),
        )
    ]
    assert [(r.backbone, r.classifier) for r in full_evaluation.full_data] == [
        (backbone, classifier)
        for backbone in ("lite0", "lite1")
        for classifier in ("linear", "nearest class mean", "discriminant")
    ]
    assert not any("real images:" in note or "left out" in note for note in full_evaluation.notes)


def test_a_row_holds_mean_and_sample_deviation_over_its_seeds(full_evaluation: Evaluation) -> None:
    for r in full_evaluation.rows:
        assert r.seeds == len(r.top1) == (1 if r.images == "none" else 3)
        assert r.top5 is not None
        if r.seeds == 1:
            assert (r.top1, r.top1_std, r.top5_std) == ([r.top1_mean], 0, 0)
            continue
        assert r.top1_mean == pytest.approx(np.mean(r.top1))
        assert r.top1_std == pytest.approx(np.std(r.top1, ddof=1))
        assert r.top5_mean == pytest.approx(np.mean(r.top5))
        assert r.top5_std == pytest.approx(np.std(r.top5, ddof=1))


def test_real_baselines_use_the_training_protocol_of_distilled_images(full_evaluation: Evaluation) -> None:
    for backbone in ("lite0", "lite1"):
        as_distilled = find_row(full_evaluation, "distilled", backbone, "linear")
        as_baseline = find_row(full_evaluation, "nearest", backbone, "linear")
        assert as_distilled.top1 == as_baseline.top1
        assert as_distilled.top5 == as_baseline.top5


def test_each_seed_of_the_random_baseline_uses_another_draw(full_evaluation: Evaluation) -> None:
    assert len(set(find_row(full_evaluation, "random", "lite0", "linear").top1)) > 1


def test_full_data_accuracies_match_the_stored_classifier_and_class_means(
    full_evaluation: Evaluation, lite0_entry: Entry
) -> None:
    card, (linear, nearest_mean, _) = lite0_entry.classifier, full_evaluation.full_data[:3]
    assert linear.top1 == pytest.approx(card.held_out_top1, abs=0.003)
    assert linear.top5 == pytest.approx(card.held_out_top5, abs=0.003)
    means, features = (
        lite0_entry.read_array("train/mean"),
        lite0_entry.read_array("test/feature").astype(np.float64),
    )
    predicted = np.linalg.norm(features[:, None] - means, axis=2).argmin(1)
    assert nearest_mean.top1 == pytest.approx(
        np.mean(predicted == lite0_entry.read_array("test/label")), abs=0.003
    )


def test_inheriting_on_another_backbone_recovers_half_of_the_full_data_accuracy(
    full_evaluation: Evaluation,
) -> None:
    (full,) = (f.top1 for f in full_evaluation.full_data if (f.backbone, f.classifier) == ("lite1", "linear"))
    assert find_row(full_evaluation, "distilled", "lite1", "inherit").top1_mean > 0.5 * full


@pytest.mark.parametrize("backbone", ["lite0", "lite1"])
def test_inheriting_beats_a_head_trained_on_the_images(full_evaluation: Evaluation, backbone: str) -> None:
    inherited, linear = (
        find_row(full_evaluation, "distilled", backbone, mode).top1_mean for mode in ("inherit", "linear")
    )
    assert inherited > linear + 0.05


def test_evaluation_json_equals_the_returned_evaluation(full_evaluation: Evaluation) -> None:
    written = json.loads((Path(full_evaluation.config["run"]) / "evaluation.json").read_text())
    assert Evaluation.model_validate(written) == full_evaluation
    assert {"images", "backbone", "mode", "top1_mean", "top1_std", "top5_mean", "top5_std", "seeds"} <= set(
        written["rows"][0]
    )
    assert EvaluateConfig.model_validate(written["config"]).backbone == ["lite0", "lite1"]


def test_provenance_names_the_entries_of_an_evaluation(
    full_evaluation: Evaluation, lite0_entry: Entry
) -> None:
    provenance = full_evaluation.provenance
    assert provenance.distilled_from == lite0_entry.summary.entry_digest
    assert [e.backbone for e in provenance.entries] == ["lite0", "lite1"]
    assert provenance.entries[0].entry_digest == provenance.distilled_from
    assert provenance.role == "full"


def test_every_stage_reports_complete_progress(full_evaluation: Evaluation, events: list[Progress]) -> None:
    last = {p.stage: p for p in events}
    assert len(last) == 2 * 4 + 2 * 4 + 2
    assert all(p.done == p.total for p in last.values())


def test_equal_seeds_give_equal_accuracies_and_other_seeds_do_not(
    new_run: NewRun, fashion_store: str
) -> None:
    run = new_run()
    first, again, other = (
        evaluate_with_reader(make_config(run, fashion_store, seed=seed)) for seed in (1, 1, 2)
    )
    assert first.rows == again.rows
    for one, two in zip(first.rows, other.rows, strict=True):
        assert one.images == "none" or (one.top1, one.top5) != (two.top1, two.top5)


def test_modes_that_are_not_requested_are_not_computed(new_run: NewRun, fashion_store: str) -> None:
    events: list[Progress] = []
    asked = make_config(new_run(), fashion_store, mode=["linear"], backbone=["lite1"])
    found = evaluate_with_reader(asked, events.append)
    assert {r.mode for r in found.rows} == {"linear"}
    assert not any("lite0" in p.stage or "projector" in p.stage for p in events)


def test_without_exemplars_real_baselines_are_skipped_with_a_note(
    tmp_path: Path, lite0_entry: Entry, new_run: NewRun
) -> None:
    store = republish(lite0_entry, tmp_path / "store", without="exemplar/")
    run = new_run()
    record = json.loads((run / "run.json").read_text())
    record["entry_digest"] = open_only_entry(store).summary.entry_digest
    (run / "run.json").write_text(json.dumps(record))
    found = evaluate_with_reader(make_config(run, store))
    assert {r.images for r in found.rows} == {"distilled", "none"}
    assert "no exemplars" in found.notes[0]


def test_the_accuracy_of_a_seed_is_independent_of_the_seed_count(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    one, three = (evaluate_with_reader(make_config(run, fashion_store, seeds=seeds)) for seeds in (1, 3))
    for alone, among in zip(one.rows, three.rows, strict=True):
        # Batched matrix products round differently, which may move a sample or two of 400.
        assert alone.top1[0] == pytest.approx(among.top1[0], abs=0.006)
        assert alone.top1_std == 0.0


def test_the_accuracy_of_a_mode_is_independent_of_other_modes(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    together = evaluate_with_reader(make_config(run, fashion_store))
    for mode in ("linear", "inherit"):
        alone = evaluate_with_reader(make_config(run, fashion_store, mode=[mode]))
        assert find_row(alone, "distilled", "lite0", mode) == find_row(together, "distilled", "lite0", mode)


def test_random_draws_that_share_images_give_a_note(new_run: NewRun, fashion_store: str) -> None:
    found = evaluate_with_reader(make_config(new_run(ipc=2), fashion_store, seeds=3, mode=["linear"]))
    assert [r.images for r in found.rows] == ["distilled", "random", "nearest", "neighbour"]
    assert "share images" in found.notes[0]


def test_too_few_exemplars_give_a_note_and_skip_the_baseline(new_run: NewRun, fashion_store: str) -> None:
    found = evaluate_with_reader(make_config(new_run(ipc=4), fashion_store, mode=["linear"]))
    assert [r.images for r in found.rows] == ["distilled", "neighbour"]
    assert [note.split(":")[0] for note in found.notes if "through" not in note] == [
        "No random real images",
        "No real images nearest to the mean",
    ]


def test_top5_is_none_with_four_classes(tmp_path: Path, lite0_entry: Entry, write_run: NewRun) -> None:
    store = republish(lite0_entry, tmp_path / "store", classes=4)
    found = evaluate_with_reader(make_config(write_run(tmp_path / "run", open_only_entry(store)), store))
    for r in found.rows:
        assert (r.top5, r.top5_mean, r.top5_std) == (None, None, None)
        assert all(0 <= top1 <= 1 for top1 in r.top1)
    assert {r.top5 for r in found.full_data} == {None}


def keep_classes(run: Path, kept: list[int]) -> None:
    """Make a run one of some classes, as `sfm distill --classes` writes it."""
    classes = json.loads((run / "classes.json").read_text())
    folders = sorted((run / "images").iterdir(), key=lambda folder: int(folder.name.partition("_")[0]))
    for place, folder in enumerate(folders):
        if place in kept:
            folder.rename(run / "images" / f"{kept.index(place)}_kept")
        else:
            shutil.rmtree(folder)
    listed = [classes[place] | {"index": index} for index, place in enumerate(kept)]
    (run / "classes.json").write_text(json.dumps(listed))


def test_a_run_of_a_class_subset_is_evaluated_on_its_held_out_samples(
    new_run: NewRun, fashion_store: str, lite0_entry: Entry, write_labels: Callable[..., None]
) -> None:
    run, kept = new_run(), [1, 5, 7, 8, 9]
    keep_classes(run, kept)
    class_ids = json.dumps([lite0_entry.dataset.class_ids[index] for index in kept])
    write_labels(run, lite0_entry, np.eye(5), class_ids=class_ids)
    found = evaluate_with_reader(
        make_config(run, fashion_store, backbone=["lite0", "lite1"], mode=list(MODES))
    )
    assert found.notes[0].startswith("5 of the 10 classes were distilled")
    assert [e.held_out_samples for e in found.provenance.entries] == [200, 200]
    assert np.sum(found.rows[0].confusion) == 2 * 200
    assert {r.images for r in found.rows} == {"distilled", "none", "random", "nearest", "neighbour"}
    labels = lite0_entry.read_array("test/label")
    own = np.isin(labels, kept)
    features = lite0_entry.read_array("test/feature")[own].astype(np.float32)
    logits = features @ lite0_entry.read_array("classifier/weight").T + lite0_entry.read_array(
        "classifier/bias"
    )
    expected = np.mean(np.array(kept)[logits[:, kept].argmax(1)] == labels[own])
    assert found.full_data[0].top1 == pytest.approx(expected, abs=0.006)
    # Five real classes, told apart by the moments of all ten.
    assert found.full_data[2].top1 > 0.7


def test_a_run_on_a_tuning_entry_is_evaluated_on_the_tuning_held_out_samples(
    tmp_path: Path, fashion_store: str, write_run: NewRun
) -> None:
    store = open_store(fashion_store)
    (summary,) = [s for s in store.list_summaries() if s.role == "tuning" and s.backbone == "lite0"]
    run = write_run(tmp_path / "run", store.open_entry(summary))
    found = evaluate_with_reader(make_config(run, fashion_store, backbone=["lite1"]))
    assert found.provenance.role == "tuning"
    assert found.provenance.entries[0].held_out_samples == summary.test_samples == 100


def test_a_store_without_held_out_features_is_refused(
    tmp_path: Path, lite0_entry: Entry, write_run: NewRun
) -> None:
    store = republish(lite0_entry, tmp_path / "store", without="test/")
    run = write_run(tmp_path / "run", lite0_entry)
    record = json.loads((run / "run.json").read_text())
    record["entry_digest"] = open_only_entry(store).summary.entry_digest
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="no held-out features"):
        evaluate_with_reader(make_config(run, store))


def test_a_run_from_another_store_is_refused(tmp_path: Path, lite0_entry: Entry, new_run: NewRun) -> None:
    store = republish(lite0_entry, tmp_path / "store", classes=4)
    with pytest.raises(InputError, match="run directory from another store"):
        evaluate_with_reader(make_config(new_run(), store))


def test_a_run_with_other_classes_than_its_entry_is_refused(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    classes = json.loads((run / "classes.json").read_text())
    classes[3]["class_id"] = "another"
    (run / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(InputError, match=r"the classes in .* are not those of"):
        evaluate_with_reader(make_config(run, fashion_store))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": ["lite2"]}, "no entry of fashion-mnist-6k through tf_efficientnet_lite2"),
        ({"backbone": ["lite9"]}, "lite9"),
        ({"image_size": 48}, "at 48 px: the store holds"),
    ],
)
def test_a_backbone_without_a_store_entry_is_refused(
    new_run: NewRun, fashion_store: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_with_reader(make_config(new_run(), fashion_store, **options))


def test_inheriting_from_a_backbone_with_other_weights_is_refused(
    new_run: NewRun, fashion_store: str
) -> None:
    run = new_run()
    record = json.loads((run / "run.json").read_text())
    record["config"]["backbone"] = "lite1"  # as if other weights now lay where the run found its own
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"lite1 .* is not the one the entry .* was extracted with"):
        evaluate_with_reader(make_config(run, fashion_store, backbone=["lite1"], mode=["inherit"]))


def test_a_failed_write_keeps_the_existing_result(new_run: NewRun, fashion_store: str) -> None:
    run = new_run()
    (run / "evaluation.json").mkdir()
    (run / "evaluation.json" / "mine").write_text("the old one")
    with pytest.raises(InputError, match=r"cannot write .*evaluation\.json"):
        evaluate_with_reader(make_config(run, fashion_store, mode=["linear"], epochs=1, views=1))
    assert (run / "evaluation.json" / "mine").read_text() == "the old one"

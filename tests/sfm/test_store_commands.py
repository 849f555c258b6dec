"""``sfm store``: what its commands print, for people and for scripts, and how they end."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from s3_server import s3_endpoint, s3_url
from toy_entries import (
    age_files,
    make_backbone_card,
    publish_random_entry,
    publish_with_placeholder_cards,
    write_random_arrays,
)
from typer.testing import CliRunner, Result

from sfm.api import DistillConfig, distill
from sfm.cli import app
from sfm.stats_store.commits import make_commit_path
from sfm.stats_store.digests import compute_sha256
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store, open_store

__all__ = ["s3_endpoint", "s3_url"]

VERBS = ("ls", "show", "verify", "copy", "merge", "rm", "gc")


def run_sfm(*words: object) -> Result:
    """Run ``sfm store`` with these words."""
    return CliRunner().invoke(app, ["store", *map(str, words)], env={"COLUMNS": "140"})


def run_sfm_json(*words: object) -> dict:
    """What the command prints with ``--json``: one document on stdout, and nothing on stderr but progress."""
    done = run_sfm(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def assert_one_line_error(done: Result, status: int, *words: str) -> None:
    """One error line on stderr that holds the words, no traceback, and this exit status."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(lines)) == (status, 1), done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in lines[0]


@pytest.fixture
def store(tmp_path) -> Store:
    """A store with two backbones' entries of one dataset, a tuning entry, and one replaced generation."""
    store = open_or_create_store(str(tmp_path / "s"))
    publish_random_entry(store, 0, dataset="birds")
    publish_random_entry(store, 1, dataset="birds", replace=True)
    publish_random_entry(store, 2, dataset="birds", backbone=make_backbone_card("lite1"))
    publish_random_entry(
        store, 3, dataset="birds", role="tuning", options={"role": "tuning"}, fingerprint="e" * 64
    )
    return store


@pytest.mark.parametrize("verb", VERBS)
def test_every_store_command_documents_examples_json_and_quiet(verb):
    done = run_sfm(verb, "--help")
    assert done.exit_code == 0
    assert f"$ sfm store {verb}" in done.stdout
    assert "--json" in done.stdout
    assert "--quiet" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_store_command_reports_a_missing_store_with_one_line_error(verb, tmp_path):
    more = {"show": ["birds"], "rm": ["birds"], "copy": [tmp_path / "t"], "merge": ["a", "b"]}.get(verb, [])
    if verb == "merge":
        more = [f"{tmp_path / 'nowhere'}#a", "b"]
    place = tmp_path / ("target" if verb == "merge" else "nowhere")
    assert_one_line_error(run_sfm(verb, place, *more), 2, "no store at", "nowhere")
    assert not (tmp_path / "t").exists()


def test_ls_lists_visible_entries(store):
    rows = run_sfm_json("ls", store.url)["entries"]
    assert [(r["dataset"], r["backbone"], r["role"]) for r in rows] == [
        ("birds", "lite0", "full"),
        ("birds", "lite0", "tuning"),
        ("birds", "lite1", "full"),
    ]
    assert set(rows[0]) >= {"backbone_hash", "image_size", "fingerprint", "options", "classes", "features"}
    assert "birds" in run_sfm("ls", store.url).stdout


def test_ls_reports_unreadable_commits_and_lists_the_rest(store, tmp_path):
    key = store.list_summaries()[2].key
    (tmp_path / "s" / "index" / key / "00000001.json").write_text("{")
    found = run_sfm_json("ls", store.url)
    assert len(found["entries"]) == 2
    assert f"index/{key}/00000001.json" in found["unreadable"][0]
    assert "left out: damaged commit" in run_sfm("ls", store.url).stdout


def test_show_prints_cards_classes_and_sizes(store):
    shown = run_sfm_json("show", store.url, "birds", "--backbone", "lite1")
    assert shown["summary"]["backbone"] == "lite1"
    assert shown["classes"][0] | {"train_samples": 0, "test_samples": 0} == {
        "class_id": "n0",
        "name": "n0",
        "train_samples": 0,
        "test_samples": 0,
    }
    assert shown["compression_ratio"] > 0
    done = run_sfm("show", store.url, "birds", "--backbone", "lite1")
    for word in ("licence: unknown", "held out", "compression ratio", "train/mean"):
        assert word in done.stdout


def test_show_of_an_ambiguous_name_lists_the_candidates(store):
    assert_one_line_error(
        run_sfm("show", store.url, "birds"), 2, "several entries fit", "birds@", "lite0", "lite1"
    )


def test_show_opens_a_replaced_entry_by_its_digest(store):
    old = run_sfm_json("show", store.url, "birds", "--history", "--backbone", "lite0")["history"][0]
    digest = old["summary"]["entry_digest"]
    shown = run_sfm_json("show", store.url, f"birds@{digest[:10]}")
    assert (shown["summary"]["entry_digest"], shown["summary"]["generation"]) == (digest, 1)


def test_show_history_lists_replaced_and_removed_entries(store):
    assert run_sfm("rm", store.url, "birds", "--backbone", "lite1").exit_code == 0
    history = run_sfm_json("show", store.url, "birds", "--history")["history"]
    states = sorted((g["summary"]["backbone"], g["generation"], g["state"]) for g in history)
    assert states == [
        ("lite0", 1, "current"),
        ("lite0", 1, "replaced"),
        ("lite0", 2, "current"),
        ("lite1", 1, "removed"),
        ("lite1", 2, "tombstone"),
    ]
    assert "tombstone" in run_sfm("show", store.url, "birds", "--history").stdout
    assert_one_line_error(run_sfm("show", store.url, "bird", "--history"), 2, "did you mean birds?")


def test_verify_of_a_sound_store_exits_0(store):
    found = run_sfm_json("verify", store.url)["entries"]
    assert [v["sound"] for v in found] == [True] * 3
    done = run_sfm("verify", store.url, "--quiet")
    assert done.exit_code == 0
    assert "sound" in done.stdout
    assert done.stderr == ""
    assert len(run_sfm_json("verify", store.url, "--dataset", "birds@tuning")["entries"]) == 1


def test_verify_reports_damaged_objects_and_exits_1(store, tmp_path):
    run = store.open_entry(store.list_summaries()[0]).commit.run
    chunk = tmp_path / "s" / "runs" / run / "train" / "mean" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    done = run_sfm("verify", store.url, "--quiet")
    assert_one_line_error(done, 1, "1 of 3 entries are damaged")
    assert f"damaged object runs/{run}/train/mean/c/0/0" in done.stdout
    assert "DAMAGED" in done.stdout
    assert run_sfm("verify", store.url, "--backbone", "lite1").exit_code == 0
    script = run_sfm("verify", store.url, "--json", "--quiet")
    assert script.exit_code == 1
    assert [e["sound"] for e in json.loads(script.stdout)["entries"]].count(False) == 1


def test_rm_removes_one_entry_and_rm_all_removes_every_match(store):
    assert_one_line_error(run_sfm("rm", store.url, "birds"), 2, "several entries fit")
    would = run_sfm_json("rm", store.url, "birds", "--all", "--dry-run")
    assert (len(would["removed"]), would["dry_run"]) == (3, True)
    assert len(store.list_summaries()) == 3
    done = run_sfm("rm", store.url, "birds", "--backbone", "lite1")
    assert done.exit_code == 0
    assert f"sfm store gc {store.url} --now" in done.stdout
    assert {s.backbone for s in store.list_summaries()} == {"lite0"}
    assert len(run_sfm_json("rm", store.url, "birds", "--all")["removed"]) == 2
    assert store.list_summaries() == []
    assert_one_line_error(
        run_sfm("rm", store.url, "birds"), 2, "no dataset 'birds'", "the store holds nothing"
    )


def test_gc_now_deletes_removed_and_replaced_runs_and_keeps_recent_uncommitted_ones(store, tmp_path):
    Draft(store).write_array("train/count", np.arange(3))
    run_sfm("rm", store.url, "birds", "--backbone", "lite1")
    assert run_sfm_json("gc", store.url)["deleted"] == []
    would = run_sfm_json("gc", store.url, "--now", "--dry-run")
    assert sorted(g["reason"] for g in would["deleted"]) == ["removed", "replaced"]
    assert [g["reason"] for g in would["kept"]] == ["never committed"]
    assert "Would be deleted: 2" in run_sfm("gc", store.url, "--now", "--dry-run").stdout
    done = run_sfm_json("gc", store.url, "--now")
    assert sum(g["bytes"] for g in done["deleted"]) == sum(g["bytes"] for g in would["deleted"]) > 0
    age_files(tmp_path)
    assert [g["reason"] for g in run_sfm_json("gc", store.url)["deleted"]] == ["never committed"]
    assert "nothing to delete" in run_sfm("gc", store.url).stdout
    assert_one_line_error(run_sfm("gc", store.url, "--older-than", "soon"), 2, "'soon' is not a duration")


def test_copy_reports_the_outcome_of_every_entry(store, tmp_path):
    target = tmp_path / "t"
    first = run_sfm_json("copy", store.url, target)["entries"]
    assert [e["outcome"] for e in first] == ["copied"] * 3
    assert all(e["objects_written"] > 0 for e in first)
    done = run_sfm("copy", store.url, target, "--dataset", "birds", "--backbone", "lite1")
    assert done.exit_code == 0
    assert "already there" in done.stdout
    assert_one_line_error(run_sfm("copy", store.url, target, "--dataset", "boats"), 2, "no dataset 'boats'")


def test_copy_over_a_different_entry_exits_2_and_suggests_replace(store, tmp_path):
    other = open_or_create_store(str(tmp_path / "t"))
    publish_random_entry(other, 9, dataset="birds")
    refused = run_sfm("copy", store.url, other.url, "--quiet")
    assert_one_line_error(refused, 2, "1 of 3 entries not copied", "--replace")
    assert "differs in the target" in refused.stdout
    assert run_sfm("copy", store.url, other.url, "--replace").exit_code == 0
    assert {s.entry_digest for s in other.list_summaries()} == {
        s.entry_digest for s in store.list_summaries()
    }


def test_copy_skips_entries_with_a_damaged_commit_and_exits_1(store, tmp_path):
    broken = tmp_path / "s" / make_commit_path(store.list_summaries()[0])
    broken.write_text("{}")
    done = run_sfm("copy", store.url, tmp_path / "t", "--quiet")
    assert_one_line_error(done, 1, "1 entries of", "damaged commit")
    assert len(open_store(str(tmp_path / "t")).list_summaries()) == 2
    assert run_sfm("copy", store.url, tmp_path / "t", "--backbone", "lite1").exit_code == 0


def test_copy_reports_damaged_source_objects_and_exits_1(store, tmp_path):
    run = store.open_entry(store.list_summaries()[0]).commit.run
    shutil.rmtree(tmp_path / "s" / "runs" / run / "train" / "mean")
    done = run_sfm("copy", store.url, tmp_path / "t", "--quiet")
    assert_one_line_error(done, 1, "1 of 3 entries not copied", f"runs/{run}/train/mean")
    assert len(open_store(str(tmp_path / "t")).list_summaries()) == 2


def test_invalid_merge_gives_a_one_line_error_and_creates_no_store(fashion_store, tmp_path):
    union, part = tmp_path / "u", f"{fashion_store}#fashion-mnist-6k"
    chosen = ("--backbone", "lite0", "--quiet")
    assert_one_line_error(run_sfm("merge", union, part, part), 2, "several entries fit, name --backbone")
    assert_one_line_error(
        run_sfm("merge", union, part, f"{fashion_store}#nothing", *chosen), 2, "no dataset 'nothing'"
    )
    assert_one_line_error(
        run_sfm("merge", union, part, part, "--device", "tpu", *chosen), 2, "--device 'tpu'"
    )
    assert_one_line_error(run_sfm("merge", union, part, *chosen), 2, "two parts or more")
    assert_one_line_error(run_sfm("merge", union, part, part, *chosen), 2, "the parts share data")
    assert not union.exists()


def test_merge_without_training_features_does_not_import_torch(tmp_path):
    store = open_or_create_store(str(tmp_path / "s"))
    for name in ("north", "south"):
        draft = Draft(store)
        write_random_arrays(draft)
        draft.write_array("train/scatter_diagonal", np.ones((4, 6)))
        draft.write_array("train/within_scatter", 4 * np.eye(6))
        publish_with_placeholder_cards(draft, dataset=name, fingerprint=compute_sha256(name.encode()))
    code = (
        "import sys\n"
        f"sys.argv = ['sfm', 'store', 'merge', {store.url!r}, 'north', 'south', '--json', '--quiet']\n"
        "from sfm.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False\n")
    found = json.loads(done.stdout)
    assert found["entry"]["outcome"] == "published"
    assert found["entry"]["dataset"] == "north+south"
    assert found["notes"][0].startswith("classifier: linear discriminant")
    assert "north+south" in run_sfm("merge", store.url, "south", "north").stdout
    dry_run = run_sfm_json("rm", store.url, "north", "--dry-run")
    assert [s["dataset"] for s in dry_run["contained_in"]] == ["north+south"]


def test_store_commands_work_on_s3(store, s3_url):
    assert [e["outcome"] for e in run_sfm_json("copy", store.url, s3_url)["entries"]] == ["copied"] * 3
    assert len(run_sfm_json("ls", s3_url)["entries"]) == 3
    assert run_sfm_json("show", s3_url, "birds@tuning")["summary"]["role"] == "tuning"
    assert all(v["sound"] for v in run_sfm_json("verify", s3_url)["entries"])
    assert len(run_sfm_json("rm", s3_url, "birds", "--all")["removed"]) == 3
    assert len(run_sfm_json("gc", s3_url, "--now")["deleted"]) == 3
    assert run_sfm_json("ls", s3_url)["entries"] == []


def test_distill_reads_a_pinned_entry_after_it_was_replaced(fashion_store, tmp_path):
    shutil.copytree(fashion_store, tmp_path / "s")
    store = open_or_create_store(str(tmp_path / "s"))
    (old,) = [s for s in store.list_summaries() if (s.backbone, s.role) == ("lite0", "full")]
    replace_with_shifted_means(store, old)
    assert old not in store.list_summaries()
    pinned = f"{old.dataset}@{old.entry_digest[:12]}"
    run = distill(
        DistillConfig(store=store.url, backbone="lite0", dataset=pinned, steps=2, out=tmp_path / "d")
    )
    assert run.record["entry_digest"] == old.entry_digest


def replace_with_shifted_means(store: Store, summary) -> None:
    """Publish the next generation of an entry, with its means moved."""
    from sfm.stats_store.publication import publish_draft

    entry = store.open_entry(summary)
    draft = Draft(store)
    for name in entry.list_array_names():
        draft.write_array(name, entry.read_array(name) + (1.0 if name == "train/mean" else 0))
    publish_draft(draft, entry.backbone, entry.dataset, entry.extraction, entry.classifier, replace=True)


def test_show_per_class_reports_the_accuracy_of_every_class(fashion_store):
    store = open_store(fashion_store)
    entry = store.open_entry(
        next(s for s in store.list_summaries() if (s.backbone, s.role) == ("lite0", "full"))
    )
    labels, features = entry.read_array("test/label"), entry.read_array("test/feature").astype(np.float32)
    predicted = (
        features @ entry.read_array("classifier/weight").T + entry.read_array("classifier/bias")
    ).argmax(1)
    expected = [float((predicted[labels == c] == c).mean()) for c in range(10)]
    words = ("show", fashion_store, "fashion-mnist-6k", "--backbone", "lite0")
    shown = run_sfm_json(*words, "--per-class")["classes"]
    assert [c["held_out_top1"] for c in shown] == pytest.approx(expected, abs=0.026)
    assert "held_out_top1" not in run_sfm_json(*words)["classes"][0]
    printed = run_sfm(*words, "--per-class").stdout
    worst, best = (entry.dataset.class_names[place(expected)] for place in (np.argmin, np.argmax))
    assert printed.index(f" {worst} ") < printed.index(f" {best} ")

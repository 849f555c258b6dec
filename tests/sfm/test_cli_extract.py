"""What ``sfm extract`` says: plans, skipped images, workers."""

import json
import subprocess

from typer.testing import CliRunner

from sfm.cli import app


def run_sfm(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command in this process, in which torch is loaded."""
    words = list(map(str, arguments))
    done = CliRunner().invoke(app, words)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, image_folder):
    extract = ["extract", f"folder:{image_folder}", "--store", tmp_path / "s", "--backbone", "lite0"]
    done = run_sfm(*extract, "--image-size", 32, "--dry-run", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["plan"]
    assert planned["samples"] == {"train": 36, "test": 24}
    assert planned["seconds"] > 0
    assert planned["files"] == {"found": 60, "used": 60, "unused": {}}
    assert planned["statistics_seconds"] > 0
    assert not (tmp_path / "s").exists()


def test_skipped_images_are_reported_in_the_final_output_and_in_json(tmp_path, image_folder):
    broken = image_folder / "train/boot/003.png"
    broken.write_bytes(broken.read_bytes()[:50])
    extract = ["extract", f"folder:{image_folder}", "--store", tmp_path / "s", "--backbone", "lite0"]
    refused = run_sfm(*extract, "--image-size", 32)
    assert refused.returncode == 2
    assert f"cannot decode {broken}" in refused.stderr
    done = run_sfm(*extract, "--image-size", 32, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert "1 images could not be decoded and are not in the entries" in done.stdout
    assert str(broken) in done.stdout
    assert "60 files found, 59 used, 1 not used: 1 images that cannot be decoded" in done.stdout
    assert "then classifiers, sub-class centres and publishing in " in done.stdout
    again = run_sfm(*extract, "--image-size", 32, "--on-error", "skip", "--json")
    document = json.loads(again.stdout)
    (line,) = document["skipped"]
    assert document["files"] == {"found": 60, "used": 59, "unused": {"images that cannot be decoded": 1}}
    assert line.startswith(f"{broken}: ")


def test_workers_and_scheduler_options_are_mutually_exclusive(tmp_path):
    extract = ["extract", "builtin:fashion-mnist-6k", "--store", tmp_path / "s", "--backbone", "lite0"]
    done = run_sfm(*extract, "--workers", 2, "--scheduler", "tcp://127.0.0.1:1")
    assert done.returncode == 2
    assert "give one of the two" in done.stderr
    assert done.stderr.count("\n") == 1

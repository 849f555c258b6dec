"""The command line as a user meets it: exit codes, output, one line per mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfm.cli import app

Result = subprocess.CompletedProcess[str]

SFM = str(Path(sys.executable).with_name("sfm"))

DATASET = "fashion-mnist-6k"


def run_sfm_process(*arguments: object) -> Result:
    """Run the installed command in a process of its own."""
    return subprocess.run(
        [SFM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "140"},
    )


def run_sfm(*arguments: object) -> Result:
    """Run a command in this process: importing torch takes longer than most commands."""
    words = list(map(str, arguments))
    done = CliRunner().invoke(app, words, env={"COLUMNS": "140"})
    return Result(words, done.exit_code, done.stdout, done.stderr)


def assert_refused(done: Result, *words: str) -> None:
    """Exit 2, one line on stderr that holds the words, no traceback, nothing on stdout."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in lines[0]


def test_help_lists_every_command_and_shows_examples():
    assert all(
        word in run_sfm("--help").stdout
        for word in ("extract", "distill", "evaluate", "report", "export", "store", "quickstart")
    )
    for command in (
        ["extract"],
        ["distill"],
        ["evaluate"],
        ["report"],
        ["export"],
        ["quickstart"],
        ["store", "ls"],
        ["store", "show"],
    ):
        done = run_sfm(*command, "--help")
        assert done.returncode == 0
        assert f"$ sfm {' '.join(command)}" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["store", "ls"], ["store", "show"]])
def test_help_ls_and_show_do_not_import_torch_or_sklearn(arguments, fashion_store):
    if arguments[0] == "store":
        arguments = [*arguments, fashion_store, "fashion-mnist-6k@tuning", "--backbone", "lite0"]
        arguments = arguments[:3] if arguments[1] == "ls" else arguments
    code = (
        f"import sys; sys.argv = ['sfm', *{arguments!r}]\n"
        "from sfm.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'sklearn'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_the_installed_command_prints_its_version():
    assert run_sfm_process("--version").stdout.startswith("sfm-distill 0.")


def test_every_config_field_is_a_command_line_option():
    from sfm.distill.config import DistillConfig
    from sfm.eval.config import EvaluateRunsConfig
    from sfm.eval.export.config import ExportConfig
    from sfm.eval.report.config import ReportConfig
    from sfm.pipeline.extract_config import ExtractConfig

    for command, model in (
        ("extract", ExtractConfig),
        ("distill", DistillConfig),
        ("evaluate", EvaluateRunsConfig),
        ("report", ReportConfig),
        ("export", ExportConfig),
    ):
        shown = run_sfm(command, "--help").stdout
        for name, field in model.model_fields.items():
            if not (field.json_schema_extra or {}).get("argument"):
                assert f"--{name.replace('_', '-')}" in shown


def test_help_of_label_options_says_that_they_need_soft_labels():
    from sfm.distill.config import DistillConfig

    for name in ("label_views", "label_temperature"):
        assert "(with --soft-labels)" in DistillConfig.model_fields[name].description


def test_ls_prints_a_table_and_json(fashion_store):
    assert DATASET in run_sfm("store", "ls", fashion_store).stdout
    entries = json.loads(run_sfm("store", "ls", fashion_store, "--json").stdout)["entries"]
    assert {(e["backbone"], e["role"]) for e in entries} == {
        (b, r) for b in ("lite0", "lite1") for r in ("full", "tuning")
    }
    wanted = {
        "backbone",
        "backbone_hash",
        "image_size",
        "dataset",
        "fingerprint",
        "options",
        "role",
        "classes",
        "features",
    }
    assert wanted <= set(entries[0])


def test_show_prints_cards_classes_and_arrays(fashion_store):
    shown = run_sfm("store", "show", fashion_store, DATASET, "--backbone", "lite0").stdout
    assert all(
        word in shown for word in ("Ankle boot", "train/within_scatter", "licence: MIT", "converged: True")
    )
    done = run_sfm("store", "show", fashion_store, DATASET, "--backbone", "lite0", "--json")
    assert json.loads(done.stdout)["arrays"]["train/mean"]["shape"] == [10, 1280]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract", "bultin:fashion-mnist-6k", "--backbone", "lite0"], ["did you mean builtin:"]),
        (["extract", "builtin:fashion-mnist-6k", "--backbone", "lite9"], ["lite9", "lite0"]),
        (["extract", "builtin:fashion-mnist-6k"], ["--backbone is required"]),
        (["extract", "--backbone", "lite0"], ["DATASET is required"]),
        (
            ["extract", "builtin:fashion-mnist-6k", "--backbone", "lite0", "--image-size", "0"],
            ["--image-size 0", "greater than or equal to 1"],
        ),
        (
            ["extract", "builtin:fashion-mnist-6k", "--backbone", "lite0", "--sub-classes", "five"],
            ["--sub-classes", "integer"],
        ),
        (["extract", "builtin:fashion-mnist-6k", "--backbone", "lite0", "--device", "cuda"], ["GPU"]),
        (["extract", "folder:/nowhere", "--backbone", "lite0"], ["/nowhere is not a folder"]),
    ],
)
def test_invalid_extract_arguments_exit_2_with_one_line_error_and_no_store(tmp_path, arguments, words):
    assert_refused(run_sfm(*arguments, "--store", tmp_path / "store"), *words)
    assert not (tmp_path / "store").exists()


def run_distill(store: str, out: Path, *more: object) -> Result:
    backbone = [] if "--backbone" in more else ["--backbone", "lite0"]
    return run_sfm("distill", "--store", store, *backbone, "--out", out, "--steps", 2, *more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dataset", "fashion-mnits-6k"], ["did you mean fashion-mnist-6k"]),
        (["--dataset", "cifar10"], ["the store holds fashion-mnist-6k@"]),
        (["--dataset", "fashion-mnist-6k@0000"], ["it holds fashion-mnist-6k@"]),
        (["--dataset", DATASET, "--image-size", "64"], ["at 64 px", "lite0 32px"]),
        (["--dataset", DATASET, "--backbone", "lite2"], ["lite2", "lite0 32px"]),
        (["--dataset", DATASET, "--ipc", "7"], ["7"]),
        (["--dataset", DATASET, "--objective", "mse"], ["--objective mse", "sfm-decoupled"]),
        (
            ["--dataset", DATASET, "--backbone-weight", "1", "--backbone-weight", "2"],
            ["2 values for 1 --backbone: give one --backbone-weight for each"],
        ),
        (
            ["--dataset", DATASET, "--backbone", "lite0", "--backbone", "lite1", "--backbone-weight", "1"],
            ["1 value for 2 --backbone: give one --backbone-weight for each"],
        ),
        (["--dataset", DATASET, "--backbone-weight", "0"], ["--backbone-weight 0", "greater than or equal"]),
        (["--dataset", DATASET, "--backbone-weight", "1e308"], ["--backbone-weight 1e", "less than"]),
        (["--dataset", DATASET, "--backbone-weight", "nan"], ["--backbone-weight", "finite"]),
        (["--dataset", DATASET, "--image-size", "32", "--image-size", "64"], ["--image-size", "2 values"]),
        (["--dataset", DATASET, "--feature-decay", "1"], ["--feature-decay 1", "less than 1"]),
        (["--dataset", DATASET, "--centres", "mean"], ["--centres mean", "'class-mean' or 'class-average'"]),
        (["--dataset", DATASET, "--views", "2", "--no-augmentation"], ["the views of an image are equal"]),
        (
            ["--dataset", DATASET, "--parametrization", "pixels", "--first-resolution", "4"],
            ["--first-resolution 4", "plain pixels have no levels"],
        ),
        (["--dataset", DATASET, "--first-resolution", "99"], ["larger than the images: give at most 37"]),
        (["--dataset", DATASET, "--canvas-pixels", "4"], ["--canvas-pixels 4", "greater than or equal to 8"]),
        (["--dataset", DATASET, "--crop-edge", "pad"], ["--crop-edge pad", "'clip' or 'zero'"]),
        (["--dataset", DATASET, "--backbone", "lite0", "--backbone", "lite0"], ["lite0", "given twice"]),
    ],
)
def test_invalid_distill_arguments_exit_2_with_one_line_error_and_no_output(
    fashion_store, tmp_path, more, words
):
    assert_refused(run_distill(fashion_store, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_ls_of_a_location_without_a_store_exits_2_with_one_line_error(tmp_path):
    assert_refused(run_sfm("store", "ls", tmp_path), "is not a store")
    assert_refused(run_sfm("store", "ls", tmp_path / "nothing"), "no such folder")
    assert_refused(run_sfm("store", "ls", "ftp://host/x"), "ftp://")


def test_a_store_of_a_newer_major_schema_is_refused(tmp_path):
    root = {"zarr_format": 3, "node_type": "group", "attributes": {"schema": {"major": 2, "minor": 0}}}
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    assert_refused(run_sfm("store", "ls", tmp_path), "schema 2.0", "upgrade sfm-distill")


def test_different_weights_are_refused_naming_the_differing_part(fashion_store, tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "w.safetensors")
    done = run_sfm(
        "distill",
        "--store",
        fashion_store,
        "--backbone",
        f"timm/tf_efficientnet_lite0@{tmp_path / 'w.safetensors'}",
        "--dataset",
        DATASET,
        "--out",
        tmp_path / "out",
    )
    assert_refused(done, "differs in the weights")


def test_a_run_json_repeats_a_run_and_options_override_it(fashion_store, tmp_path):
    assert run_distill(fashion_store, tmp_path / "a", "--dataset", DATASET, "--seed", 3).returncode == 0
    repeat = ["distill", "--config", tmp_path / "a" / "run.json", "--store", fashion_store]
    again = run_sfm(*repeat, "--out", tmp_path / "b", "--json", "--quiet")
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout)["seed"] == 3
    assert len(read_images(tmp_path / "a")) == 10
    assert read_images(tmp_path / "b") == read_images(tmp_path / "a")
    other = run_sfm(*repeat, "--out", tmp_path / "c", "--seed", 4, "--json", "--quiet")
    assert json.loads(other.stdout)["seed"] == 4
    assert_refused(run_sfm("evaluate", "--config", tmp_path / "a" / "run.json"), "is of `sfm distill`")


def read_images(run_directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_directory)): path.read_bytes()
        for path in run_directory.rglob("images/*/*.png")
    }


def test_output_folder_with_a_finished_run_is_refused(fashion_store, tmp_path):
    assert run_distill(fashion_store, tmp_path / "a", "--dataset", DATASET).returncode == 0
    assert_refused(run_distill(fashion_store, tmp_path / "a", "--dataset", DATASET), "holds a finished run")


@pytest.mark.slow
def test_distill_checkpoints_on_ctrl_c_prints_a_resume_hint_and_resumes(fashion_store, tmp_path):
    command = ["distill", "--store", fashion_store, "--backbone", "lite0", "--dataset", DATASET]
    command += ["--out", str(tmp_path / "run"), "--steps", "100", "--checkpoint-every", "1000"]
    process = subprocess.Popen([SFM, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    history = tmp_path / "run" / "history.csv"
    while not history.exists() or history.read_text().count("\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    done = run_sfm(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(read_images(tmp_path / "run")) == 10


def test_full_disk_gives_a_one_line_error_and_publishes_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        extract = ["extract", "builtin:fashion-mnist-6k", "--store", disk / "store", "--backbone", "lite0"]
        done = run_sfm(*extract, "--image-size", 32, "--limit-per-class", 8)
        assert_refused(done, "no space left")
        listed = json.loads(run_sfm("store", "ls", disk / "store", "--json").stdout)
        assert listed == {"entries": [], "unreadable": []}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_read_only_store_location_gives_a_one_line_error(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert_refused(
        run_sfm("extract", "builtin:fashion-mnist-6k", "--store", tmp_path / "s", "--backbone", "lite0"),
        "denied",
    )

import csv
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from sfm.distill.config import DistillConfig
from sfm.distill.run import DistillInterrupt, distill, holds_user_files
from sfm.distill.run_checkpoints import delete_old_checkpoints
from sfm.errors import DamageError, InputError
from sfm.events import Progress


def read_image_files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("images/*/*.png"))}


def read_history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open() as file:
        return list(csv.DictReader(file))


def read_history_without_seconds(out: Path) -> list[tuple[str, ...]]:
    """The history without its clock."""
    return [tuple(value for name, value in row.items() if name != "seconds") for row in read_history(out)]


class SimulatedCrashError(Exception):
    pass


def crash_after_step(step: int) -> Callable[[Progress], None]:
    def listen(event: Progress) -> None:
        if event.stage == "distil" and event.done == step:
            raise SimulatedCrashError

    return listen


def test_a_run_writes_images_classes_record_history_and_preview(config: DistillConfig) -> None:
    seen: list[Progress] = []
    result = distill(config, seen.append)
    out = config.out
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint",
        "classes.json",
        "growth",
        "history.csv",
        "images",
        "preview.png",
        "run.json",
    ]
    assert json.loads((out / "classes.json").read_text())[1] == {
        "index": 1,
        "class_id": "class1",
        "name": "sock, left",
    }
    record = json.loads((out / "run.json").read_text())
    assert record == result.record
    assert record["command"] == "distill"
    asked = config.model_copy(update={"threads": torch.get_num_threads()})
    assert DistillConfig.model_validate(record["config"]) == asked
    assert (record["image_size"], record["canvas"], record["ipc"]) == (32, 37, 1)
    assert record["backbone"]["hash"]
    assert record["peak_memory_bytes"] > 1e8
    rows = read_history(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [int(row["resolution"]) for row in rows] == [1, 2, 4, 8, 16, 32] + [37] * 6
    assert float(rows[-1]["loss"]) == pytest.approx(record["loss"], rel=1e-6)
    assert [(event.done, event.total) for event in seen] == [(step, 12) for step in range(13)]
    with Image.open(out / "preview.png") as sheet:
        assert min(sheet.size) > 100


def test_image_folder_reads_the_images_in_class_order(config: DistillConfig) -> None:
    distill(config.model_copy(update={"ipc": 2, "steps": 2}))
    dataset = ImageFolder(config.out / "images")
    assert dataset.classes == ["0_t-shirt-top", "1_sock-left", "2_strasse", "3_class3"]
    assert dataset.targets == [0, 0, 1, 1, 2, 2, 3, 3]
    with Image.open(dataset.samples[0][0]) as image:
        assert (image.size, image.mode, image.format) == ((37, 37), "RGB", "PNG")


@pytest.mark.parametrize("objective", ["sfm", "sfm-decoupled"])
def test_distilling_lowers_the_loss(config: DistillConfig, objective: str) -> None:
    constant = {"steps": 60, "views": 2, "learning_rate": 0.03, "final_rate": 1.0}
    distill(config.model_copy(update={"objective": objective, **constant}))
    losses = [float(row["loss"]) for row in read_history(config.out)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_images_of_a_class_differ_and_a_missing_centre_falls_back_to_the_mean(
    config: DistillConfig,
) -> None:
    distill(config.model_copy(update={"ipc": 2}))
    for folder in sorted((config.out / "images").iterdir()):
        one, two = sorted(folder.iterdir())
        assert one.read_bytes() != two.read_bytes()


def test_equal_seeds_give_equal_images_and_other_seeds_do_not(config: DistillConfig, tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(runs))
        distill(config.model_copy(update={"out": tmp_path / name, "seed": seed, "steps": 4}))
        runs[name] = read_image_files(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert set(runs["a"].values()).isdisjoint(runs["c"].values())


@pytest.mark.parametrize("lost_after", [1, 5, 6, 9, 12])
def test_a_crashed_and_resumed_run_matches_an_uninterrupted_run(
    config: DistillConfig, tmp_path: Path, lost_after: int
) -> None:
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    every = {"checkpoint_every": 3, "views": 2}
    distill(config.model_copy(update={"out": undisturbed, **every}))
    with pytest.raises(SimulatedCrashError):
        distill(config.model_copy(update={"out": broken, **every}), crash_after_step(lost_after))
    assert not (broken / "images").exists()
    distill(config.model_copy(update={"out": broken, "resume": True, **every}))
    assert read_image_files(broken) == read_image_files(undisturbed)
    assert read_history_without_seconds(broken) == read_history_without_seconds(undisturbed)


@pytest.mark.parametrize(("gradient", "graphs"), [("exact", 0), ("exact", 4), ("one-pass", 0)])
@pytest.mark.parametrize("lost_after", [5, 8])
def test_a_run_with_micro_batches_resumes_exactly(
    config: DistillConfig, tmp_path: Path, gradient: str, graphs: int, lost_after: int
) -> None:
    cut = {"micro_batch": 3, "gradient": gradient, "graphs": graphs}
    config = config.model_copy(update={"checkpoint_every": 4, "final_rate": 0.1, **cut})
    undisturbed = config.model_copy(update={"out": tmp_path / "undisturbed"})
    distill(undisturbed)
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(lost_after))
    distill(config.model_copy(update={"resume": True}))
    assert read_image_files(config.out) == read_image_files(undisturbed.out)
    assert read_history_without_seconds(config.out) == read_history_without_seconds(undisturbed.out)


def test_a_resumed_run_keeps_its_micro_batch_and_graph_counts(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(2))
    monkeypatch.setattr("sfm.distill.config_resolution.measure_free_memory_bytes", lambda device: 1)
    record = distill(config.model_copy(update={"resume": True})).record
    assert (record["micro_batch"], record["graphs"]) == (4, 4)


def test_a_resumed_run_keeps_its_thread_count(config: DistillConfig) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(SimulatedCrashError):
            distill(config, crash_after_step(2))
        torch.set_num_threads(1)
        assert distill(config.model_copy(update={"resume": True})).record["threads"] == 2
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_resumed_run_with_another_thread_count_records_a_note(config: DistillConfig) -> None:
    with pytest.raises(SimulatedCrashError):
        distill(config.model_copy(update={"threads": 2, "checkpoint_every": 2}), crash_after_step(3))
    told: list[str] = []
    before = torch.get_num_threads()
    again = config.model_copy(update={"resume": True, "threads": 1})
    record = distill(again, lambda event: told.append(event.note)).record
    assert record["threads"] == 1
    assert record["notes"] == [
        "computed with 2, then 1 threads: the last bits may differ from a run with one number throughout"
    ]
    assert [note for note in told if note] == record["notes"]
    assert torch.get_num_threads() == before
    assert distill(config.model_copy(update={"resume": True})).record == record


def test_a_class_subset_is_distilled_with_its_own_flow(config: DistillConfig, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.txt"
    chosen.write_bytes("\ufeff# two\r\nclass3\tthe last\r\n\r\nT-shirt/top\r\n".encode())
    distill(config.model_copy(update={"classes": chosen, "ipc": 2}))
    assert [path.name for path in sorted((config.out / "images").iterdir())] == ["0_t-shirt-top", "1_class3"]
    assert json.loads((config.out / "classes.json").read_text()) == [
        {"index": 0, "class_id": "class0", "name": "T-shirt/top"},
        {"index": 1, "class_id": "class3", "name": "猫"},
    ]
    assert json.loads((config.out / "run.json").read_text())["train_samples"] == 2 * 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class0\nclass9\n", r"chosen.txt: patterns has no class 'class9'; did you mean"),
        ("class0\nT-shirt/top\n", "chosen.txt names 'T-shirt/top' again"),
        ("class0\n", "at least two classes"),
        ("class0 # the first\nclass3\n", "only at the beginning of a line"),
        ("class0\nclass0\n", "line 2 of class list .* repeats"),
    ],
)
def test_an_invalid_class_list_is_refused_before_any_output(
    config: DistillConfig, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "chosen.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        distill(config.model_copy(update={"classes": file}))
    with pytest.raises(InputError, match="cannot read the class list"):
        distill(config.model_copy(update={"classes": tmp_path / "none.txt"}))
    assert not config.out.exists()


def test_without_sub_class_centres_images_are_matched_to_the_class_mean(
    config: DistillConfig,
) -> None:
    result = distill(config.model_copy(update={"ipc": 3, "centres": "class-mean"}))
    assert result.record["ipc"] == 3
    assert len(read_image_files(config.out)) == 12


def test_a_run_of_plain_pixels_writes_what_any_run_does(config: DistillConfig) -> None:
    knobs = {"parametrization": "pixels", "canvas_pixels": 24, "color_decorrelation": False}
    result = distill(config.model_copy(update={"steps": 3, **knobs}))
    assert result.record["canvas"] == 24
    assert result.record["resolved"] | knobs == result.record["resolved"]
    assert [file.name for file in (config.out / "growth").iterdir()] == ["step_00000003.png"]
    again = config.model_copy(update={"out": config.out.with_name("again"), "steps": 3})
    again = DistillConfig.model_validate(result.record["config"] | {"out": again.out})
    assert distill(again).record["images"] == result.record["images"]


def test_old_checkpoints_are_deleted_and_one_is_left_at_the_end(config: DistillConfig) -> None:
    config = config.model_copy(update={"checkpoint_every": 2})
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(9))
    assert sorted(path.name for path in (config.out / "checkpoint").iterdir()) == [
        "step_00000006",
        "step_00000008",
    ]
    distill(config.model_copy(update={"resume": True}))
    assert [path.name for path in (config.out / "checkpoint").iterdir()] == ["step_00000012"]


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(config: DistillConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"checkpoint_every": 4})
    undisturbed = config.model_copy(update={"out": tmp_path / "undisturbed"})
    distill(undisturbed)
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(10))
    newest = config.out / "checkpoint" / "step_00000008" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    distill(config.model_copy(update={"resume": True}))
    assert read_image_files(config.out) == read_image_files(undisturbed.out)


def test_resuming_without_a_checkpoint_starts_from_scratch(config: DistillConfig) -> None:
    distill(config.model_copy(update={"resume": True, "steps": 2}))
    assert len(read_history(config.out)) == 2


def test_resuming_a_finished_run_returns_it_unchanged(config: DistillConfig) -> None:
    first = distill(config.model_copy(update={"steps": 3}))
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    again = distill(config.model_copy(update={"steps": 3, "resume": True}))
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("learning_rate", 0.5),
        ("final_rate", 0.5),
        ("graphs", 1),
        ("steps", 13),
        ("views", 2),
        ("ipc", 2),
        ("objective", "sfm-decoupled"),
        ("grow_every", 4),
        ("micro_batch", 3),
        ("gradient", "one-pass"),
        ("centres", "class-average"),
        ("parametrization", "pixels"),
        ("first_resolution", 4),
        ("canvas_pixels", 40),
        ("start", "zeros"),
        ("color_decorrelation", False),
        ("augmentation", False),
        ("crop_edge", "zero"),
        ("precision", "bf16"),
    ],
)
def test_resuming_with_changed_options_is_refused(config: DistillConfig, field: str, value: object) -> None:
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(2))
    with pytest.raises(InputError, match=rf"cannot resume .*[:;] {field} was .* now"):
        distill(config.model_copy(update={"resume": True, field: value}))


def test_resuming_with_another_dataset_is_refused(
    config: DistillConfig, features: np.ndarray, publish_entry: Callable[..., str], tmp_path: Path
) -> None:
    publish_entry(tmp_path / "store", "patterns", {"train/mean": features.mean(1) * 2})
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(2))
    with pytest.raises(InputError, match="dataset was"):
        distill(config.model_copy(update={"resume": True, "store": str(tmp_path / "store")}))


DISTILL_PROGRAM = """
import sys
from sfm.start import collect_garbage_less_often
collect_garbage_less_often()
from sfm.distill.config import DistillConfig
from sfm.distill.run import DistillInterrupt, distill

config = DistillConfig.model_validate_json(sys.argv[1])
try:
    distill(config, lambda event: print(event.done, flush=True))
except DistillInterrupt as stop:
    print(stop)
    sys.exit(130)
"""


def start_run(config: DistillConfig) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", DISTILL_PROGRAM, config.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE)


def wait_for_step(process: "subprocess.Popen[str]", step: int) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.strip() == str(step):
            return
    pytest.fail(f"ended before step {step}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def uninterrupted_run(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    distill(DistillConfig(store=store, backbone="lite0", dataset="patterns", out=out, steps=40, device="cpu"))
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_a_process_stopped_by_a_signal_resumes_bit_for_bit(
    config: DistillConfig, uninterrupted_run: Path, number: signal.Signals
) -> None:
    config = config.model_copy(update={"steps": 40, "checkpoint_every": 7})
    process = start_run(config)
    wait_for_step(process, 10)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert not (config.out / "images").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, stderr
        assert "of 40" in stdout
        assert "--resume" in stdout
        newest = max((config.out / "checkpoint").iterdir()).name
        assert len(read_history(config.out)) == int(newest.removeprefix("step_")) < 40
    distill(config.model_copy(update={"resume": True}))
    assert read_image_files(config.out) == read_image_files(uninterrupted_run)
    assert read_history_without_seconds(config.out) == read_history_without_seconds(uninterrupted_run)


def test_signal_handlers_are_restored_after_a_run(config: DistillConfig) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(event: Progress) -> None:
        if event.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(DistillInterrupt) as stop:
        distill(config, interrupt)
    assert (stop.value.step, stop.value.total) == (3, 12)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_out_directory_with_a_run_is_refused(config: DistillConfig) -> None:
    with pytest.raises(SimulatedCrashError):
        distill(config, crash_after_step(2))
    with pytest.raises(InputError, match=r"saved at step 0.*--resume"):
        distill(config)
    distill(config.model_copy(update={"resume": True}))
    with pytest.raises(InputError, match="a finished run"):
        distill(config)


def test_a_very_deep_out_directory_counts_as_not_empty(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        assert holds_user_files(tmp_path)
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


@pytest.mark.parametrize("resume", [False, True])
def test_an_out_directory_with_user_files_is_refused_and_left_unchanged(
    config: DistillConfig, resume: bool
) -> None:
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        distill(config.model_copy(update={"resume": resume}))
    assert [path.name for path in config.out.iterdir()] == ["thesis.tex"]


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder of somebody who has no part in it."""
    folder = tmp_path / "elsewhere"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter1.tex").write_text("mine")
    return folder


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["checkpoint", "growth"])
def test_a_symlinked_checkpoint_or_growth_folder_is_refused_before_any_work(
    config: DistillConfig, user_folder: Path, name: str, resume: bool
) -> None:
    config.out.mkdir()
    (config.out / name).symlink_to(user_folder)
    with pytest.raises(InputError, match=rf"run/{name} is a symbolic link.*put a folder in its place"):
        distill(config.model_copy(update={"resume": resume}))
    assert [path.relative_to(user_folder).as_posix() for path in user_folder.rglob("*")] == [
        "thesis",
        "thesis/chapter1.tex",
    ]


def test_checkpoints_are_not_deleted_through_a_symlink(tmp_path: Path, user_folder: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(user_folder)
    with pytest.raises(InputError, match="checkpoint is a symbolic link"):
        delete_old_checkpoints(tmp_path / "checkpoint", 1)
    assert (user_folder / "thesis" / "chapter1.tex").read_text() == "mine"


def test_symlinks_among_checkpoints_and_images_are_replaced_and_their_targets_kept(
    config: DistillConfig, user_folder: Path
) -> None:
    with pytest.raises(SimulatedCrashError):
        distill(config.model_copy(update={"checkpoint_every": 2}), crash_after_step(5))
    checkpoints = config.out / "checkpoint"
    for path in (config.out / "images", config.out / ".images.partial", checkpoints / "step_00000001"):
        path.symlink_to(user_folder)
    (checkpoints / ".step_00000012.partial").symlink_to(user_folder)
    distill(config.model_copy(update={"checkpoint_every": 2, "resume": True}))
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000012"]
    assert not (config.out / "images").is_symlink()
    assert (user_folder / "thesis" / "chapter1.tex").read_text() == "mine"


def test_an_empty_out_directory_is_used_and_a_file_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    config.out.mkdir()
    (config.out / ".DS_Store").write_bytes(b"x")  # does not count
    distill(config.model_copy(update={"steps": 1}))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        distill(config.model_copy(update={"out": tmp_path / "file"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "pattern"}, "did you mean patterns"),
        ({"backbone": ["lite1"]}, "no entry of patterns through"),
        ({"backbone": ["lite9"]}, "lite"),
        ({"image_size": [48]}, "at 48 px"),
        ({"ipc": 3}, "choose --ipc from 1, 2, 8"),
        ({"store": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_invalid_input_raises_a_one_line_error_and_writes_nothing(
    config: DistillConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        distill(config.model_copy(update=change))
    assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_a_dataset_with_one_class_is_refused(
    config: DistillConfig, features: np.ndarray, publish_entry: Callable[..., str], tmp_path: Path
) -> None:
    publish_entry(tmp_path / "store", "one", {"train/mean": features.mean(1)[:1]})
    with pytest.raises(InputError, match="at least two classes"):
        distill(config.model_copy(update={"store": str(tmp_path / "store"), "dataset": "one"}))


def test_non_finite_statistics_are_refused_and_the_array_is_named(
    config: DistillConfig, features: np.ndarray, publish_entry: Callable[..., str], tmp_path: Path
) -> None:
    means = features.mean(1)
    bad = means.copy()
    bad[1, 3] = np.nan
    centres = np.stack([means, means], axis=1).astype(np.float32)
    centres[2, 1] = np.nan
    counts = np.full(centres.shape[:2], 4)
    store = tmp_path / "store"
    publish_entry(store, "bad-mean", {"train/mean": bad})
    publish_entry(
        store, "bad-centre", {"train/mean": means, "train/centre_2": centres, "train/centre_count_2": counts}
    )
    config = config.model_copy(update={"store": str(store)})
    with pytest.raises(DamageError, match=r"damaged array .*/train/mean: 1 of \d+ values is not finite"):
        distill(config.model_copy(update={"dataset": "bad-mean"}))
    with pytest.raises(DamageError, match=r"damaged array .*/train/centre_2: 1 sub-classes have samples"):
        distill(config.model_copy(update={"dataset": "bad-centre", "ipc": 2}))
    assert not config.out.exists()


def test_a_non_finite_loss_stops_the_run_and_reports_the_step(config: DistillConfig) -> None:
    with pytest.raises(InputError, match=r"loss is nan in step \d+: lower the learning rate"):
        distill(config.model_copy(update={"learning_rate": 1e38}))
    assert not (config.out / "run.json").exists()


def test_a_run_on_a_full_disk_can_be_resumed(config: DistillConfig, tmp_path: Path) -> None:
    undisturbed = config.model_copy(update={"out": tmp_path / "undisturbed", "checkpoint_every": 4})
    distill(undisturbed)
    config = config.model_copy(update={"checkpoint_every": 4})
    largest = max(path.stat().st_size for path in undisturbed.out.rglob("*.safetensors"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    command = [sys.executable, "-c", DISTILL_PROGRAM, config.model_dump_json()]
    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert "InputError: cannot write" in ended.stderr
    assert not [path for path in config.out.rglob("*") if path.name.startswith(".")]
    distill(config.model_copy(update={"resume": True}))
    assert read_image_files(config.out) == read_image_files(undisturbed.out)


def test_an_unwritable_preview_is_a_warning_and_the_run_finishes(
    config: DistillConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (config.out / "preview.png").mkdir(parents=True)
    result = distill(config.model_copy(update={"steps": 2}))
    assert json.loads((config.out / "run.json").read_text()) == result.record
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("sfm.distill")]
    assert f"{config.out}/preview.png is missing, the run is complete without it: " in message

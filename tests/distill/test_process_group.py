"""Runs that are shared among processes; really started ones, on real weights."""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sfm.distill.config import DistillConfig
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.pyramid import append_noise_level_and_rescale
from sfm.distill.run import DistillInterrupt, distill, distill_in_group
from sfm.errors import InputError
from sfm.events import Progress, no_progress


@given(classes=st.integers(1, 50), size=st.integers(1, 9), each=st.integers(1, 4))
def test_split_rows_assigns_each_class_to_one_process(classes: int, size: int, each: int) -> None:
    shares = ProcessGroup(0, size).split_rows(classes, each)
    assert [row for share in shares for row in range(share.start, share.stop)] == list(range(classes * each))
    lengths = [(share.stop - share.start) / each for share in shares]
    assert all(length.is_integer() for length in lengths)
    assert lengths[0] == max(lengths) <= min(lengths) + 1


@given(start=st.integers(0, 6), length=st.integers(1, 3), resolution=st.integers(1, 5))
def test_initial_noise_of_an_image_is_independent_of_its_process(
    start: int, length: int, resolution: int
) -> None:
    device, part = torch.device("cpu"), slice(start, start + length)
    (whole,) = append_noise_level_and_rescale([], resolution, 9, 5, device)
    (some,) = append_noise_level_and_rescale([], resolution, 9, 5, device, part)
    assert torch.equal(some, whole[part])


@pytest.mark.slow
def test_gradients_of_two_torchrun_processes_match_a_single_process(tmp_path: Path) -> None:
    program = Path(__file__).parent / "distributed_gradients.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, program, tmp_path],
        env=os.environ | {"PYTHONPATH": str(program.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    wanted = runpy.run_path(str(program))["gradients"](SINGLE_PROCESS)
    shared = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert [part["whole/0"].shape[0] for part in shared] == [6, 4]
    largest = wanted["whole/0"].abs().max()
    for name, value in wanted.items():
        kind, _, what = name.partition("/")
        for part in shared if what in ("loss", "features") else ():
            torch.testing.assert_close(part[name], value, rtol=1e-10, atol=1e-10)
        if what.isdigit() and kind != "one":
            together = torch.cat([part[name] for part in shared])
            assert (together - value).abs().max() <= 1e-10 * largest
    # In one pass the first micro-batch of each process sees what was there before; so does that of one.
    torch.testing.assert_close(shared[0]["one/0"][:3], wanted["one/0"][:3], rtol=1e-9, atol=1e-10 * largest)


def read_reproducible_files(out: Path) -> dict[str, bytes]:
    """Return what must not depend on when a run was interrupted, by name."""
    same = [*out.glob("images/*/*.png"), *out.glob("growth/*"), *out.glob("checkpoint/*/state.safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in same}


def read_losses(out: Path) -> list[str]:
    with (out / "history.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def list_worker_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "sfm.distill.worker_processes" in each.cmdline()]


def call_at_step(step: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    return lambda event: act() if event.done == step else None


@pytest.mark.slow
def test_a_two_process_run_matches_one_process_and_survives_interrupts_and_kills(
    config: DistillConfig, tmp_path: Path
) -> None:
    config = config.model_copy(update={"checkpoint_every": 3, "ipc": 2, "feature_decay": 0.5})
    alone = config.model_copy(update={"out": tmp_path / "alone"})
    distill(alone)
    undisturbed = tmp_path / "undisturbed"
    options = ["--devices", "2", "--checkpoint-every", "3", "--ipc", "2", "--steps", "12", "--device", "cpu"]
    options += ["--feature-decay", "0.5"]
    place = ["--store", config.store, "--backbone", "lite0", "--dataset", "patterns", "--out", undisturbed]
    subprocess.run(
        [sys.executable, "-m", "sfm", "distill", *options, *place], check=True, capture_output=True
    )
    names = [{str(path.relative_to(out)) for path in out.rglob("*")} for out in (alone.out, undisturbed)]
    assert names[0] == names[1]
    # Later steps differ: where a gradient is next to nothing, rounding decides on the sign of Adam's step.
    assert float(read_losses(undisturbed)[0]) == pytest.approx(float(read_losses(alone.out)[0]), rel=1e-6)
    record = json.loads((undisturbed / "run.json").read_bytes())
    assert (record["devices"], record["micro_batch"]) == (2, 4)

    config = config.model_copy(update={"devices": 2})
    with pytest.raises(DistillInterrupt):
        distill(config, call_at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
    resumed = config.model_copy(update={"resume": True})
    with pytest.raises(InputError, match=r"process 1 of 2 was killed by SIGKILL.*--resume"):
        distill(resumed, call_at_step(8, lambda: list_worker_processes()[1].kill()))
    assert not list_worker_processes()
    seen: list[Progress] = []
    distill(resumed, seen.append)
    assert (seen[-1].done, seen[-1].total) == (12, 12)
    assert not list_worker_processes()
    assert read_reproducible_files(config.out) == read_reproducible_files(undisturbed)
    assert read_losses(config.out) == read_losses(undisturbed)

    with pytest.raises(InputError, match="devices was 2 and is 1 now"):
        distill(resumed.model_copy(update={"devices": 1}))


def test_more_processes_than_classes_are_refused(config: DistillConfig) -> None:
    with pytest.raises(
        InputError, match=r"4 classes cannot be shared among 5 processes: use fewer --devices"
    ):
        distill_in_group(ProcessGroup(0, 5), config, no_progress)

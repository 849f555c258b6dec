"""Targets that an objective computes: written once, read when the run is resumed."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from sfm.distill import objective
from sfm.distill.backbone_entries import open_entries_and_backbones
from sfm.distill.config import DistillConfig
from sfm.distill.distiller import Distiller
from sfm.distill.objective import ClassCentres
from sfm.distill.run import distill
from sfm.distill.run_estimate import UnstartedProcessGroup, estimate_distillation
from sfm.errors import DamageError, InputError
from sfm.events import Progress
from sfm.stats_store.store import Entry


class PulledPlugError(Exception):
    pass


def pull_the_plug(event: Progress) -> None:
    if event.stage == "distil" and event.done == 5:
        raise PulledPlugError


def spread_means(entry: Entry, centres: ClassCentres) -> ClassCentres:
    """Move class means away from their mean."""
    middle = centres.class_means.mean(0)
    return ClassCentres(2 * centres.class_means - middle, 2 * centres.own_centres - middle)


@pytest.fixture
def computing(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    """A run whose objective computes its targets."""
    set_targets(monkeypatch, spread_means)
    return config.model_copy(update={"steps": 8, "checkpoint_every": 3})


def set_targets(monkeypatch: pytest.MonkeyPatch, compute_targets: object) -> None:
    kind = replace(objective.OBJECTIVES["sfm-decoupled"], compute_targets=compute_targets)
    monkeypatch.setitem(objective.OBJECTIVES, "sfm", kind)


def refuse_to_compute(*_: object) -> ClassCentres:
    raise AssertionError("the targets are in the run directory")


def test_the_targets_of_a_resumed_run_are_those_that_it_wrote(
    computing: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = computing.model_copy(update={"out": computing.out.with_name("undisturbed")})
    expected = distill(undisturbed).record
    with pytest.raises(PulledPlugError):
        distill(computing, pull_the_plug)
    set_targets(monkeypatch, refuse_to_compute)
    record = distill(computing.model_copy(update={"resume": True})).record
    assert record["images"] == expected["images"]
    assert record["resolved"]["targets"] == expected["resolved"]["targets"]
    files = [each / "targets.safetensors" for each in (computing.out, undisturbed.out)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_computing_targets_is_shown_and_counted(
    computing: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread_means_in_1000_seconds(entry: Entry, centres: ClassCentres) -> ClassCentres:
        computed.append(True)
        return spread_means(entry, centres)

    computed: list[bool] = []
    events: list[tuple[str, int, int, bool]] = []
    set_targets(monkeypatch, spread_means_in_1000_seconds)
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000 * len(computed))
    monkeypatch.setattr("sfm.distill.run.time", clock)
    record = distill(
        computing.model_copy(update={"steps": 1}),
        lambda event: events.append((event.stage, event.done, event.total, bool(computed))),
    ).record
    assert events[:2] == [("targets", 0, 1, False), ("targets", 1, 1, True)]
    assert record["wall_seconds"] > 1000


class SecondOfTwo(UnstartedProcessGroup):
    """The second of two processes, which gets what tests put in `received` from the first."""

    received: ClassVar[object] = None

    def broadcast_object(self, value: object) -> object:
        return self.received if value is None else value


def test_one_process_computes_targets_and_the_others_get_them_or_the_error(
    computing: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_entries_and_backbones(computing)
    first = Distiller(computing, *opened, UnstartedProcessGroup(0, 2))
    set_targets(monkeypatch, refuse_to_compute)
    monkeypatch.setattr(SecondOfTwo, "received", first.computed_targets)
    second = Distiller(computing, *opened, SecondOfTwo(1, 2))
    assert second.config.targets == first.config.targets
    monkeypatch.setattr(SecondOfTwo, "received", InputError("no scatter"))
    with pytest.raises(InputError, match=r"^no scatter$"):
        Distiller(computing, *opened, SecondOfTwo(1, 2))


def test_an_error_in_computing_targets_is_sent_to_all_processes() -> None:
    class FirstOfTwo(UnstartedProcessGroup):
        def broadcast_object(self, value: object) -> object:
            sent.append(value)
            return value

    def fail() -> None:
        raise error

    sent: list[object] = []
    error = InputError("no scatter")
    with pytest.raises(InputError, match=r"^no scatter$"):
        FirstOfTwo(0, 2).call_on_rank0(fail)
    assert sent == [error]


def test_a_dry_run_of_a_run_to_resume_takes_the_targets_that_it_wrote(
    computing: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PulledPlugError):
        distill(computing, pull_the_plug)
    set_targets(monkeypatch, refuse_to_compute)
    plan = estimate_distillation(computing.model_copy(update={"resume": True, "dry_run": True}))
    assert plan.steps == computing.steps


def test_targets_that_are_lost_are_computed_again_and_changed_ones_are_damage(
    computing: DistillConfig,
) -> None:
    with pytest.raises(PulledPlugError):
        distill(computing, pull_the_plug)
    file, resumed = computing.out / "targets.safetensors", computing.model_copy(update={"resume": True})
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match=r"targets\.safetensors is not as the run wrote it: restore it, or"):
        distill(resumed)
    file.write_bytes(data[:100])
    with pytest.raises(DamageError, match=r"targets\.safetensors.*: restore it, or start the run again in"):
        distill(resumed)
    file.unlink()
    assert distill(resumed).record["resolved"]["targets"]
    assert file.exists()


def test_an_objective_that_matches_the_entry_itself_writes_no_targets(config: DistillConfig) -> None:
    record = distill(config.model_copy(update={"steps": 1})).record
    assert record["resolved"]["targets"] is None
    assert not (config.out / "targets.safetensors").exists()

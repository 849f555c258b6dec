"""Checkpoints that anybody wrote: none is resumed whose values no run leaves; none takes memory first."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.signing import sign_checkpoint
from safetensors.torch import load_file, save_file

from sfm.backbones.build import Backbone
from sfm.distill.config import DistillConfig
from sfm.distill.run import distill
from sfm.errors import DamageError, InputError

Damage = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def finished_config(store: str, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A finished run of four steps; its one checkpoint is of the last."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = DistillConfig(store=store, backbone="lite0", dataset="patterns", out=out, steps=4, device="cpu")
    distill(config)
    return config.model_copy(update={"resume": True})


@pytest.fixture
def run_copy_config(
    finished_config: DistillConfig, lite0: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DistillConfig:
    """A copy of it that a test may change; its backbone is loaded once for all tests."""
    monkeypatch.setattr("sfm.distill.backbone_entries.load_backbone", lambda *_, **__: lite0)
    return finished_config.model_copy(
        update={"out": Path(shutil.copytree(finished_config.out, tmp_path / "run"))}
    )


def edit_and_sign(change: Callable[[Tensors, dict], object]) -> Damage:
    """Change tensors and card of a checkpoint, and sign it again as its writer would."""

    def damage(out: Path) -> None:
        (folder,) = (out / "checkpoint").iterdir()
        tensors = load_file(folder / "state.safetensors")
        card = json.loads((folder / "checkpoint.json").read_text())
        change(tensors, card)
        save_file(tensors, folder / "state.safetensors")
        (folder / "checkpoint.json").write_text(json.dumps(card))
        sign_checkpoint(folder)
        (out / "run.json").unlink()

    return damage


def card(**values: object) -> Damage:
    return edit_and_sign(lambda tensors, card: card.update(values))


def recipe(**values: object) -> Damage:
    return edit_and_sign(lambda tensors, card: card["recipe"].update(values))


def set_first_value(name: str, value: float) -> Damage:
    return edit_and_sign(lambda tensors, card: tensors[name].view(-1)[:1].fill_(value))


def replace_tensors(**tensors: torch.Tensor) -> Damage:
    return edit_and_sign(
        lambda found, card: found.update({name.replace("_", "/"): own for name, own in tensors.items()})
    )


def find_state_file(out: Path) -> Path:
    return next((out / "checkpoint").glob("*/state.safetensors"))


def replace_state_by_pipe(out: Path) -> None:
    (out / "run.json").unlink()
    state = find_state_file(out)
    state.unlink()
    os.mkfifo(state)


def extend_state_file(out: Path) -> None:
    (out / "run.json").unlink()
    os.truncate(find_state_file(out), 2**40)


def write_nested_json(out: Path) -> None:
    (out / "run.json").unlink()
    find_state_file(out).with_name("checkpoint.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (set_first_value("0/level", torch.nan), "values in 0/level that no run can have"),
        (set_first_value("0/level", torch.inf), "values in 0/level that no run can have"),
        (set_first_value("1/adam/first", torch.nan), "values in 1/adam/first"),
        (set_first_value("1/adam/second", -1.0), "values in 1/adam/second"),
        (set_first_value("age", 77), "an optimizer step count that no run has"),
        (replace_tensors(**{"0_level": torch.zeros(3, 3, 1, 1)}), r"holds F32 of shape \[3, 3, 1, 1\]"),
        (replace_tensors(**{"0_level": torch.zeros(4, 3, 1, 1).double()}), "holds F64"),
        (replace_tensors(seen=torch.zeros(4, 1280)), r'as "seen", not nothing'),
        (edit_and_sign(lambda tensors, card: tensors.pop("1/level")), 'holds nothing as "1/level"'),
        (card(step=1), r"not nothing|no run has"),
        (card(step=10**8), "is of step 100000000 of 4"),
        (card(step=-7), "no checkpoint in .* is intact"),
        (card(step=10**30), "no checkpoint in .* is intact"),
        (card(loss=float("nan")), "no checkpoint in .* is intact"),
        (card(seconds=float("inf")), "no checkpoint in .* is intact"),
        (card(recipe={}), "no checkpoint in .* is intact"),
        (recipe(threads=10**9), "no checkpoint in .* is intact"),
        (recipe(threads="\x1b[2J"), "no checkpoint in .* is intact"),
        (recipe(threads_before=["\x1b[2J"]), "no checkpoint in .* is intact"),
        (recipe(micro_batch="x"), "no checkpoint in .* is intact"),
        (recipe(ipc=10**12), "no checkpoint in .* is intact"),
        (recipe(image_size=10**9), "no checkpoint in .* is intact"),
        (recipe(weight=1e308), "no checkpoint in .* is intact"),
        (recipe(weight=1e-320), "no checkpoint in .* is intact"),
        (recipe(classes=[1] * 10**5), "no checkpoint in .* is intact"),
        (replace_state_by_pipe, "no checkpoint in .* is intact"),
        (extend_state_file, "no checkpoint in .* is intact"),
        (write_nested_json, "no checkpoint in .* is intact"),
    ],
)
def test_an_invalid_checkpoint_raises_a_one_line_damage_error(
    run_copy_config: DistillConfig, damage: Damage, told: str
) -> None:
    damage(run_copy_config.out)
    with pytest.raises(DamageError, match=told) as caught:
        distill(run_copy_config)
    assert "\n" not in str(caught.value)
    assert not (run_copy_config.out / "run.json").exists()


def test_a_config_mismatch_with_long_names_raises_a_short_error(run_copy_config: DistillConfig) -> None:
    recipe(classes=["x" * 900] * 4)(run_copy_config.out)
    with pytest.raises(InputError, match=r"classes was .* now") as caught:
        distill(run_copy_config)
    assert len(str(caught.value)) < 600


def test_a_checkpoint_with_invalid_values_falls_back_to_the_previous_one(
    run_copy_config: DistillConfig,
) -> None:
    (folder,) = (run_copy_config.out / "checkpoint").iterdir()
    newer = Path(shutil.copytree(folder, folder.with_name("step_00000009")))
    found = json.loads((newer / "checkpoint.json").read_text())
    (newer / "checkpoint.json").write_text(json.dumps(found | {"loss": float("nan")}))
    before = json.loads((run_copy_config.out / "run.json").read_text())["images"]
    (run_copy_config.out / "run.json").unlink()
    assert distill(run_copy_config).record["images"] == before


@pytest.mark.parametrize(
    "record",
    [
        '{"command": "distill"}',
        "[1]",
        "[" * 100_000,
        '{"ipc": 1, "dataset": "x", "loss": NaN, "wall_seconds": 1, "peak_memory_bytes": 1}',
        " " * 2**24 + "{}",
    ],
)
def test_a_finished_run_with_an_invalid_record_is_refused(
    run_copy_config: DistillConfig, record: str
) -> None:
    (run_copy_config.out / "run.json").write_text(record)
    with pytest.raises(InputError, match=r"run\.json is not what `sfm distill` writes") as caught:
        distill(run_copy_config)
    assert "\n" not in str(caught.value)


def replace_history_by_pipe(out: Path) -> None:
    (out / "history.csv").unlink()
    os.mkfifo(out / "history.csv")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (replace_history_by_pipe, "history.csv: it is not a regular file"),
        (lambda out: (out / "history.csv").write_bytes(b"\xff\xfe\n"), "history.csv: it is not text"),
        (lambda out: os.truncate(out / "history.csv", 2**40), "history.csv: it is not text, or too long"),
    ],
)
def test_an_invalid_history_file_is_refused(
    run_copy_config: DistillConfig, damage: Damage, told: str
) -> None:
    (run_copy_config.out / "run.json").unlink()
    damage(run_copy_config.out)
    with pytest.raises(InputError, match=told):
        distill(run_copy_config)

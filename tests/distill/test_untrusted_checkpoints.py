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
def finished(store: str, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A finished run of four steps; its one checkpoint is of the last."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = DistillConfig(store=store, backbone="lite0", dataset="patterns", out=out, steps=4, device="cpu")
    distill(config)
    return config.model_copy(update={"resume": True})


@pytest.fixture
def again(
    finished: DistillConfig, lite0: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DistillConfig:
    """A copy of it that a test may change; its backbone is loaded once for all tests."""
    monkeypatch.setattr("sfm.distill.backbone_entries.load_backbone", lambda *_, **__: lite0)
    return finished.model_copy(update={"out": Path(shutil.copytree(finished.out, tmp_path / "run"))})


def signed(change: Callable[[Tensors, dict], object]) -> Damage:
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
    return signed(lambda tensors, card: card.update(values))


def recipe(**values: object) -> Damage:
    return signed(lambda tensors, card: card["recipe"].update(values))


def filled(name: str, value: float) -> Damage:
    return signed(lambda tensors, card: tensors[name].view(-1)[:1].fill_(value))


def replaced(**tensors: torch.Tensor) -> Damage:
    return signed(
        lambda found, card: found.update({name.replace("_", "/"): own for name, own in tensors.items()})
    )


def state_of(out: Path) -> Path:
    return next((out / "checkpoint").glob("*/state.safetensors"))


def piped(out: Path) -> None:
    (out / "run.json").unlink()
    state = state_of(out)
    state.unlink()
    os.mkfifo(state)


def lengthened(out: Path) -> None:
    (out / "run.json").unlink()
    os.truncate(state_of(out), 2**40)


def nested(out: Path) -> None:
    (out / "run.json").unlink()
    state_of(out).with_name("checkpoint.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (filled("0/level", torch.nan), "values in 0/level that no run can have"),
        (filled("0/level", torch.inf), "values in 0/level that no run can have"),
        (filled("1/adam/first", torch.nan), "values in 1/adam/first"),
        (filled("1/adam/second", -1.0), "values in 1/adam/second"),
        (filled("age", 77), "an optimizer step count that no run has"),
        (replaced(**{"0_level": torch.zeros(3, 3, 1, 1)}), r"holds F32 of shape \[3, 3, 1, 1\]"),
        (replaced(**{"0_level": torch.zeros(4, 3, 1, 1).double()}), "holds F64"),
        (replaced(seen=torch.zeros(4, 1280)), r'as "seen", not nothing'),
        (signed(lambda tensors, card: tensors.pop("1/level")), 'holds nothing as "1/level"'),
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
        (recipe(classes=[1] * 10**5), "no checkpoint in .* is intact"),
        (piped, "no checkpoint in .* is intact"),
        (lengthened, "no checkpoint in .* is intact"),
        (nested, "no checkpoint in .* is intact"),
    ],
)
def test_a_checkpoint_that_no_run_leaves_is_damage_in_one_line(
    again: DistillConfig, damage: Damage, told: str
) -> None:
    damage(again.out)
    with pytest.raises(DamageError, match=told) as caught:
        distill(again)
    assert "\n" not in str(caught.value)
    assert not (again.out / "run.json").exists()


def test_a_recipe_of_long_names_is_refused_in_a_short_line(again: DistillConfig) -> None:
    recipe(classes=["x" * 900] * 4)(again.out)
    with pytest.raises(InputError, match=r"classes was .* now") as caught:
        distill(again)
    assert len(str(caught.value)) < 600


def test_a_wild_checkpoint_is_passed_over_for_the_one_before_it(again: DistillConfig) -> None:
    (folder,) = (again.out / "checkpoint").iterdir()
    newer = Path(shutil.copytree(folder, folder.with_name("step_00000009")))
    found = json.loads((newer / "checkpoint.json").read_text())
    (newer / "checkpoint.json").write_text(json.dumps(found | {"loss": float("nan")}))
    before = json.loads((again.out / "run.json").read_text())["images"]
    (again.out / "run.json").unlink()
    assert distill(again).record["images"] == before


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
def test_a_finished_run_whose_record_is_not_one_is_not_given_back(again: DistillConfig, record: str) -> None:
    (again.out / "run.json").write_text(record)
    with pytest.raises(InputError, match=r"run\.json is not what `sfm distill` writes") as caught:
        distill(again)
    assert "\n" not in str(caught.value)


def history_pipe(out: Path) -> None:
    (out / "history.csv").unlink()
    os.mkfifo(out / "history.csv")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (history_pipe, "history.csv: it is not a regular file"),
        (lambda out: (out / "history.csv").write_bytes(b"\xff\xfe\n"), "history.csv: it is not text"),
        (lambda out: os.truncate(out / "history.csv", 2**40), "history.csv: it is not text, or too long"),
    ],
)
def test_a_history_that_is_none_is_refused_in_one_line(
    again: DistillConfig, damage: Damage, told: str
) -> None:
    (again.out / "run.json").unlink()
    damage(again.out)
    with pytest.raises(InputError, match=told):
        distill(again)

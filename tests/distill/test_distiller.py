"""A Distiller as a notebook uses it, through the public names of sfm.api."""

import copy
import csv
import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sfm.api import DistillConfig, Distiller, Entry, ResolvedDistillConfig, distill, open_store
from sfm.backbones.build import Backbone, load_backbone
from sfm.command_builder import make_config_from_file_and_options
from sfm.errors import InputError

RUN_OF_VERSION_0_1_0 = Path(__file__).parent / "run-0.1.0"
"""A run of four classes, stopped after a checkpoint; its history and run.json are of the whole run."""

SPLIT = {"micro_batch": 3, "gradient": "one-pass", "final_rate": 0.1}


MakeDistiller = Callable[..., Distiller]


@pytest.fixture
def make_distiller(config: DistillConfig, lite0: Backbone) -> MakeDistiller:
    """Make distillers of a config with changes; the backbone is loaded once for all."""

    def make(**changes: object) -> Distiller:
        return Distiller(config.model_copy(update=changes), open_entry(config), lite0)

    return make


def open_entry(config: DistillConfig) -> Entry:
    store = open_store(config.store)
    (summary,) = store.list_summaries()
    return store.open_entry(summary)


def test_iterating_a_distiller_yields_one_output_per_step(
    config: DistillConfig, make_distiller: MakeDistiller
) -> None:
    distiller = make_distiller()
    outputs = list(distiller)
    assert [output.step for output in outputs] == list(range(1, 13))
    assert [output.resolution for output in outputs] == [1, 2, 4, 8, 16, 32] + [37] * 6
    assert [output.learning_rate for output in outputs[:6]] == [0.02] * 6
    assert outputs[-1].learning_rate == pytest.approx(0.05 * 0.02)
    assert all(0 < output.loss < 2 for output in outputs)
    assert list(distiller) == []
    assert not config.out.exists()


def test_distiller_from_config_gives_the_images_of_the_distill_command(config: DistillConfig) -> None:
    distiller = Distiller.from_config(config.model_copy(update={"ipc": 2, "views": 2}))
    assert len(distiller.run()) == 12
    images = distiller.decode_images()
    assert images.shape == (4, 2, 37, 37, 3)
    distill(config.model_copy(update={"ipc": 2, "views": 2}))
    files = sorted(config.out.glob("images/*/*.png"))
    written = np.stack([np.asarray(Image.open(file)) for file in files])
    assert np.array_equal(images.reshape(written.shape), written)


KNOBS: list[dict[str, object]] = [
    {"parametrization": "pixels", "crop_edge": "zero"},
    {"start": "zeros", "first_resolution": 8, "color_decorrelation": False},
    {"augmentation": False, "canvas_pixels": 20, "ipc": 3, "centres": "class-average"},
]


@pytest.mark.parametrize("changes", [{}, SPLIT, {"micro_batch": 2, "graphs": 0, "views": 2}, *KNOBS])
def test_a_loaded_state_dict_resumes_bit_for_bit(
    make_distiller: MakeDistiller, tmp_path: Path, changes: dict[str, object]
) -> None:
    uninterrupted = make_distiller(**changes)
    save_file(uninterrupted.state_dict(), tmp_path / "0")
    outputs = []
    for output in uninterrupted:
        outputs.append(output)
        if output.step in (4, 9):
            save_file(uninterrupted.state_dict(), tmp_path / str(output.step))
    resumed = make_distiller(**changes)
    for step in (9, 4, 0):
        resumed.load_state_dict(load_file(tmp_path / str(step)))
        assert resumed.run() == outputs[step:]
        for one, other in zip(resumed.gather_levels(), uninterrupted.gather_levels(), strict=True):
            assert torch.equal(one, other)


def decode_after_one_step(distiller: Distiller) -> np.ndarray:
    distiller.step()
    return distiller.decode_images()


def test_each_knob_of_the_published_code_changes_the_images(make_distiller: MakeDistiller) -> None:
    plain = decode_after_one_step(make_distiller())
    assert np.array_equal(plain, decode_after_one_step(make_distiller()))
    knobs = {
        "parametrization": "pixels",
        "color_decorrelation": False,
        "start": "zeros",
        "first_resolution": 8,
    }
    for name, value in knobs.items():
        images = decode_after_one_step(make_distiller(**{name: value}))
        assert images.shape == plain.shape
        assert not np.array_equal(images, plain), name
    # Before the second level is there, images have one colour, and so have all views of them.
    first = [
        decode_after_one_step(make_distiller(first_resolution=8, **changes))
        for changes in ({}, {"augmentation": False}, {"noisy_views": 1.0})
    ]
    assert not any(np.array_equal(one, other) for one, other in combinations(first, 2))
    small = make_distiller(canvas_pixels=20)
    assert decode_after_one_step(small).shape == (4, 1, 20, 20, 3)
    assert [output.resolution for output in small] == [2, 4, 8, 16, *[20] * 7]
    assert [output.resolution for output in make_distiller(parametrization="pixels")] == [37] * 12


def test_crops_with_a_zero_edge_change_the_loss_of_a_step(make_distiller: MakeDistiller) -> None:
    losses = [make_distiller(crop_edge=edge, views=3).step().loss for edge in ("clip", "zero")]
    assert losses[0] != losses[1]


def test_a_first_resolution_above_the_canvas_is_refused(make_distiller: MakeDistiller) -> None:
    with pytest.raises(InputError, match="--first-resolution 38 is larger than the images: give at most 37"):
        make_distiller(first_resolution=38)
    assert len(make_distiller(first_resolution=38, canvas_pixels=38).state.levels) == 7


def test_images_of_one_class_are_matched_as_centres_says(
    make_distiller: MakeDistiller, features: np.ndarray
) -> None:
    """Each against a few lines of numpy, on random features."""
    seen = np.random.default_rng(0).normal(size=(4, 2, 3, features.shape[-1]))
    means, own = features.mean(1), features.reshape(4, 2, 4, -1).mean(2)
    own[-1, 1] = means[-1]  # It has no sample.
    images, classes = seen.mean(2), seen.mean((1, 2))

    def subtract_from_others(centres: np.ndarray, class_means: np.ndarray, divisor: int = 3) -> np.ndarray:
        others = np.stack([np.delete(class_means, c, axis=0).sum(0) / divisor for c in range(4)])
        return (others.reshape(4, *(1,) * (centres.ndim - 2), -1) - centres).ravel()

    expected = {
        "sub-class": (subtract_from_others(images, classes), subtract_from_others(own, means)),
        "class-mean": (
            subtract_from_others(images, classes),
            subtract_from_others(means[:, None].repeat(2, axis=1), means),
        ),
        # Two images each of four classes, less one.
        "class-average": (subtract_from_others(classes, classes, 7), subtract_from_others(means, means)),
    }
    for centres, (synthetic, real) in expected.items():
        distiller = make_distiller(ipc=2, centres=centres)
        loss = distiller.objectives[0](torch.from_numpy(seen).float()).item()
        cosine = synthetic @ real / np.linalg.norm(synthetic) / np.linalg.norm(real)
        assert loss == pytest.approx(1 - cosine, abs=1e-5), centres


def test_load_state_dict_copies_its_tensors(make_distiller: MakeDistiller) -> None:
    distiller = make_distiller()
    distiller.step()
    saved = copy.deepcopy(distiller.state_dict())
    expected = copy.deepcopy(saved)
    distiller.load_state_dict(saved)
    distiller.step()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": torch.tensor(13)}, "is of step 13 of 12"),
        ({"step": torch.tensor(7)}, "not of this config after 7 steps: check 2/adam/first"),
        ({"0/level": torch.zeros(3, 3, 1, 1)}, r"0/level has shape \(3, 3, 1, 1\), not \(4, 3, 1, 1\)"),
        ({"0/level": torch.full((4, 3, 1, 1), torch.nan)}, "values in 0/level that no run can have"),
    ],
)
def test_a_state_dict_of_another_run_is_refused(
    make_distiller: MakeDistiller, changes: dict[str, torch.Tensor], message: str
) -> None:
    distiller = make_distiller()
    distiller.step()
    distiller.step()
    with pytest.raises(InputError, match=message):
        distiller.load_state_dict(distiller.state_dict() | changes)


class WeightGradientRecorder(TorchDispatchMode):
    """Record of every backward convolution whether it computes the gradient of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[bool] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if operator is torch.ops.aten.convolution_backward.default:
            self.computed.append(arguments[-1][1])
        return operator(*arguments, **(options or {}))


def test_a_step_neither_changes_the_weights_nor_computes_their_gradients(
    make_distiller: MakeDistiller, lite0: Backbone
) -> None:
    before = copy.deepcopy(lite0.model.state_dict())
    distiller = make_distiller(execution="eager")
    with WeightGradientRecorder() as recorder:
        distiller.step()
    assert len(recorder.computed) > 40
    assert not any(recorder.computed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lite0.model.state_dict().items())


def test_a_step_after_the_last_raises_an_error(make_distiller: MakeDistiller) -> None:
    distiller = make_distiller(steps=1)
    distiller.step()
    with pytest.raises(InputError, match="all 1 steps are done"):
        distiller.step()


def test_a_backbone_that_does_not_match_the_statistics_is_refused(config: DistillConfig) -> None:
    other = load_backbone("lite0", image_size=48, device="cpu")
    with pytest.raises(InputError, match="another backbone than this lite0: load lite0 at 32 px"):
        Distiller(config, open_entry(config), other)


def test_a_step_restores_the_thread_count_of_its_caller(make_distiller: MakeDistiller) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        distiller = make_distiller(threads=1)
        distiller.step()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_resolved_config_is_complete_in_run_record_and_checkpoint(config: DistillConfig) -> None:
    record = distill(config.model_copy(update={"classes": ("class3", "class0", "class1")})).record
    resolved = ResolvedDistillConfig.model_validate(record["resolved"])
    assert resolved.classes == ["class0", "class1", "class3"]
    assert (resolved.image_size, resolved.micro_batch, resolved.grow_every) == (32, 3, 1)
    assert (resolved.dataset, resolved.backbone) == (record["entry_digest"], record["backbone"]["hash"])
    assert resolved.threads == torch.get_num_threads()
    assert (resolved.device, resolved.execution.mode, resolved.repeatable) == ("cpu", "input-grad", True)
    (checkpoint,) = config.out.glob("checkpoint/*/checkpoint.json")
    assert json.loads(checkpoint.read_text())["recipe"] == record["resolved"]


@pytest.mark.parametrize(
    ("flags", "execution"),
    [
        ({"compiled": False, "captured": False}, "input-grad"),
        ({"compiled": False, "captured": True}, "cuda-graph"),
        ({"compiled": True, "captured": True}, "compiled"),
    ],
)
def test_execution_flags_of_version_0_1_0_are_converted(flags: dict[str, bool], execution: str) -> None:
    (checkpoint,) = RUN_OF_VERSION_0_1_0.glob("checkpoint/*/checkpoint.json")
    recipe = json.loads(checkpoint.read_text())["recipe"] | flags
    assert ResolvedDistillConfig.model_validate(recipe).execution.mode == execution


@pytest.fixture
def old_run(config: DistillConfig) -> DistillConfig:
    """A copy of a run of version 0.1.0 that is of this store, with the config to resume it."""
    shutil.copytree(RUN_OF_VERSION_0_1_0, config.out)
    (path,) = config.out.glob("checkpoint/*/checkpoint.json")
    card = json.loads(path.read_text())
    # The digest of an entry depends on the machine that computed its features.
    card["recipe"]["dataset"] = open_entry(config).summary.entry_digest
    path.write_text(json.dumps(card))
    return config.model_copy(update={"resume": True, "threads": 1, **SPLIT})


def read_losses(out: Path) -> list[float]:
    with (out / "history.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_centres_none_of_older_runs_is_class_mean(old_run: DistillConfig) -> None:
    (path,) = old_run.out.glob("checkpoint/*/checkpoint.json")
    recipe = json.loads(path.read_text())["recipe"] | {"centres": "none"}
    assert ResolvedDistillConfig.model_validate(recipe).centres == "class-mean"
    record = json.loads((old_run.out / "run.json").read_text())
    assert DistillConfig.model_validate(record["config"] | {"centres": "none"}).centres == "class-mean"


def test_the_canvas_of_older_runs_is_that_of_their_largest_input(old_run: DistillConfig) -> None:
    (path,) = old_run.out.glob("checkpoint/*/checkpoint.json")
    recipe = json.loads(path.read_text())["recipe"]
    assert "canvas_pixels" not in recipe
    assert ResolvedDistillConfig.model_validate(recipe).canvas_pixels == 37
    further = {"dataset": "", "backbone": "", "image_size": 64, "weight": 1.0}
    larger = ResolvedDistillConfig.model_validate(recipe | {"further_backbones": [further]})
    assert larger.canvas_pixels == 73
    for wrong in ({"further_backbones": ["none"]}, {"image_size": "32 px"}, {"canvas_pixels": 0}):
        with pytest.raises(ValueError, match="validation error"):
            ResolvedDistillConfig.model_validate(recipe | wrong)


def test_a_checkpoint_of_version_0_1_0_is_resumed(old_run: DistillConfig) -> None:
    (old_run.out / "run.json").unlink()
    expected = read_losses(old_run.out)
    distill(old_run)
    losses = read_losses(old_run.out)
    assert losses[:4] == expected[:4]
    # Elsewhere than where it was written, last bits differ.
    assert losses[4:6] == pytest.approx(expected[4:6], rel=1e-3)
    assert len(losses) == 12


def test_a_config_file_of_version_0_1_0_keeps_the_defaults_of_that_version(old_run: DistillConfig) -> None:
    options = {"store": old_run.store, "out": old_run.out, "noisy_views": 0.25}
    file = RUN_OF_VERSION_0_1_0 / "run.json"
    config = make_config_from_file_and_options(DistillConfig, "distill", file, options)
    assert isinstance(config, DistillConfig)
    assert (config.feature_decay, config.final_rate, config.noisy_views) == (0.0, 0.1, 0.25)


def test_a_finished_run_of_version_0_1_0_is_returned_and_its_config_is_reproducible(
    old_run: DistillConfig, tmp_path: Path
) -> None:
    record = json.loads((RUN_OF_VERSION_0_1_0 / "run.json").read_text())
    assert distill(old_run).record == record
    again = DistillConfig.model_validate(
        DistillConfig.VALUES_OF_VERSION_0_1_0
        | record["config"]
        | {"store": old_run.store, "out": tmp_path / "again"}
    )
    repeated = distill(again).record["resolved"]
    (path,) = old_run.out.glob("checkpoint/*/checkpoint.json")
    recipe = json.loads(path.read_text())["recipe"]
    expected = ResolvedDistillConfig.model_validate(recipe).model_dump(mode="json")
    assert {**repeated, "execution": expected["execution"]} == expected

"""One set of images for several backbones: lite0 and lite1, of which lite1 has the larger input in places."""

import copy
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from resolved_run import make_resolved_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfm.backbones.build import Backbone, load_backbone
from sfm.config_fields import MAX_DISTILLATION_BACKBONES
from sfm.distill.adam import init_adam
from sfm.distill.augment import draw_augmentation
from sfm.distill.backbone_entries import open_entries_and_backbones
from sfm.distill.config import DistillConfig
from sfm.distill.distiller import Distiller
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.pyramid import append_noise_level_and_rescale, list_level_resolutions
from sfm.distill.resolved_config import MatchedBackbone, ResolvedDistillConfig
from sfm.distill.run import distill
from sfm.distill.train_step import (
    DistillState,
    ImageBatch,
    LossTerm,
    NonFiniteLossError,
    Objective,
    compute_features,
    compute_joint_gradients,
)
from sfm.errors import InputError
from sfm.events import Progress
from sfm.stats_store.store import Entry

CLASSES, VIEWS = 4, 2
LARGER = MatchedBackbone(dataset="", backbone="", image_size=40, weight=0.5)
CONFIG = make_resolved_config(
    classes=CLASSES, views=VIEWS, micro_batch=3, weight=1.5, further_backbones=[LARGER]
)


@pytest.fixture(scope="session")
def lite1() -> Backbone:
    return load_backbone("lite1", image_size=40, device="cpu")


def make_objective(seed: int, dtype: torch.dtype) -> Objective:
    means = torch.rand(CLASSES, 1280, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    target = compute_flow(means[:, None], means)
    return lambda features: sfm_loss(features, target)


@pytest.fixture(scope="module")
def double_terms(lite0: Backbone, lite1: Backbone) -> list[LossTerm]:
    doubles = [replace(each, model=copy.deepcopy(each.model).double()) for each in (lite0, lite1)]
    return make_terms(*doubles, torch.float64)


def make_terms(first: Backbone, second: Backbone, dtype: torch.dtype = torch.float32) -> list[LossTerm]:
    return [
        LossTerm(first, make_objective(0, dtype), CONFIG.weight),
        LossTerm(second, make_objective(1, dtype), LARGER.weight),
    ]


def make_batch(dtype: torch.dtype) -> ImageBatch:
    levels: list[Tensor] = []
    for resolution in list_level_resolutions(CONFIG.canvas_pixels):
        levels = append_noise_level_and_rescale(levels, resolution, CLASSES, 3, torch.device("cpu"))
    levels = [level.detach().to(dtype).requires_grad_() for level in levels]
    augmentation = draw_augmentation(3, 7, CLASSES * VIEWS, CONFIG.canvas_pixels)
    return ImageBatch(levels, CONFIG.canvas_pixels, 32, augmentation, (CLASSES, 1, VIEWS))


def test_the_canvas_has_room_for_the_crops_of_the_largest_input() -> None:
    assert CONFIG.canvas_pixels == round(8 / 7 * 40)


@pytest.mark.parametrize("graphs", [0, 4])
def test_the_gradient_is_that_of_the_weighted_mean_of_the_losses(
    double_terms: list[LossTerm], graphs: int
) -> None:
    batch, terms = make_batch(torch.float64), double_terms
    found = [torch.full_like(level, torch.nan) for level in batch.levels]

    def collect(images: slice, gradients: list[Tensor]) -> None:
        for level, gradient in zip(found, gradients, strict=True):
            assert level[images].isnan().all(), "called twice for one image"
            level[images] = gradient

    config = CONFIG.model_copy(update={"graphs": graphs})
    state = DistillState(0, list(batch.levels), init_adam(batch.levels))
    loss, _ = compute_joint_gradients(batch, config, terms, state, collect)

    losses = [
        term.objective(
            compute_features(
                replace(batch, view_pixels=size), term.backbone, batch.levels, slice(0, CLASSES)
            ).view(CLASSES, 1, VIEWS, -1)
        )
        for term, size in zip(terms, (32, 40), strict=True)
    ]
    expected = (1.5 * losses[0] + 0.5 * losses[1]) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(expected, batch.levels)
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-10 * gradients[0].abs().max()


class SavedTensor:
    """What a graph holds of a tensor for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_while_one_backbone_goes_forward_no_graph_of_another_is_in_memory(
    lite0: Backbone, lite1: Backbone
) -> None:
    batch, terms = make_batch(torch.float32), make_terms(lite0, lite1)
    alive: weakref.WeakSet[SavedTensor] = weakref.WeakSet()
    inside: list[bool] = []
    counts: dict[str, list[int]] = {"loss": [], "forward": []}

    def pack(tensor: Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        if inside:
            alive.add(saved)
        return saved

    def count_at_loss(features: Tensor) -> Tensor:
        counts["loss"].append(len(alive))
        return terms[0].objective(features)

    first, second = (term.backbone.model for term in terms)
    handles = [
        first.register_forward_pre_hook(lambda module, inputs: inside.append(True)),
        first.register_forward_hook(lambda module, inputs, output: inside.clear()),
        second.register_forward_pre_hook(lambda module, inputs: counts["forward"].append(len(alive))),
    ]
    state = DistillState(0, list(batch.levels), init_adam(batch.levels))
    config = CONFIG.model_copy(update={"graphs": 4})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        counted = [replace(terms[0], objective=count_at_loss), terms[1]]
        compute_joint_gradients(batch, config, counted, state, lambda images, gradients: None)
    for handle in handles:
        handle.remove()
    assert min(counts["loss"]) > 100
    assert counts["forward"] == [0, 0]


def test_nothing_is_updated_if_the_last_backbone_s_loss_is_not_finite(
    lite0: Backbone, lite1: Backbone
) -> None:
    batch, terms = make_batch(torch.float32), make_terms(lite0, lite1)
    broken = [terms[0], replace(terms[1], objective=lambda features: features.sum() * torch.nan)]
    given: list[slice] = []
    state = DistillState(0, list(batch.levels), init_adam(batch.levels))
    with pytest.raises(NonFiniteLossError):
        compute_joint_gradients(batch, CONFIG, broken, state, lambda images, _: given.append(images))
    assert not given
    assert not state.features


@pytest.fixture
def both(fashion_store: str, tmp_path: Path) -> DistillConfig:
    """A run of a few steps on lite0 and lite1."""
    return DistillConfig(
        store=fashion_store,
        backbone=["lite0", "lite1"],
        backbone_weight=[1, 0.25],
        dataset="fashion-mnist-6k",
        out=tmp_path / "run",
        steps=6,
        micro_batch=6,
        device="cpu",
    )


@pytest.mark.parametrize("gradient", ["exact", "one-pass"])
def test_a_saved_state_of_several_backbones_goes_on_to_the_same_bits(
    both: DistillConfig, tmp_path: Path, gradient: str
) -> None:
    config = both.model_copy(update={"gradient": gradient, "feature_decay": 0.5})
    opened = open_entries_and_backbones(config)
    uninterrupted = Distiller(config, *opened)
    for output in uninterrupted:
        if output.step == 5:
            save_file(uninterrupted.state_dict(), tmp_path / "state")
    saved = load_file(tmp_path / "state")
    kept = ["feature_average", "seen"] if gradient == "one-pass" else ["feature_average"]
    of_backbones = {name for name in saved if "/" not in name} - {"step", "age"}
    assert of_backbones == {name + index for name in kept for index in ("", "_1")}
    resumed = Distiller(config, *opened)
    resumed.load_state_dict(saved)
    resumed.run()
    for one, other in zip(resumed.gather_levels(), uninterrupted.gather_levels(), strict=True):
        assert torch.equal(one, other)


class PulledPlugError(Exception):
    pass


def pull_the_plug(event: Progress) -> None:
    if event.stage == "distil" and event.done == 5:
        raise PulledPlugError


def test_a_run_names_its_backbones_and_is_resumed_exactly(both: DistillConfig, tmp_path: Path) -> None:
    both = both.model_copy(update={"checkpoint_every": 3})
    undisturbed = distill(both.model_copy(update={"out": tmp_path / "undisturbed"})).record
    with pytest.raises(PulledPlugError):
        distill(both, pull_the_plug)
    with pytest.raises(InputError, match=r"further_backbones was weight 0.25, 32 px.* and is weight 0.5,"):
        distill(both.model_copy(update={"resume": True, "backbone_weight": [1, 0.5]}))
    with pytest.raises(InputError, match=r"further_backbones was weight .* and is none now"):
        distill(both.model_copy(update={"resume": True, "backbone": ["lite0"], "backbone_weight": []}))
    record = distill(both.model_copy(update={"resume": True})).record
    assert record["images"] == undisturbed["images"]

    first, second = record["backbones"]
    assert (first["spec"], second["spec"]) == ("lite0", "lite1")
    assert (first["weight"], second["weight"]) == (1, 0.25)
    for key in ("backbone", "entry_digest", "image_size", "execution"):
        assert first[key] == record[key]
    assert second["backbone"]["spec"] == "lite1"
    assert second["execution"] == {"mode": "input-grad", "reason": "on a CPU"}
    assert record["config"]["backbone"] == ["lite0", "lite1"]
    assert record == json.loads((both.out / "run.json").read_text())
    assert DistillConfig.model_validate(record["config"]).backbone == both.backbone


def test_one_backbone_is_recorded_as_a_name(config: DistillConfig) -> None:
    record = distill(config.model_copy(update={"steps": 1})).record
    assert record["config"]["backbone"] == "lite0"
    assert [each["spec"] for each in record["backbones"]] == ["lite0"]


def test_images_are_matched_to_sub_classes_of_the_first_backbone_and_class_means_of_the_others(
    both: DistillConfig,
) -> None:
    distiller = Distiller.from_config(both.model_copy(update={"ipc": 2}))
    features = torch.rand(10, 2, 1, 1280, generator=torch.Generator().manual_seed(0))
    means = torch.from_numpy(distiller.entries[1].read_array("train/mean").astype(np.float64))
    flow = compute_flow(means, means).float()
    expected = sfm_loss(features.mean(1, keepdim=True), flow)
    assert distiller.objectives[1](features).item() == pytest.approx(expected.item(), rel=1e-6)
    swapped = distiller.objectives[0](features.flip(1)).item()
    assert swapped != pytest.approx(distiller.objectives[0](features).item(), rel=1e-6)


def test_a_digest_pins_the_first_entry_and_the_others_follow(both: DistillConfig) -> None:
    (entry, other), _ = open_entries_and_backbones(
        both.model_copy(update={"dataset": "fashion-mnist-6k@tuning"})
    )
    pinned = f"fashion-mnist-6k@{entry.summary.entry_digest[:12]}"
    found, _ = open_entries_and_backbones(both.model_copy(update={"dataset": pinned}))
    assert [each.summary for each in found] == [entry.summary, other.summary]
    assert {each.summary.role for each in found} == {"tuning"}


def test_all_limits_on_the_number_of_backbones_agree(both: DistillConfig) -> None:
    limit, options = MAX_DISTILLATION_BACKBONES, both.model_dump() | {"backbone_weight": []}
    DistillConfig(**options | {"backbone": ["lite0"] * limit})
    with pytest.raises(ValidationError, match=f"at most {limit} items"):
        DistillConfig(**options | {"backbone": ["lite0"] * (limit + 1)})
    resolved = CONFIG.model_dump()
    further = [LARGER.model_dump()] * limit
    ResolvedDistillConfig.model_validate(resolved | {"further_backbones": further[1:]})
    with pytest.raises(ValidationError, match=f"at most {limit - 1} items"):
        ResolvedDistillConfig.model_validate(resolved | {"further_backbones": further})


@pytest.mark.parametrize("weights", [[1e308, 1e308], [1, 1e-320], [1, 0], [1, float("nan")]])
def test_weights_of_which_no_mean_can_be_taken_are_refused(both: DistillConfig, weights: list[float]) -> None:
    with pytest.raises(ValidationError, match="backbone_weight"):
        DistillConfig(**both.model_dump() | {"backbone_weight": weights})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": ["lite0", "lite0"]}, "lite0 at 32 px is given twice: give every backbone once"),
        ({"backbone": ["lite0", "lite2"]}, "no entry of fashion-mnist-6k through .*lite2.*sfm extract"),
        ({"image_size": [32, 48]}, "lite1 at 48 px"),
    ],
)
def test_backbones_that_the_store_lacks_or_that_repeat_are_refused(
    both: DistillConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        distill(both.model_copy(update=changes))
    assert "\n" not in str(error.value)
    assert not both.out.exists()


@pytest.mark.parametrize(
    ("names", "class_counts", "message"),
    [
        (("birds", "birds"), (4, 3), "differ in their classes"),
        (("birds", "other birds"), (4, 4), "the store holds no entry through lite1 of the images of birds@"),
    ],
)
def test_entries_of_other_data_are_refused(
    lite1: Backbone,
    features: np.ndarray,
    publish_entry: Callable[..., str],
    tmp_path: Path,
    names: tuple[str, str],
    class_counts: tuple[int, int],
    message: str,
) -> None:
    store = tmp_path / "store"
    for images, count, backbone in zip(names, class_counts, (None, lite1), strict=True):
        publish_entry(store, "birds", {"train/mean": features.mean(1)[:count]}, backbone, images)
    config = DistillConfig(
        store=str(store), backbone=["lite0", "lite1"], dataset="birds", out=tmp_path / "run", device="cpu"
    )
    with pytest.raises(InputError, match=message) as error:
        distill(config)
    assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_entries_of_other_roles_are_refused(both: DistillConfig) -> None:
    def open_role(dataset: str) -> tuple[list[Entry], list[Backbone]]:
        return open_entries_and_backbones(both.model_copy(update={"dataset": dataset}))

    entries, backbones = open_role("fashion-mnist-6k")
    tuning, _ = open_role("fashion-mnist-6k@tuning")
    with pytest.raises(InputError, match="differ in their role: match backbones by entries of the"):
        Distiller(both, [entries[0], tuning[1]], backbones)
    with pytest.raises(InputError, match="1 entries and 2 backbones"):
        Distiller(both, entries[0], backbones)

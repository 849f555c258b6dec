"""Build backbones, load and check their weights, and compute features."""

import difflib
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfm.backbones.card import BackboneCard, Preprocessing
from sfm.backbones.execution.batch_norms import fold_batch_norms_if_equivalent
from sfm.backbones.hub import find_or_download_hub_weights
from sfm.backbones.identity import digest_weights, is_in_modules, select_feature_tensors
from sfm.backbones.preprocessing import preprocessing_from_timm_config, read_square_input_side
from sfm.backbones.spec import PROJECTED, ParsedSpec, parse_spec
from sfm.backbones.weight_files import find_packaged_weights, group_tensors_by_prefix, read_weight_file
from sfm.constrained_types import MAX_INPUT_PIXELS
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.text import get_first_error_line, sanitize_line

# Common names of the backbone inside a larger model.
_USUAL_PREFIX_PARTS = frozenset({"", "module", "model", "backbone", "encoder"})


class _TensorsAndMismatches(NamedTuple):
    """Tensors by the model's names, and a line for each that does not fit the model."""

    tensors: dict[str, Tensor]
    mismatches: list[str]


class FeatureModel(nn.Module):
    """A timm model that returns the feature instead of logits.

    Parameters
    ----------
    model : nn.Module
        A timm classification model.
    projected : bool
        Whether the feature is the output of the model's last layer, or what enters it.
    """

    def __init__(self, model: nn.Module, *, projected: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.projected = projected

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, 3, side, side) to features (batch, feature)."""
        hidden = self.model.forward_features(images)
        feature: Tensor = self.model.forward_head(hidden, pre_logits=not self.projected)
        return feature


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen feature extractor.

    Attributes
    ----------
    card : BackboneCard
        What identifies it.
    model : nn.Module
        Normalised images (batch, 3, side, side) to features (batch, feature); no parameter takes a gradient.
    device : torch.device
        Where it runs.
    """

    card: BackboneCard
    model: nn.Module
    device: torch.device
    _mean: Tensor = field(repr=False)
    _std: Tensor = field(repr=False)
    memory_format: torch.memory_format = field(repr=False)

    def features(self, images: Tensor) -> Tensor:
        """Extract features.

        Parameters
        ----------
        images : Tensor, shape (batch, 3, input_size, input_size)
            Values in [0, 1], not normalised, on the backbone's device.

        Returns
        -------
        Tensor, shape (batch, feature)
            Of the type of `images`; differentiable with respect to them.

        Raises
        ------
        ValueError
            If the images are not of the backbone's input size.
        """
        size = self.card.preprocessing.input_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (batch, 3, {size}, {size})")
        laid_out = images.contiguous(memory_format=self.memory_format)
        feature: Tensor = self.model((laid_out - self._mean).div_(self._std))
        return feature.to(images.dtype)


def load_backbone(
    spec: str,
    *,
    image_size: int | None = None,
    device: str = "auto",
    fold_norms: bool = True,
    progress: ProgressCallback = no_progress,
) -> Backbone:
    """Build a backbone, load its weights, and identify it.

    The digest of the weights is taken at the resolution they were stored in; only then are position
    embeddings resampled to the wanted size, and batch norms folded into convolutions.

    Parameters
    ----------
    spec : str
        See `sfm.backbones.spec.parse_spec`.
    image_size : int, optional
        Side of the input in pixels; default: the spec's, or the size that the weights were trained for.
    device : {"auto", "cpu", "cuda"}
        "auto" selects the GPU if one is available.
    fold_norms : bool
        Whether to fold batch norms into convolutions: the same features, up to rounding, in less time.
    progress : ProgressCallback
        Called with the name of the weights that are loaded from a file with several sets.

    Returns
    -------
    Backbone

    Raises
    ------
    InputError
        If the spec is unknown, its weights are unavailable, do not fit the architecture or are not finite,
        their preprocessing is not supported, the model does not support the image size, or the device does
        not exist.
    """
    parsed = parse_spec(spec)
    place = _select_device(device)
    if image_size is not None and not 1 <= image_size <= MAX_INPUT_PIXELS:
        raise InputError(f"image size {image_size}: it is a number of pixels, 1 to {MAX_INPUT_PIXELS}")
    _require_known_model(parsed)
    preprocessing = _resolve_preprocessing(parsed, image_size)
    model, choice = _load_model_with_weights_note(parsed)
    if choice:
        progress(Progress(f"weights of {strip_folder_of_weights_file(spec)} from {choice}", 1, 1, "sets"))
    try:
        digest = digest_weights(
            select_feature_tensors(model.state_dict(), _list_unused_module_names(parsed, model))
        )
    except InputError as error:
        raise InputError(f"backbone '{spec}': {error}") from error
    size = preprocessing.input_size
    trunk = FeatureModel(model, projected=parsed.feature_rule == PROJECTED).eval().requires_grad_(False)
    example = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = _set_input_size_and_count_features(trunk, example, spec)
    folded: nn.Module = (
        fold_batch_norms_if_equivalent(trunk, example).requires_grad_(False) if fold_norms else trunk
    )
    convolutional = sum(isinstance(module, nn.Conv2d) for module in folded.modules()) > 1
    layout = torch.channels_last if convolutional else torch.contiguous_format
    card = BackboneCard(
        spec=strip_folder_of_weights_file(spec),
        model=parsed.model,
        rule=parsed.feature_rule,
        weights=digest,
        preprocessing=preprocessing,
        features=features,
    )
    folded = folded.to(device=place).to(memory_format=layout)
    mean, std = (
        _expand_channel_values(values, size, place, layout)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return Backbone(card, folded, place, mean, std, layout)


def strip_folder_of_weights_file(spec: str) -> str:
    """Return a spec without the folder of its file, which would leak into shared cards."""
    name, at, file = spec.partition("@")
    return f"{name}{at}{PurePath(file).name}" if at else spec


def _select_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("device 'cuda' is not available: torch finds no GPU here; use 'auto' or 'cpu'")
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device '{name}': use auto, cpu or cuda")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _expand_channel_values(
    channel_values: Sequence[float], image_size: int, device: torch.device, memory_format: torch.memory_format
) -> Tensor:
    """Expand one value per channel to every pixel: arithmetic is faster on tensors of equal layout."""
    pixels = torch.tensor(channel_values, device=device).view(1, 3, 1, 1).expand(1, 3, image_size, image_size)
    return pixels.contiguous(memory_format=memory_format)


def _load_model_with_weights_note(spec: ParsedSpec) -> tuple[Any, str]:
    """Return the timm model at the resolution of its weights, and which set of a file was loaded."""
    import timm  # slow to import

    path = spec.weights_path if spec.weights_package is None else find_packaged_weights(spec.weights_package)
    if path is None:
        return _create_pretrained_model(spec), ""
    model: Any = timm.create_model(spec.timm_name, pretrained_cfg_overlay=dict(spec.timm_config_overrides))
    checkpoint = read_weight_file(path, spec.weights_prefix)
    tensors, unused = checkpoint.tensors, _list_unused_module_names(spec, model)
    if spec.weights_package is not None:
        tensors = _rename_tensors_by_order(tensors, model, path)
    choice = _load_weights_with_prefix_note(model, tensors, unused, path, spec.model)
    return model, ", ".join(filter(None, (checkpoint.choice_note, choice)))


def _require_known_model(spec: ParsedSpec) -> None:
    import timm  # slow to import

    known = timm.list_models()
    if spec.model not in known:
        close = [f"timm/{name}" for name in difflib.get_close_matches(spec.model, known, n=3)]
        guess = f": did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"unknown backbone 'timm/{spec.model}' (timm {timm.__version__}){guess}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{spec.model}.*")]
    if spec.weights_tag is not None and spec.weights_tag not in tags:
        raise InputError(
            f"timm has no weights '{spec.weights_tag}' for {spec.model}: it has {', '.join(tags) or 'none'}"
        )


def _resolve_preprocessing(spec: ParsedSpec, image_size: int | None) -> Preprocessing:
    """Return the preprocessing with which timm evaluates a spec's weights, at an image size."""
    from timm.models import PretrainedCfg, get_pretrained_cfg  # slow to import

    known: Any = get_pretrained_cfg(spec.timm_name) or PretrainedCfg()
    config = {**known.to_dict(), **spec.timm_config_overrides}
    wanted = spec.image_size if image_size is None else image_size
    try:
        return preprocessing_from_timm_config(
            config, read_square_input_side(config) if wanted is None else wanted
        )
    except InputError as error:
        raise InputError(f"backbone '{spec.text}': {error}") from error


def _create_pretrained_model(spec: ParsedSpec) -> Any:
    """Build a timm model with its pretrained weights."""
    import timm  # slow to import
    from timm.models import get_pretrained_cfg

    config: Any = get_pretrained_cfg(spec.timm_name)
    advice = f"or give a local file: {spec.text}@FILE"
    if config is None or not config.has_weights:
        raise InputError(f"timm has no weights for '{spec.text}': name a tag that has, {advice}")
    try:
        plain = config.hf_hub_id and not config.custom_load and not config.hf_hub_filename
        path = find_or_download_hub_weights(config.hf_hub_id) if plain else None
        overlay = {} if path is None else {"file": str(path)}
        return timm.create_model(spec.timm_name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError, InputError) as error:
        raise InputError(
            f"cannot get the weights of '{spec.text}' ({get_first_error_line(error)}): try again, {advice}"
        ) from error


def _list_unused_module_names(spec: ParsedSpec, model: Any) -> list[str]:
    """Return the names of the classifier's modules, if they come after the feature."""
    named = None if spec.feature_rule == PROJECTED else model.pretrained_cfg.get("classifier")
    return [named] if isinstance(named, str) else list(named or ())


def _rename_tensors_by_order(tensors: dict[str, Tensor], model: Any, path: Path) -> dict[str, Tensor]:
    """Give timm names to tensors that match the model's by order and shape."""
    import timm  # slow to import

    expected = model.state_dict()
    if [tensor.shape for tensor in tensors.values()] != [tensor.shape for tensor in expected.values()]:
        raise InputError(
            f"{path} does not hold the tensors that timm {timm.__version__} expects, in its order"
        )
    return dict(zip(expected, tensors.values(), strict=True))


def _load_weights_with_prefix_note(
    model: Any, tensors: dict[str, Tensor], unused_module_names: Collection[str], path: Path, model_name: str
) -> str:
    """Load weights into a model, ignoring its classifier; return the prefix if several would fit."""
    choice = ""
    fitted, faults = _translate_tensors_and_resize_model(model, tensors, unused_module_names)
    if faults:
        tensors_by_prefix = group_tensors_by_prefix(
            tensors, select_feature_tensors(model.state_dict(), unused_module_names)
        )
        fitting_prefixes = [
            prefix
            for prefix, prefixed in tensors_by_prefix.items()
            if not _translate_tensors_and_resize_model(model, prefixed, unused_module_names).mismatches
        ]
        prefix, choice = (
            _choose_prefix_with_note(fitting_prefixes, path, model_name)
            if fitting_prefixes
            else (next(iter(tensors_by_prefix), ""), "")
        )
        fitted, faults = _translate_tensors_and_resize_model(
            model, tensors_by_prefix.get(prefix, tensors), unused_module_names
        )
    if faults:
        raise InputError(f"{path} does not fit {model_name}: {_join_first_mismatches(faults)}")
    model.load_state_dict(
        {n: t for n, t in fitted.items() if not is_in_modules(n, unused_module_names)}, strict=False
    )
    return choice


def _choose_prefix_with_note(fitting_prefixes: list[str], path: Path, model_name: str) -> tuple[str, str]:
    """Return the usual one of the prefixes that fit, and a description if there are several."""
    if len(fitting_prefixes) == 1:
        return fitting_prefixes[0], ""
    descriptions = {prefix: f"{prefix}*" if prefix else "no prefix" for prefix in fitting_prefixes}
    usual = [
        prefix
        for prefix in fitting_prefixes
        if _USUAL_PREFIX_PARTS.issuperset(prefix.removesuffix(".").split("."))
    ]
    if len(usual) != 1:
        raise InputError(
            f"{path} holds {model_name} under {' and '.join(descriptions.values())}: save only the right ones"
        )
    chosen = descriptions.pop(usual[0])
    return usual[0], f"{chosen}, not {' or '.join(descriptions.values())}"


def _translate_tensors_and_resize_model(
    model: Any, tensors: dict[str, Tensor], unused_module_names: Collection[str]
) -> _TensorsAndMismatches:
    """Translate tensors to the model's names, once the model has the resolution that they are stored in."""
    _resize_model_to_position_grid(model, tensors.get("pos_embed"))
    faults = _describe_tensor_mismatches(model, tensors, unused_module_names)
    # timm keeps the translation of the first publisher's checkpoints in the model's module.
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not faults or translate is None:
        return _TensorsAndMismatches(tensors, faults)
    try:
        translated = translate(dict(tensors), model)
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError):
        return _TensorsAndMismatches(tensors, faults)
    still_unfit = _describe_tensor_mismatches(model, translated, unused_module_names)
    return _TensorsAndMismatches(translated, faults if still_unfit else [])


def _resize_model_to_position_grid(model: Any, stored_pos_embed: Tensor | None) -> None:
    """Resize a vision transformer's input to the grid of a stored position embedding."""
    own = getattr(model, "pos_embed", None)
    if (
        stored_pos_embed is None
        or own is None
        or stored_pos_embed.ndim != 3
        or not hasattr(model, "set_input_size")
    ):
        return
    # The widths must be equal, or a model of any size would be made to fit.
    if stored_pos_embed.shape == own.shape or stored_pos_embed.shape[::2] != own.shape[::2]:
        return
    rows, columns = model.patch_embed.grid_size
    side = math.isqrt(max(0, stored_pos_embed.shape[1] - (own.shape[1] - rows * columns)))
    if side not in (0, rows):
        model.set_input_size(img_size=side * model.patch_embed.patch_size[0])


def _describe_tensor_mismatches(
    model: Any, tensors: dict[str, Tensor], unused_module_names: Collection[str]
) -> list[str]:
    """Describe the tensors that are missing, unknown or of another shape, without the unused modules."""
    expected = model.state_dict()
    used_tensors = {
        name: tensor for name, tensor in tensors.items() if not is_in_modules(name, unused_module_names)
    }
    missing = [
        f"no {name}"
        for name in select_feature_tensors(expected, unused_module_names)
        if name not in used_tensors
    ]
    unknown = [f"unknown {name}" for name in used_tensors if name not in expected]
    misshapen = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in used_tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    return missing + unknown + misshapen


def _join_first_mismatches(mismatches: list[str]) -> str:
    listed = ", ".join(sanitize_line(fault, 120) for fault in mismatches[:3])
    return listed + (f" and {len(mismatches) - 3} more" if len(mismatches) > 3 else "")


def _set_input_size_and_count_features(trunk: FeatureModel, example_images: Tensor, spec: str) -> int:
    """Set a model's input size and return its number of features."""
    size = example_images.shape[-1]
    try:
        if hasattr(trunk.model, "set_input_size"):
            trunk.model.set_input_size(img_size=size)
        with torch.no_grad():
            feature = trunk(example_images)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"backbone '{spec}' cannot take images of {size} px: {get_first_error_line(error)}"
        ) from error
    if feature.ndim != 2:
        raise InputError(
            f"backbone '{spec}' gives features of shape {tuple(feature.shape[1:])}, not a vector"
        )
    return int(feature.shape[1])

"""The identity of a backbone as plain data: two can be compared without loading a model."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, computed_field, model_serializer

from sfm.constrained_types import (
    ChannelMean,
    ChannelStd,
    Digest,
    FeatureCount,
    InputPixels,
    Name,
    ResizedPixels,
)


class Preprocessing(BaseModel):
    """Resizing, cropping and normalisation of an image to a backbone's input.

    The image is resized according to ``crop_mode``, and the central ``input_size`` square is cut out. Values
    are scaled to [0, 1]. Then ``mean`` is subtracted and the result divided by ``std``, for red, green
    and blue.

    Attributes
    ----------
    input_size : int
        Side of the input in pixels.
    resize : int
        Side in pixels that the image is resized to before it is cropped.
    resampling : str
    mean, std : tuple of float
    crop_mode : {"center", "pad", "squash", "border"}
        timm's: which side of the image becomes ``resize`` pixels long. "center": the shorter, and the ends of
        the longer are lost. "pad": as "center", where ``resize`` is less than ``input_size``; the rest is
        black. "squash": both, whatever the aspect. "border": the longer; the rest is ``mean``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: InputPixels
    resize: ResizedPixels
    resampling: Literal["bilinear", "bicubic", "lanczos"]
    mean: tuple[ChannelMean, ChannelMean, ChannelMean]
    std: tuple[ChannelStd, ChannelStd, ChannelStd]
    crop_mode: Literal["center", "pad", "squash", "border"] = "center"

    @model_serializer(mode="wrap")
    def _serialize_without_default_crop_mode(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Hashes of earlier versions did not cover it, and their readers refuse a card that names it.
        fields: dict[str, Any] = handler(self)
        if fields.get("crop_mode") == "center":
            del fields["crop_mode"]
        return fields


class BackboneCard(BaseModel):
    """The identity of a backbone, and the spec it was loaded by.

    Attributes
    ----------
    spec : str
        The spec as given, e.g. ``lite0``, without the folder of a file. Not part of the hash.
    model : str
        timm's name of the architecture, without a weights tag.
    rule : str
        How the feature is computed from the model, e.g. ``pre-logits``.
    weights : str
        SHA-256 (hex) over every tensor that the feature depends on.
    preprocessing : Preprocessing
    features : int
        Length of the feature vector.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    spec: Name
    model: Name
    rule: Name
    weights: Digest
    preprocessing: Preprocessing
    features: FeatureCount

    @computed_field  # type: ignore[prop-decorator]
    @property
    def hash(self) -> str:
        """SHA-256 (hex) over architecture and feature rule, weights, and preprocessing."""
        identity = {
            "architecture": [self.model, self.rule],
            "weights": self.weights,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def describe_backbone_differences(stored: BackboneCard, given: BackboneCard) -> list[str]:
    """Describe which of architecture, weights and preprocessing of two backbones differ, and how.

    Returns
    -------
    list of str
        One phrase per differing part; empty if the two are the same backbone.
    """
    found = []
    if (stored.model, stored.rule) != (given.model, given.rule):
        found.append(
            f"the architecture (stored {stored.model}, {stored.rule}; given {given.model}, {given.rule})"
        )
    if stored.weights != given.weights:
        found.append(f"the weights (stored {stored.weights[:12]}, given {given.weights[:12]})")
    old, new = dict(stored.preprocessing), dict(given.preprocessing)
    changed = [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
    if changed:
        found.append(f"the preprocessing ({', '.join(changed)})")
    return found

"""What identifies a backbone, as plain data: no model is loaded to compare two of them."""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field


class Preprocessing(BaseModel):
    """How an image becomes a backbone's input.

    The shorter side is resized to ``resize`` pixels, the central ``input_size`` square is cut out, values are
    scaled to [0, 1], ``mean`` is taken off and the rest divided by ``std``, per channel (red, green, blue).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: int
    resize: int
    resampling: Literal["bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class BackboneCard(BaseModel):
    """The identity of a backbone, and how it was asked for.

    Attributes
    ----------
    spec : str
        What the user wrote, e.g. ``lite0``; of a file, only its name. Not part of the hash.
    model : str
        timm's name of the architecture, without a weights tag.
    rule : str
        How the feature is read off it, e.g. ``pre-logits``.
    weights : str
        SHA-256 (hex) over every tensor that reaches the feature.
    preprocessing : Preprocessing
    features : int
        Length of the feature vector.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    spec: str
    model: str
    rule: str
    weights: str
    preprocessing: Preprocessing
    features: int

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


def differences(stored: BackboneCard, given: BackboneCard) -> list[str]:
    """Say which of the three parts of two backbones' identities differ, and how.

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
    old, new = stored.preprocessing.model_dump(), given.preprocessing.model_dump()
    changed = [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
    if changed:
        found.append(f"the preprocessing ({', '.join(changed)})")
    return found

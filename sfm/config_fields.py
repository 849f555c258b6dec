"""Field types of configs: each says which of its values ``--config`` may take from an untrusted file.

A config file gives the recipe. Paths, addresses and consent to publish images must be
given on the command line.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

T = TypeVar("T")

MAX_CANVAS_PIXELS = 8192
"""Limit on the side of a distilled image, in pixels."""

MAX_IMAGES_PER_CLASS = 10_000

MAX_DISTILLATION_BACKBONES = 100
"""Backbones that one set of images is matched to."""

MAX_ITERATIONS = 10**9
"""Limit on steps, epochs and views."""

MAX_PROCESSES = 4096
"""Threads or processes of a command."""

LossWeight = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
"""Weight of a backbone's loss: the mean of weighted losses is finite, and no backbone is lost in it."""


@dataclass(frozen=True)
class ConfigFileRule:
    """Annotation of a field that says which of its values a config file may not give.

    Attributes
    ----------
    is_value_refused : callable
        Returns whether a value is a place, an address or a consent, or takes much memory.
    """

    is_value_refused: Callable[[Any], bool]


def has_spec_with_weights_file(spec_or_specs: Any) -> bool:
    """Return whether a backbone spec, or one of a list, names a file of weights."""
    return any(
        "@" in spec
        for spec in (spec_or_specs if isinstance(spec_or_specs, list) else [spec_or_specs])
        if isinstance(spec, str)
    )


def select_values_refused_from_file(
    config_model: type[BaseModel], field_values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a config that a file may not give, by field name."""
    return {
        name: field_values[name]
        for name, field in config_model.model_fields.items()
        if name in field_values and get_config_file_rule(field).is_value_refused(field_values[name])
    }


def get_config_file_rule(field: FieldInfo) -> ConfigFileRule:
    """Return the rule that a field is annotated with; every field of a config has one."""
    (rule,) = (marker for marker in field.metadata if isinstance(marker, ConfigFileRule))
    return rule


def make_max_value_rule(max_value: int) -> ConfigFileRule:
    """Return a rule that refuses larger numbers from a file, since they take memory."""

    def is_above(value: Any) -> bool:
        try:
            return float(value) > max_value  # Numbers may be written as text.
        except (TypeError, ValueError, OverflowError):
            return value is not None

    return ConfigFileRule(is_above)


RECIPE_RULE = ConfigFileRule(lambda value: False)
LOCATION_RULE = ConfigFileRule(lambda value: value not in (None, False, []))

RecipeField = Annotated[T, RECIPE_RULE]
"""Shapes the result: a file may give it."""

LocationField = Annotated[T, LOCATION_RULE]
"""A path or an address."""

ConsentField = Annotated[T, ConfigFileRule(bool)]
"""Consent to replace data or to publish real images; 0 and False refuse both."""

BackboneField = Annotated[T, ConfigFileRule(has_spec_with_weights_file)]
"""A recipe, unless a spec names a file of weights."""

ClassesField = Annotated[T, ConfigFileRule(lambda value: isinstance(value, str | Path))]
"""A recipe if it lists classes, a location if it names the file that does."""

InMemoryCountField = Annotated[T, make_max_value_rule(100)]
"""Number of images, or of views of one, that are in memory at a time."""

CanvasField = Annotated[T, make_max_value_rule(1024)]
"""Side of images in pixels: twelve bytes for each value of an image are in memory."""

FeatureViewsField = Annotated[T, make_max_value_rule(3000)]
"""Number of views that are kept in memory as features."""

ProcessCountField = Annotated[T, make_max_value_rule(os.cpu_count() or 1)]
"""Number of processes: a file may ask for as many as this machine has cores."""

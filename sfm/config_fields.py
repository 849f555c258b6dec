"""Fields of configurations: which of them a file may give, and how large what people ask for may be.

A configuration file may come from anybody: it gives the recipe. Where to read and to write, whom to connect
to, and what leaves this machine, people say themselves.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

T = TypeVar("T")

MAX_CANVAS_PIXELS = 8192
"""Side of a distilled image, in pixels: more than the largest input needs."""

MAX_IMAGES_PER_CLASS = 10_000
"""Distilled images of a class."""

MAX_ITERATIONS = 10**9
"""More than anybody waits for: steps, epochs, views."""

MAX_PROCESSES = 4096
"""Threads, or processes, of a command."""


@dataclass(frozen=True)
class ConfigFileRule:
    """Says which values of a field a file of somebody else may not give.

    Attributes
    ----------
    is_place : callable
        Tells of a value whether it is a place, an address or a consent, or takes much memory.
    """

    is_place: Callable[[Any], bool]


def names_weights_file(value: Any) -> bool:
    """Say whether one of some backbone specs names a file of weights."""
    return any(
        "@" in spec for spec in (value if isinstance(value, list) else [value]) if isinstance(spec, str)
    )


def select_refused_values(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some values of a configuration that a file may not give."""
    return {
        name: values[name]
        for name, field in model.model_fields.items()
        if name in values and get_file_rule(field).is_place(values[name])
    }


def get_file_rule(field: FieldInfo) -> ConfigFileRule:
    """Return which values of a field a file may not give; every field says so."""
    (rule,) = (marker for marker in field.metadata if isinstance(marker, ConfigFileRule))
    return rule


def refuse_above(most: int) -> ConfigFileRule:
    """Return the rule of a number that takes memory: people ask for more themselves, a file may not."""

    def is_above(value: Any) -> bool:
        try:
            return float(value) > most  # Numbers may be written as text.
        except (TypeError, ValueError, OverflowError):
            return value is not None

    return ConfigFileRule(is_above)


RECIPE_RULE = ConfigFileRule(lambda value: False)
LOCATION_RULE = ConfigFileRule(lambda value: value not in (None, False, []))

RecipeField = Annotated[T, RECIPE_RULE]
"""What shapes the result: a file may give it."""

LocationField = Annotated[T, LOCATION_RULE]
"""Where to read or write, or whom to connect to."""

ConsentField = Annotated[T, ConfigFileRule(bool)]
"""What replaces something, or lets real images leave: nothing if it is 0 or False."""

BackboneField = Annotated[T, ConfigFileRule(names_weights_file)]
"""A recipe, unless a spec names a file of weights."""

ClassesField = Annotated[T, ConfigFileRule(lambda value: isinstance(value, str | Path))]
"""A recipe if it lists classes, a place if it names the file that does."""

InMemoryCountField = Annotated[T, refuse_above(100)]
"""A recipe of so many images, or views of one, as are in memory at a time."""

FeatureViewsField = Annotated[T, refuse_above(3000)]
"""A recipe of so many views as are kept in memory as features."""

ProcessCountField = Annotated[T, refuse_above(os.cpu_count() or 1)]
"""A recipe of so many processes as this machine has cores."""

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

LARGEST_CANVAS = 8192
"""Side of a distilled image, in pixels: more than the largest input needs."""

MOST_PER_CLASS = 10_000
"""Distilled images of a class."""

MANY = 10**9
"""More than anybody waits for: steps, epochs, views."""

MOST_PROCESSES = 4096
"""Threads, or processes, of a command."""


@dataclass(frozen=True)
class FromFile:
    """Says which values of a field a file of somebody else may not give.

    Attributes
    ----------
    is_place : callable
        Tells of a value whether it is a place, an address or a consent, or takes much memory.
    """

    is_place: Callable[[Any], bool]


def names_file(value: Any) -> bool:
    """Say whether one of some backbone specs names a file of weights."""
    return any(
        "@" in spec for spec in (value if isinstance(value, list) else [value]) if isinstance(spec, str)
    )


def not_from_file(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some values of a configuration that a file may not give."""
    return {
        name: values[name]
        for name, field in model.model_fields.items()
        if name in values and rule_of(field).is_place(values[name])
    }


def rule_of(field: FieldInfo) -> FromFile:
    """Return which values of a field a file may not give; every field says so."""
    (rule,) = (marker for marker in field.metadata if isinstance(marker, FromFile))
    return rule


def above(most: int) -> FromFile:
    """Return the rule of a number that takes memory: people ask for more themselves, a file may not."""

    def is_above(value: Any) -> bool:
        try:
            return float(value) > most  # Numbers may be written as text.
        except (TypeError, ValueError, OverflowError):
            return value is not None

    return FromFile(is_above)


RECIPE = FromFile(lambda value: False)
PLACE = FromFile(lambda value: value not in (None, False, []))

Recipe = Annotated[T, RECIPE]
"""What shapes the result: a file may give it."""

Place = Annotated[T, PLACE]
"""Where to read or write, or whom to connect to."""

Consent = Annotated[T, FromFile(bool)]
"""What replaces something, or lets real images leave: nothing if it is 0 or False."""

BackboneField = Annotated[T, FromFile(names_file)]
"""A recipe, unless a spec names a file of weights."""

ClassesField = Annotated[T, FromFile(lambda value: isinstance(value, str | Path))]
"""A recipe if it lists classes, a place if it names the file that does."""

Copies = Annotated[T, above(100)]
"""A recipe of so many images, or views of one, as are in memory at a time."""

Pool = Annotated[T, above(3000)]
"""A recipe of so many views as are kept in memory as features."""

Processes = Annotated[T, above(os.cpu_count() or 1)]
"""A recipe of so many processes as this machine has cores."""

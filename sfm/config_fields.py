"""Fields of configurations: which of them a file may give, and how large what people ask for may be.

A configuration file may come from anybody: it gives the recipe. Where to read and to write, whom to connect
to, and what leaves this machine, people say themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
        Tells of a value whether it is a place, an address or a consent.
    """

    is_place: Callable[[Any], bool]


def names_file(value: Any) -> bool:
    """Say whether one of some backbone specs names a file of weights."""
    return any(
        "@" in spec for spec in (value if isinstance(value, list) else [value]) if isinstance(spec, str)
    )


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

"""Parse the options of a dataset spec, which follow its question mark: ``?test=PATTERN&classes=FILE``."""

import difflib
import re
from collections.abc import Sequence

from sfm.errors import InputError

SHARED_OPTIONS = ("classes", "background", "white")
"""Options of every source, which :func:`sfm.pipeline.sources.open_source` takes out of the spec."""

_OPTIONS = re.compile(r"\?(?=[a-z_]+=)")


def split_location_and_options(place_with_options: str) -> tuple[str, dict[str, str]]:
    """Split the text after ``KIND:`` of a spec into location and options.

    Parameters
    ----------
    place_with_options : str
        ``PLACE?OPTIONS``; a question mark without a following ``name=`` belongs to the location.

    Returns
    -------
    str, dict of str to str
        The location, and the options in their order.

    Raises
    ------
    InputError
        If an option has no value or is given twice.
    """
    match = _OPTIONS.search(place_with_options)
    if match is None:
        return place_with_options, {}
    options: dict[str, str] = {}
    for part in place_with_options[match.end() :].split("&"):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise InputError(
                f"the option {part!r} in {place_with_options} has no value: write ?NAME=VALUE&NAME=VALUE"
            )
        if name in options:
            raise InputError(f"the option {name} is given twice in {place_with_options}")
        options[name] = value
    return place_with_options[: match.start()], options


def join_location_and_options(location: str, options: dict[str, str]) -> str:
    """Join a location and its options as in a spec; the inverse of :func:`split_location_and_options`."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{location}?{query}" if query else location


def require_known_options(spec: str, options: dict[str, str], known_names: Sequence[str]) -> None:
    """Refuse options that a source does not have.

    Raises
    ------
    InputError
        Names the option and the most similar one.
    """
    for name in options:
        if name not in known_names:
            all_names = [*known_names, *SHARED_OPTIONS]
            close = difflib.get_close_matches(name, all_names, n=1)
            hint = f"did you mean {close[0]}=?" if close else f"there are {', '.join(all_names)}"
            raise InputError(f"{spec} has no option {name}: {hint}")


def parse_yes_no_option(spec: str, options: dict[str, str], name: str) -> bool:
    """Return whether an option of a spec is ``yes``; it is ``no`` by default.

    Raises
    ------
    InputError
        If it is something else.
    """
    value = options.get(name, "no")
    if value not in ("yes", "no"):
        raise InputError(f"{spec}: write {name}=yes or {name}=no, not {name}={value}")
    return value == "yes"

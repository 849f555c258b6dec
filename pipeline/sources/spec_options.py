"""Parse the options of a dataset spec, which follow its question mark: ``?test=PATTERN&classes=FILE``."""

import difflib
import re
from collections.abc import Sequence

from sfm.errors import InputError

SHARED_OPTIONS = ("classes", "background", "white")
"""Options of every source, which :func:`sfm.pipeline.sources.open_source` takes out of the spec."""

_OPTIONS = re.compile(r"\?(?=[a-z_]+=)")


def parse_spec_options(place_with_options: str) -> tuple[str, dict[str, str]]:
    """Return the place and the options of a spec.

    Parameters
    ----------
    place_with_options : str
        What follows ``KIND:`` in a spec. A question mark that no ``name=`` follows belongs to the place.

    Returns
    -------
    str, dict of str to str
        The place, and the options in the order written.

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


def format_spec_options(place: str, options: dict[str, str]) -> str:
    """Return a place and its options as they stand in a spec; the inverse of :func:`parse_spec_options`."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{place}?{query}" if query else place


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


def parse_yes_no_option(spec: str, options: dict[str, str], option_name: str) -> bool:
    """Return whether an option of a spec is ``yes``; it is ``no`` by default.

    Raises
    ------
    InputError
        If it is something else.
    """
    value = options.get(option_name, "no")
    if value not in ("yes", "no"):
        raise InputError(f"{spec}: write {option_name}=yes or {option_name}=no, not {option_name}={value}")
    return value == "yes"

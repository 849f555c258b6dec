"""Text of a report: labels, numbers with units, and commands to paste."""

import shlex
from collections.abc import Mapping
from typing import Any

UNKNOWN = "–"

IMAGE_SET_LABELS = {
    "distilled": "Distilled",
    "none": "No images",
    "random": "Random real",
    "nearest": "Real, nearest to mean",
    "neighbour": "Real, nearest to distilled",
    "all real": "All real",
}
"""Labels of the image sets trained on."""

MODE_DESCRIPTIONS = {
    "linear": "a fresh linear classifier, trained on the images",
    "soft": "a fresh linear classifier, trained on soft labels of the images, from the classifier of all "
    "real images through the backbone distilled on; real images have such labels, too",
    "inherit": "the classifier of all real images through the backbone distilled on, behind a linear "
    "projector that is trained on the images; through the backbone distilled on (own backbone), it shows "
    "that classifier more than the images",
    "inherit-ridge": "as inherit, the projector in closed form",
    "inherit-statistics": "as inherit, the projector from class means alone: no image is used",
    "kd": "a fresh classifier, trained on the images with soft labels of the inherited one",
    "joint": "projector and inherited classifier, trained together on the images and their classes",
    "stage": "the projector of inherit, and behind it the inherited classifier, trained on the images and "
    "their classes",
    "nearest class mean": "the class whose mean is nearest",
    "discriminant": "the linear discriminant of all real images, in closed form",
}


def format_decimal_bytes(byte_count: int | None) -> str:
    """Return a number of bytes in decimal units: "1.2 MB"; a dash for None."""
    if byte_count is None:
        return UNKNOWN
    amount, unit = float(byte_count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.3g} {unit}"


def format_wall_time(seconds: float | None) -> str:
    """Return a time: "48 s", "3 min 20 s", "2 h 5 min"; a dash for None."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total_seconds = round(seconds)
    minutes, hours = total_seconds // 60, total_seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {total_seconds % 60} s" if minutes else f"{total_seconds} s"


def format_count_with_noun(count: int, singular_noun: str) -> str:
    """Return a count with its noun: "1 image", "1,000 images"."""
    return f"{count:,} {singular_noun}{'' if count == 1 else 's'}"


def format_sfm_command(subcommand: str, positional_argument: str | None, options: Mapping[str, Any]) -> str:
    """Return the command line of a configuration, quoted for a shell.

    Parameters
    ----------
    subcommand : str
    positional_argument : str, optional
        Argument after the verb.
    options : mapping of str to object
        Values by field; None, False and empty lists are left out.
    """
    words = ["sfm", subcommand, *([positional_argument] if positional_argument is not None else [])]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [word for one in value for word in (flag, str(one))]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)

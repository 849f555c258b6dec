"""Figures, units and names as a report writes them."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_KNOWN = "–"

IMAGES = {
    "distilled": "Distilled",
    "none": "No images",
    "random": "Random real",
    "nearest": "Real, nearest to mean",
    "neighbour": "Real, nearest to distilled",
    "all real": "All real",
}
"""What was trained on, in few words."""

MODES = {
    "linear": "a fresh linear classifier, trained on the images",
    "inherit": "the classifier of all real images through the backbone distilled on, behind a linear "
    "projector that is trained on the images; through the backbone distilled on (own backbone), it shows "
    "that classifier more than the images",
    "inherit-ridge": "as inherit, the projector in closed form",
    "inherit-statistics": "as inherit, the projector from class means alone: no image is used",
    "kd": "a fresh classifier, trained on the images with soft labels of the inherited one",
    "joint": "projector and classifier, trained together on the images",
    "stage": "projector and classifier, trained one after the other on the images",
    "nearest class mean": "the class whose mean is nearest",
    "discriminant": "the linear discriminant of all real images, in closed form",
}


def percent(fraction: float, spread: float | None = None) -> str:
    """Write a fraction in percent: "71.1", or with its deviation "71.1 ± 0.7"."""
    return f"{100 * fraction:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def size(count: int | None) -> str:
    """Write a number of bytes: "1.2 MB"."""
    if count is None:
        return NOT_KNOWN
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """Write a time: "48 s", "3 min 20 s", "2 h 5 min"."""
    if seconds is None:
        return NOT_KNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def many(count: int, what: str) -> str:
    """Write a count with its noun: "1 image", "1,000 images"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def command_line(verb: str, argument: str | None, options: Mapping[str, Any]) -> str:
    """Write the command of a configuration, fit to be pasted into a shell.

    Parameters
    ----------
    verb : str
    argument : str, optional
        What follows the verb.
    options : mapping of str to object
        By field; None, False and empty lists are left out.
    """
    words = ["sfm", verb, *([argument] if argument is not None else [])]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [word for one in value for word in (flag, str(one))]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)


def evaluate_again(run: Path, config: Mapping[str, Any]) -> str:
    """Write the command that repeats an evaluation; ``--config`` takes no places from a file."""
    places = {name: config.get(name) for name in ("store", "backbone", "out")}
    return command_line("evaluate", str(run), {"config": run / "evaluation.json", **places})

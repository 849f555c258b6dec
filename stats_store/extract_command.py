"""Format the `sfm extract` command for an entry that a store lacks, modelled on one that it holds."""

import re
import shlex
from typing import Any

from sfm.stats_store.cards import DatasetCard, Summary
from sfm.stats_store.location import make_url_absolute
from sfm.stats_store.store import Store

DEFAULT_OPTIONS: dict[str, Any] = {
    "sub_classes": [5, 10],
    "exemplars": 0,
    "keep_train_features": False,
    "no_held_out": False,
    "limit_per_class": None,
    "tune_fraction": None,
    "hold_out": None,
    "seed": 0,
    "precision": "float32",
    "classifier": "lbfgs",
    "views": 1,
}
"""Default values of the options of an extraction, by their names in an entry."""


def format_extract_command(
    store: Store, example_summary: Summary, backbone_spec: str, image_size: int | None
) -> str:
    """Return the `sfm extract` command for another backbone of a dataset that a store holds.

    Parameters
    ----------
    store : Store
    example_summary : Summary
        An entry of the dataset; the command repeats its source and options.
    backbone_spec : str
        Spec of the other backbone.
    image_size : int, optional
        Its input size; default: that of `example_summary`.
    """
    entry = store.open_entry(example_summary)
    dataset_card, options = entry.dataset, entry.extraction.options
    arguments = [*("--store", make_url_absolute(store.url), "--backbone", backbone_spec)]
    arguments += ["--image-size", str(image_size or example_summary.image_size)]
    if (
        options.get("origin") != "extracted"
        or dataset_card.source == "unknown"
        or dataset_card.source.startswith("-")
    ):
        # Merged entries have no source; and a source must not look like an option.
        return shlex.join(["sfm", "extract", "DATASET", *arguments])
    return shlex.join(
        [
            "sfm",
            "extract",
            dataset_card.source,
            *arguments,
            *format_name_option_if_needed(dataset_card),
            *format_nondefault_options(options),
        ]
    )


def format_name_option_if_needed(dataset_card: DatasetCard) -> list[str]:
    """Return the ``--name`` option of a dataset, unless its source implies the name."""
    location = dataset_card.source.partition("?")[0].rstrip("/")
    return [] if dataset_card.name == re.split("[:/]", location)[-1] else ["--name", dataset_card.name]


def format_nondefault_options(options: dict[str, Any]) -> list[str]:
    """Return the command-line options of an extraction that differ from the defaults."""
    arguments: list[str] = []
    for name, default in DEFAULT_OPTIONS.items():
        value = options.get(name, default)
        if value == default:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif isinstance(value, list):
            arguments += [flag, ",".join(map(str, value))]
        else:
            # An entry counts the original image among its views.
            arguments += [flag, str(value - 1 if name == "views" else value)]
    return arguments

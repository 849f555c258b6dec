"""The command that makes an entry that a store lacks, like one that it holds."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from sfm.stats_store.cards import DatasetCard, Summary
from sfm.stats_store.location import absolute_url
from sfm.stats_store.store import Store

DEFAULTS: dict[str, Any] = {
    "sub_classes": [5, 10],
    "exemplars": 0,
    "keep_train_features": False,
    "no_held_out": False,
    "limit_per_class": None,
    "tune_fraction": None,
    "hold_out": None,
    "seed": 0,
    "precision": "float32",
    "views": 1,
}
"""Options of an extraction by their names in an entry, where they need not be given."""


def extract_line(store: Store, others: Sequence[Summary], backbone: str, image_size: int | None) -> str:
    """Return the `sfm extract` command for another backbone of a dataset that a store holds.

    Parameters
    ----------
    store : Store
    others : sequence of Summary
        Entries of the dataset; the first one's source and options are repeated.
    backbone : str
        Spec of the other backbone.
    image_size : int, optional
        Its input size; default: that of the first of `others`.
    """
    entry = store.open(others[0])
    card, options = entry.dataset, entry.extraction.options
    asked = [*("--store", absolute_url(store.url), "--backbone", backbone)]
    asked += ["--image-size", str(image_size or others[0].image_size)]
    if options.get("origin") != "extracted" or card.source == "unknown" or card.source.startswith("-"):
        # Of what was merged, no source is known; and none is an option.
        return shlex.join(["sfm", "extract", "DATASET", *asked])
    return shlex.join(["sfm", "extract", card.source, *asked, *name_words(card), *option_words(options)])


def name_words(card: DatasetCard) -> list[str]:
    """Return the option that names a dataset, unless its source does."""
    place = card.source.partition("?")[0].rstrip("/")
    return [] if card.name == re.split("[:/]", place)[-1] else ["--name", card.name]


def option_words(options: dict[str, Any]) -> list[str]:
    """Return the options of an extraction that are not the default, as they are given."""
    words: list[str] = []
    for name, default in DEFAULTS.items():
        value = options.get(name, default)
        if value == default:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, ",".join(map(str, value))]
        else:
            # An entry counts the image itself among its views.
            words += [flag, str(value - 1 if name == "views" else value)]
    return words

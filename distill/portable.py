"""A run's configuration as ``run.json`` keeps it: the same in another folder, without other files."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.backbones.spec import make_spec_absolute
from sfm.distill.classes import chosen_classes, places_of
from sfm.distill.config import DistillConfig
from sfm.stats_store.cards import DatasetCard
from sfm.stats_store.class_lists import ClassList
from sfm.stats_store.location import make_url_absolute


def portable_config(config: DistillConfig, store: str, class_ids: list[str], threads: int) -> dict[str, Any]:
    """Return the configuration of a run, with whole paths and the classes themselves.

    Parameters
    ----------
    config : DistillConfig
        As it was asked for.
    store : str
        URL of the store, without credentials.
    class_ids : list of str
        Of the classes that were distilled; kept where the configuration names some.
    threads : int
        That the run ended with: another number would give other last bits.
    """
    return config.model_dump(mode="json") | {
        "store": make_url_absolute(store),
        "backbone": make_spec_absolute(config.backbone),
        "classes": None if config.classes is None else class_ids,
        "out": str(config.out.absolute()),
        "threads": threads,
    }


def select_classes(classes: Path | tuple[str, ...] | None, card: DatasetCard) -> npt.NDArray[np.int64]:
    """Return the places of the classes that a file or a list names; None means all.

    Raises
    ------
    InputError
        See :func:`~sfm.distill.classes.chosen_classes`.
    """
    if isinstance(classes, tuple):
        return places_of(ClassList("`classes` of the configuration", list(classes), {}), card)
    return chosen_classes(classes, card)

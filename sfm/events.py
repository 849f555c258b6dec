"""Progress events of a running stage, and the callbacks that take them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """A progress event of a running stage.

    Attributes
    ----------
    stage : str
        Name of the stage, e.g. ``"features"`` or ``"distil"``.
    done, total : int
        Finished units and all units; a stage ends with ``done == total``.
    unit : str
        Name of the units: ``"images"``, ``"steps"``.
    figures : dict of str to float
        Values to show beside the bar, e.g. ``{"loss": 0.31}``.
    note : str
        A message for the user, one line.
    """

    stage: str
    done: int
    total: int
    unit: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """Ignore a progress event: the default callback."""


def hide_progress_of_short_stages(min_stage_seconds: float, callback: ProgressCallback) -> ProgressCallback:
    """Return a callback that forwards events once their stage has taken `min_stage_seconds`."""
    start_times: dict[str, float] = {}

    def delayed(event: Progress) -> None:
        now = time.monotonic()
        if now - start_times.setdefault(event.stage, now) >= min_stage_seconds:
            callback(event)

    return delayed

"""What a running stage tells whoever started it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One sign of life of a running stage.

    Attributes
    ----------
    stage : str
        What is being done, in words, e.g. ``"features"`` or ``"distil"``.
    done, total : int
        Units finished and units in all; a stage ends with ``done == total``.
    unit : str
        What is counted: ``"images"``, ``"steps"``.
    figures : dict of str to float
        What to show next to the bar, e.g. ``{"loss": 0.31}``.
    note : str
        What the user should know now, in one line.
    """

    stage: str
    done: int
    total: int
    unit: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """Listen to nothing."""


def delay_progress(seconds: float, listener: ProgressCallback) -> ProgressCallback:
    """Return a listener that passes on what a stage tells only once the stage has taken that long."""
    began: dict[str, float] = {}

    def listen(event: Progress) -> None:
        now = time.monotonic()
        if now - began.setdefault(event.stage, now) >= seconds:
            listener(event)

    return listen

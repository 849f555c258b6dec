"""Runs that are asked to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - stopping on request is not an error
    """A run was asked to stop (SIGINT, SIGTERM) and has saved where it stands.

    Attributes
    ----------
    step, total : int
        Steps done, and steps in all.
    out : Path
        The run's directory.
    """

    def __init__(self, step: int, total: int, out: Path) -> None:
        super().__init__(
            f"interrupted after step {step} of {total}, all saved in {out}: "
            "repeat the same command with --resume to go on"
        )
        self.step, self.total, self.out = step, total, out

    def __reduce__(self) -> tuple[Any, ...]:
        return Interrupted, (self.step, self.total, self.out)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of dying of them; gives a function that says whether one came.

    A second one does what it would have done without this. Outside the main thread, where handlers cannot be
    set, nothing is noted.
    """
    requested = False
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda: requested
    finally:
        restore()

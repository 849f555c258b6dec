"""Stop a run on SIGINT or SIGTERM once its state is saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class DistillInterrupt(Exception):  # noqa: N818 - stopping on request is not an error
    """A run was stopped by SIGINT or SIGTERM, and its state is saved.

    Attributes
    ----------
    step, total : int
        Steps done, and total number of steps.
    out : Path
        The run's directory.
    """

    def __init__(self, step: int, total: int, out: Path) -> None:
        super().__init__(
            f"interrupted after step {step} of {total}, all saved in {out}: "
            "repeat the same command with --resume to continue"
        )
        self.step, self.total, self.out = step, total, out

    def __reduce__(self) -> tuple[Any, ...]:
        return DistillInterrupt, (self.step, self.total, self.out)


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Catch the first SIGINT or SIGTERM within a context; yield a function that returns whether one came.

    A second signal has its usual effect. Outside the main thread no handler can be set, and none is caught.
    """
    stop_requested = False
    previous: dict[signal.Signals, Any] = {}

    def restore_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop_requested
        stop_requested = True
        restore_handlers()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle_signal)
    try:
        yield lambda: stop_requested
    finally:
        restore_handlers()

"""Many requests at a time: on a remote store nearly all of the time goes into waiting for answers."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from sfm.events import Progress, ProgressCallback, no_progress

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUESTS = 32
"""Requests that are under way at a time."""


def concurrently(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    progress: ProgressCallback = no_progress,
    stage: str = "",
    unit: str = "",
    *,
    limit: int = REQUESTS,
) -> list[Result]:
    """Return what a function makes of every item, in order, from up to `limit` threads.

    An interrupt ends it at once: what is under way is not waited for, and nothing else begins. (A pool of
    :mod:`concurrent.futures` would wait for every request, for minutes on a server that does not answer.)
    After an error nothing else begins either, and what is under way is waited for.

    Parameters
    ----------
    function : callable
        Called in other threads.
    items : iterable
    progress : callable, optional
        Told in this thread how many are done.
    stage, unit : str
        What it is told.
    limit : int
        Most threads.
    """
    given = list(items)
    if stage:
        progress(Progress(stage, 0, len(given), unit))
    results: dict[int, Result] = {}
    for number in _finished(function, given, results, limit):
        if stage:
            progress(Progress(stage, number, len(given), unit))
    return [results[number] for number in range(len(given))]


def interruptibly(function: Callable[[], Result]) -> Result:
    """Call a function that waits in foreign code, so that an interrupt does not have to wait for it."""
    if threading.current_thread() is not threading.main_thread():
        return function()
    return concurrently(lambda call: call(), [function])[0]


async def in_daemon_thread(function: Callable[[], Result]) -> Result:
    """Call a function that waits in foreign code from a coroutine.

    Unlike those of :func:`asyncio.to_thread`, its thread is not waited for when the program ends.
    """
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever awaits it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(future)


def _finished(
    function: Callable[[Item], Result], given: Sequence[Item], results: dict[int, Result], limit: int
) -> Iterator[int]:
    """Fill in results by place; yields how many there are as their number grows."""
    if min(limit, len(given)) <= 1 and threading.current_thread() is not threading.main_thread():
        for number, item in enumerate(given):
            results[number] = function(item)
            yield len(results)
        return
    waiting, errors, changed = deque(enumerate(given)), list[BaseException](), threading.Condition()

    def work() -> None:
        while not errors:
            try:
                number, item = waiting.popleft()
            except IndexError:
                return
            try:
                result = function(item)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
                with changed:
                    errors.append(error)
                    changed.notify()
                return
            with changed:
                results[number] = result
                changed.notify()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(limit, len(given)))]
    told = 0
    try:
        for thread in threads:
            thread.start()
        while told < len(given):
            with changed:
                while not errors and len(results) <= told:
                    changed.wait()
                told = len(results)
            if errors:
                for thread in threads:
                    thread.join()
                raise errors[0]
            yield told
    finally:
        waiting.clear()


class Budget:
    """Bytes that may be held at a time; who wants more waits.

    Parameters
    ----------
    total : int
    """

    def __init__(self, total: int) -> None:
        self._total, self._free, self._changed = total, total, threading.Condition()

    def take(self, size: int) -> int:
        """Wait until so many bytes are free, or all of them if there are not as many; return how many."""
        wanted = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        return wanted

    def give_back(self, size: int) -> None:
        """Free bytes that were taken."""
        with self._changed:
            self._free += size
            self._changed.notify_all()

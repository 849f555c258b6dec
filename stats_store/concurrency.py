"""Run many requests concurrently: requests to a remote store spend most of their time waiting."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from sfm.events import Progress, ProgressCallback, no_progress

InputItem = TypeVar("InputItem")
OutputItem = TypeVar("OutputItem")

MAX_REQUESTS = 32
"""Limit on concurrent requests."""


def map_concurrently(
    function: Callable[[InputItem], OutputItem],
    items: Iterable[InputItem],
    progress: ProgressCallback = no_progress,
    progress_stage: str = "",
    progress_unit: str = "",
    *,
    max_threads: int = MAX_REQUESTS,
) -> list[OutputItem]:
    """Return the results of a function for every item, in order, from up to `max_threads` threads.

    An interrupt ends the call at once, without waiting for running calls. (A pool of
    :mod:`concurrent.futures` would wait for them, for minutes on a server that does not answer.) After an
    error no further call starts, and running ones are waited for.

    Parameters
    ----------
    function : callable
        Called in other threads.
    items : iterable
    progress : callable, optional
        Called in this thread with the number of results.
    progress_stage, progress_unit : str
        Stage and unit that the progress is reported with.
    max_threads : int
        Maximum number of threads.
    """
    all_items = list(items)
    if progress_stage:
        progress(Progress(progress_stage, 0, len(all_items), progress_unit))
    results: dict[int, OutputItem] = {}
    for index in _fill_results_in_threads_yielding_counts(function, all_items, results, max_threads):
        if progress_stage:
            progress(Progress(progress_stage, index, len(all_items), progress_unit))
    return [results[index] for index in range(len(all_items))]


def call_interruptibly(function: Callable[[], OutputItem]) -> OutputItem:
    """Call a function that blocks in foreign code, so that an interrupt does not wait for it."""
    if threading.current_thread() is not threading.main_thread():
        return function()
    return map_concurrently(lambda call: call(), [function])[0]


async def run_in_daemon_thread(function: Callable[[], OutputItem]) -> OutputItem:
    """Call a function that blocks in foreign code from a coroutine.

    Unlike with :func:`asyncio.to_thread`, the program does not wait for the thread when it ends.
    """
    future: Future[OutputItem] = Future()
    future.set_running_or_notify_cancel()

    def run_worker() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again by the awaiting coroutine
            future.set_exception(error)

    threading.Thread(target=run_worker, daemon=True).start()
    return await asyncio.wrap_future(future)


def _fill_results_in_threads_yielding_counts(
    function: Callable[[InputItem], OutputItem],
    all_items: Sequence[InputItem],
    results_by_index: dict[int, OutputItem],
    max_threads: int,
) -> Iterator[int]:
    """Compute `results_by_index` by index in threads; yield their number whenever it grows."""
    if min(max_threads, len(all_items)) <= 1 and threading.current_thread() is not threading.main_thread():
        for index, item in enumerate(all_items):
            results_by_index[index] = function(item)
            yield len(results_by_index)
        return
    pending_items, errors, changed = deque(enumerate(all_items)), list[BaseException](), threading.Condition()

    def run_worker() -> None:
        while not errors:
            try:
                index, item = pending_items.popleft()
            except IndexError:
                return
            try:
                result = function(item)
            except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
                with changed:
                    errors.append(error)
                    changed.notify()
                return
            with changed:
                results_by_index[index] = result
                changed.notify()

    threads = [
        threading.Thread(target=run_worker, daemon=True) for _ in range(min(max_threads, len(all_items)))
    ]
    reported_count = 0
    try:
        for thread in threads:
            thread.start()
        while reported_count < len(all_items):
            with changed:
                while not errors and len(results_by_index) <= reported_count:
                    changed.wait()
                reported_count = len(results_by_index)
            if errors:
                for thread in threads:
                    thread.join()
                raise errors[0]
            yield reported_count
    finally:
        pending_items.clear()


class MemoryBudget:
    """A limit on the bytes held at a time; a thread that needs more waits.

    Parameters
    ----------
    total_bytes : int
    """

    def __init__(self, total_bytes: int) -> None:
        self._total, self._free, self._changed = total_bytes, total_bytes, threading.Condition()

    def acquire(self, requested_bytes: int) -> int:
        """Wait until `requested_bytes` are free, at most the total, and take them; return their number."""
        granted_bytes = min(requested_bytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= granted_bytes)
            self._free -= granted_bytes
        return granted_bytes

    def release(self, granted_bytes: int) -> None:
        """Free bytes that were acquired."""
        with self._changed:
            self._free += granted_bytes
            self._changed.notify_all()

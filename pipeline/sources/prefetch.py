"""Read sample files in threads, ahead of decoding."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

from sfm.pipeline.sources.sample import Sample, SampleFile

FILES_PER_TASK = 8
"""Files that a thread reads at once: switching threads takes time from computing ones."""

PREFETCH_THREADS = 8
"""Files read at the same time, which hides the latency of network disks."""


def prefetch_samples(
    samples: Iterable[Sample | SampleFile], thread_count: int = PREFETCH_THREADS
) -> Iterator[Sample]:
    """Yield samples in their order; those that are files are read ahead in threads.

    Parameters
    ----------
    samples : iterable of Sample or SampleFile
    thread_count : int
        Threads that read. No thread is started if the first sample is no file.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        return
    remaining = chain([first], remaining)
    if isinstance(first, Sample):
        yield from (sample.read() for sample in remaining)
        return
    with ThreadPoolExecutor(thread_count, thread_name_prefix="read") as pool:
        pending: deque[Future[list[Sample | SampleFile]]] = deque()
        try:
            while chunk := list(islice(remaining, FILES_PER_TASK)):
                pending.append(pool.submit(read_small_files, chunk))
                if len(pending) > thread_count:
                    yield from (sample.read() for sample in pending.popleft().result())
            while pending:
                yield from (sample.read() for sample in pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()


def read_small_files(samples: Sequence[Sample | SampleFile]) -> list[Sample | SampleFile]:
    """Return samples with their files read, except large ones."""
    return [sample.read_if_small() if isinstance(sample, SampleFile) else sample for sample in samples]

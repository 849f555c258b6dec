"""Reading sample files in threads, ahead of who decodes them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

from sfm.pipeline.sources.sample import Sample, SampleFile

FILES_PER_TASK = 8
"""Files that a reading thread takes at once."""

READER_THREADS = 8
"""Files read at a time: what a network disk takes to answer passes while others are decoded."""


def prefetch_samples(
    samples: Iterable[Sample | SampleFile], readers: int = READER_THREADS
) -> Iterator[Sample]:
    """Yield samples, all of them read: files ahead of who takes them.

    A thread reads a few at a time: each change of threads takes a core from those that compute.

    Parameters
    ----------
    samples : iterable of Sample or SampleFile
    readers : int
        Threads that read, if the first sample is a file.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    coming = iter(samples)
    first = next(coming, None)
    if first is None:
        return
    coming = chain([first], coming)
    if isinstance(first, Sample):
        yield from (sample.read() for sample in coming)
        return
    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        waiting: deque[Future[list[Sample | SampleFile]]] = deque()
        try:
            while few := list(islice(coming, FILES_PER_TASK)):
                waiting.append(pool.submit(prefetch_chunk, few))
                if len(waiting) > readers:
                    yield from (sample.read() for sample in waiting.popleft().result())
            while waiting:
                yield from (sample.read() for sample in waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()


def prefetch_chunk(samples: Sequence[Sample | SampleFile]) -> list[Sample | SampleFile]:
    """Read samples, but for large files."""
    return [sample.prefetch() if isinstance(sample, SampleFile) else sample for sample in samples]

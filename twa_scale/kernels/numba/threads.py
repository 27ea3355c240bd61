"""A thread pool that splits a loop. Its threads sleep between loops, so that torch's threads can use the cores."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

Work = Callable[[int, int], None]
_MIN_BYTES = 1 << 20  # bytes of a range; for smaller ranges waking a thread takes longer than the work
_RANGES_PER_THREAD = 4  # Several ranges balance the load if a thread is delayed.


class Threads:
    """A pool that uses `torch.get_num_threads()` threads in each call. Ranks divide the cores of a node this way."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._owner = 0

    def run(self, work: Work, count: int, nbytes: int) -> None:
        """Call work(start, stop) for ranges that tile [0, count), in several threads including this one.

        The ranges depend only on the arguments and the number of threads. Any thread may execute a range.

        Args:
            work: the function to call.
            count: the number of indices.
            nbytes: the size of the data of all indices, in bytes.
        """
        threads = torch.get_num_threads()
        num_ranges = min(threads * _RANGES_PER_THREAD, nbytes // _MIN_BYTES, count) if threads > 1 else 1
        if num_ranges <= 1:
            work(0, count)
            return
        ranges = iter([(count * i // num_ranges, count * (i + 1) // num_ranges) for i in range(num_ranges)])

        def work_on_ranges() -> None:
            for start, stop in ranges:  # All threads share one list iterator, whose `next` is atomic.
                work(start, stop)

        futures = [self._executor().submit(work_on_ranges) for _ in range(min(threads, num_ranges) - 1)]
        work_on_ranges()
        for future in futures:
            future.result()

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None or self._owner != os.getpid():  # A forked process does not inherit threads.
            self._pool, self._owner = ThreadPoolExecutor(os.cpu_count() or 1, "twa-scale"), os.getpid()
        return self._pool

"""Threads that share one loop; they sleep in between, so that torch's own have the cores."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

Work = Callable[[int, int], None]
_PIECE = 1 << 20  # bytes below which waking a thread costs more than it brings
_PIECES_PER_THREAD = 4  # a thread that is held up must not hold up all


class Threads:
    """As many as torch.get_num_threads() says at each call: ranks that share a node have told torch their part."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._owner = 0

    def share(self, work: Work, count: int, nbytes: int) -> None:
        """Call work(start, stop) for ranges that tile [0, count), the data of which are `nbytes`.

        The calling thread works too. A range always goes to one call; which thread makes it is left to chance.
        """
        threads = torch.get_num_threads()
        pieces = min(threads * _PIECES_PER_THREAD, nbytes // _PIECE, count) if threads > 1 else 1
        if pieces <= 1:
            work(0, count)
            return
        ranges = iter([(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)])

        def take() -> None:
            for start, stop in ranges:  # one list iterator for all: taking the next is atomic
                work(start, stop)

        helpers = [self._executor().submit(take) for _ in range(min(threads, pieces) - 1)]
        take()
        for helper in helpers:
            helper.result()

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None or self._owner != os.getpid():  # threads do not live on in a forked process
            self._pool, self._owner = ThreadPoolExecutor(os.cpu_count() or 1, "twa-scale"), os.getpid()
        return self._pool

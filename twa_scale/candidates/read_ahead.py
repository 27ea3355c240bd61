"""Read candidates ahead: threads fill one of two buffers while the other one is processed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from twa_scale.base.spans import Span
from twa_scale.base.urls import is_url
from twa_scale.candidates import Candidate
from twa_scale.candidates.formats.remote_file import check_once_at_end
from twa_scale.candidates.part import Part
from twa_scale.kernels import Sources
from twa_scale.kernels.packed_rows import BLOCKS

READ_CHUNK = 1 << 20
READS_IN_FLIGHT = 8
_REMOTE_CHUNK = 8 << 20  # for candidates at URLs, where each request waits for the network
_READ_BYTES = 64 << 20  # bytes of all candidates in one buffer
LINE = 64  # bytes of a cache line; rows are padded to it, because strides of a power of two collide in the cache
_BLOCK = max(BLOCKS.values())  # elements; spans are divided at multiples of it, so that blocks of a store stay whole

Progress = Callable[[int, int], None]
"""Called with the number of bytes that this rank has just read or written, and the total number."""
Job = tuple[Span, Sequence[int]]
"""A span, and the indices of the candidates to read it from."""


def job_bytes(candidates: Sequence[Candidate], jobs: Iterable[Job]) -> int:
    """Return the number of bytes that jobs read."""
    return sum(len(span) * candidates[i].dtype(span.name).itemsize for span, indices in jobs for i in indices)


def are_remote(candidates: Sequence[Candidate]) -> bool:
    """Return whether a candidate is at a URL."""
    return any(is_url(candidate.label) for candidate in candidates)


def largest_read(candidates: Sequence[Candidate], read_chunk: int) -> int:
    """Return the largest number of bytes of one read: `read_chunk`, or more for candidates at URLs."""
    return max(read_chunk, _REMOTE_CHUNK) if are_remote(candidates) else read_chunk


def bytes_per_candidate(n: int, read_chunk: int) -> int:
    """Return the number of bytes of each of n candidates in one buffer."""
    min_bytes = 8 * _BLOCK  # a block of the widest dtype
    return max(min_bytes, min(read_chunk, _READ_BYTES // n) // min_bytes * min_bytes)


class _Slice(NamedTuple):
    """The elements [start, stop) of a span, of some candidates."""

    span: Span
    start: int
    stop: int
    indices: Sequence[int]


class Reader:
    """A reader of exact byte ranges, which reads each byte once.

    Args:
        candidates: the candidates, which have the same tensors.
        total: the number of bytes of all jobs, for `progress`.
        progress: called in the thread that uses the parts.
        read_chunk: the largest number of bytes of one read; less for many candidates, more for those at URLs.
        reads_in_flight: the largest number of candidates to read at the same time.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        total: int = 0,
        progress: Progress | None = None,
        *,
        read_chunk: int = READ_CHUNK,
        reads_in_flight: int = READS_IN_FLIGHT,
    ) -> None:
        self._candidates = candidates
        self._total = total
        self._progress = progress or (lambda *_: None)
        self._read_bytes = bytes_per_candidate(len(candidates), largest_read(candidates, read_chunk))
        self._in_flight = reads_in_flight
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def parts(self, jobs: Iterable[Job]) -> Iterator[Part]:
        """Yield the parts of all jobs, in order.

        Raises:
            CandidateError: a file cannot be read.
        """
        pieces = self._pieces(jobs)
        buffer_index = 0
        with ThreadPoolExecutor(self._in_flight, "twa-scale-read") as pool:
            upcoming = self._start(pool, next(pieces, None), buffer_index)
            while upcoming:
                part, reads = upcoming
                for read in reads:
                    read.result()
                buffer_index = 1 - buffer_index
                upcoming = self._start(pool, next(pieces, None), buffer_index)
                self._progress(sum(source.nbytes for source in part.sources), self._total)
                yield part

    def _pieces(self, jobs: Iterable[Job]) -> Iterator[_Slice]:
        for span, indices in jobs:
            widest = max(self._candidates[i].dtype(span.name).itemsize for i in indices)
            size = self._read_bytes // widest
            start = 0
            while start < len(span):
                stop = min(start + size - (span.start + start) % _BLOCK, len(span))
                yield _Slice(span, start, stop, indices)
                start = stop

    def _start(
        self, pool: ThreadPoolExecutor, piece: _Slice | None, buffer_index: int
    ) -> tuple[Part, list[Future[None]]] | None:
        """Start to read a part into a buffer; each thread reads some candidates."""
        if piece is None:
            return None
        labels = [self._candidates[i].label for i in piece.indices]
        part = Part(piece.span, piece.start, piece.indices, self._views(piece, buffer_index), labels)
        jobs = list(zip([self._candidates[i] for i in piece.indices], part.sources, strict=True))
        shares = [jobs[i :: self._in_flight] for i in range(min(self._in_flight, len(jobs)))]
        return part, [pool.submit(_read_share, share, piece) for share in shares]

    def _views(self, piece: _Slice, buffer_index: int) -> Sources:
        """Return views of a buffer for a part of some candidates."""
        span, start, stop, indices = piece
        dtypes, length = [self._candidates[i].dtype(span.name) for i in indices], stop - start
        pitch = (length * max(dtype.itemsize for dtype in dtypes) // LINE + 2) * LINE
        if self._buffers[buffer_index].numel() < len(indices) * pitch:
            self._buffers[buffer_index] = torch.empty(len(indices) * pitch, dtype=torch.uint8)
        rows = self._buffers[buffer_index][: len(indices) * pitch].view(len(indices), pitch)
        if len(set(dtypes)) == 1:
            return rows.view(dtypes[0])[:, :length]
        return [row[: length * t.itemsize].view(t) for row, t in zip(rows, dtypes, strict=True)]


def _read_share(jobs: Sequence[tuple[Candidate, torch.Tensor]], piece: _Slice) -> None:
    for candidate, values in jobs:
        offset = 0
        with check_once_at_end():
            for start, stop in piece.span.runs(piece.start, piece.stop):
                candidate.read(piece.span.name, start, values[offset : offset + stop - start])
                offset += stop - start

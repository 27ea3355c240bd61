"""The bytes of candidates, read ahead: threads fill one of two buffers while what is in the other is worked on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch

from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.kernels import Sources
from twa_scale.kernels.packed_rows import BLOCKS

READ_CHUNK = 1 << 20
READS_IN_FLIGHT = 8
_READ_BYTES = 64 << 20  # of all candidates together that are read at a time; the next as many are read meanwhile
LINE = 64  # bytes of a cache line, the distance of rows: that of a power of two has all want the same places
_BLOCK = max(BLOCKS.values())  # elements, at multiples of which spans are cut: no block of a packed store is

Progress = Callable[[int, int], None]
"""Called with the bytes that this rank has just read, or written, and with how many it will in all."""
Job = tuple[Span, Sequence[int]]
"""A span, and the indices of the candidates of which it is wanted."""


def job_bytes(candidates: Sequence[Candidate], jobs: Iterable[Job]) -> int:
    """Return how many bytes jobs read."""
    return sum(len(span) * candidates[i].dtype(span.name).itemsize for span, who in jobs for i in who)


def at_once(n: int, read_chunk: int) -> int:
    """Return how many bytes of each of n candidates are read at a time."""
    whole = 8 * _BLOCK  # a block of the widest type
    return max(whole, min(read_chunk, _READ_BYTES // n) // whole * whole)


@dataclass(frozen=True)
class Part:
    """What some candidates hold of a part of a span. The memory is reused: it lasts until the next part."""

    span: Span
    start: int
    """Offset of the part within the span, in elements."""
    who: Sequence[int]
    """Indices of the candidates."""
    sources: Sources
    """Their values: one tensor (n, m) where their types are the same."""

    @property
    def stop(self) -> int:
        """Offset of its end within the span."""
        return self.start + len(self.sources[0])

    def element(self, i: int) -> int:
        """Return where its i-th element stands in the tensor's flattening."""
        return self.span.element(self.start + i)

    def mask(self) -> torch.Tensor | None:
        """Return where all candidates hold the same infinite number, as in a mask: (m,), bool.

        None where nothing is infinite, or something else is not finite.
        """
        first = self.sources[0].to(torch.float64)
        same = torch.isinf(first)
        for source in self.sources[1:]:
            same &= source.to(torch.float64) == first
        finite = all(bool((torch.isfinite(source.to(torch.float64)) | same).all()) for source in self.sources)
        return same if finite and bool(same.any()) else None

    def without(self, where: torch.Tensor) -> "Part":
        """Return the part with zeros at `where`, (m,), bool; in float32, or float64 where it is that already."""
        kept = (source if source.dtype == torch.float64 else source.to(torch.float32) for source in self.sources)
        return replace(self, sources=[source.masked_fill(where, 0) for source in kept])


class _Cut(NamedTuple):
    """Elements [start, stop) of a span, of some candidates."""

    span: Span
    start: int
    stop: int
    who: Sequence[int]


class Reader:
    """Reads by exact ranges; each byte that is asked for, once.

    Args:
        candidates: known to be alike.
        total: bytes of all jobs, as `progress` is told.
        progress: called in the thread that uses the parts.
        read_chunk: most bytes of one read; less where many candidates would need too much memory.
        reads_in_flight: most candidates that are read at the same time.
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
        self._read_bytes = at_once(len(candidates), read_chunk)
        self._in_flight = reads_in_flight
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def parts(self, jobs: Iterable[Job]) -> Iterator[Part]:
        """Yield all of the jobs, in order.

        Raises:
            CandidateError: a file that cannot be read.
        """
        cuts = self._cut(jobs)
        turn = 0
        with ThreadPoolExecutor(self._in_flight, "twa-scale-read") as pool:
            upcoming = self._start(pool, next(cuts, None), turn)
            while upcoming:
                part, reads = upcoming
                for read in reads:
                    read.result()
                turn = 1 - turn
                upcoming = self._start(pool, next(cuts, None), turn)
                self._progress(sum(source.nbytes for source in part.sources), self._total)
                yield part

    def _cut(self, jobs: Iterable[Job]) -> Iterator[_Cut]:
        for span, who in jobs:
            widest = max(self._candidates[i].dtype(span.name).itemsize for i in who)
            size = self._read_bytes // widest
            start = 0
            while start < len(span):
                stop = min(start + size - (span.start + start) % _BLOCK, len(span))
                yield _Cut(span, start, stop, who)
                start = stop

    def _start(self, pool: ThreadPoolExecutor, cut: _Cut | None, turn: int) -> tuple[Part, list[Future[None]]] | None:
        """Have the threads read a part into a buffer, each the bytes of some candidates."""
        if cut is None:
            return None
        part = Part(cut.span, cut.start, cut.who, self._places(cut, turn))
        jobs = list(zip([self._candidates[i] for i in cut.who], part.sources, strict=True))
        shares = [jobs[i :: self._in_flight] for i in range(min(self._in_flight, len(jobs)))]
        return part, [pool.submit(_read_share, share, cut) for share in shares]

    def _places(self, cut: _Cut, turn: int) -> Sources:
        """Return places in a buffer for a part of some candidates."""
        span, start, stop, who = cut
        dtypes, length = [self._candidates[i].dtype(span.name) for i in who], stop - start
        pitch = (length * max(dtype.itemsize for dtype in dtypes) // LINE + 2) * LINE
        if self._buffers[turn].numel() < len(who) * pitch:
            self._buffers[turn] = torch.empty(len(who) * pitch, dtype=torch.uint8)
        places = self._buffers[turn][: len(who) * pitch].view(len(who), pitch)
        if len(set(dtypes)) == 1:
            return places.view(dtypes[0])[:, :length]
        return [place[: length * t.itemsize].view(t) for place, t in zip(places, dtypes, strict=True)]


def _read_share(jobs: Sequence[tuple[Candidate, torch.Tensor]], cut: _Cut) -> None:
    for candidate, values in jobs:
        done = 0
        for start, stop in cut.span.runs(cut.start, cut.stop):
            candidate.read(cut.span.name, start, values[done : done + stop - start])
            done += stop - start


def sum_of(sources: Sources) -> torch.Tensor:
    """Return the sum of the values of candidates of which, for each element, all but one are zero: exactly that one."""
    total = sources[0].to(reduce(torch.promote_types, (source.dtype for source in sources)), copy=True)
    for source in sources[1:]:
        total += source
    return total


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two 1-D tensors hold the same bits, or the same numbers where their types differ."""
    if first.dtype == second.dtype:
        return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    return torch.equal(first.to(torch.float64), second.to(torch.float64))

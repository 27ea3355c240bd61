"""One pass over the candidates: their bytes come by slices, and leave as deltas around the center."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Sources, choose_kernels
from twa_scale.sources import Candidate
from twa_scale.spans import Span

READ_CHUNK = 1 << 20
READS_IN_FLIGHT = 8
_READ_BYTES = 64 << 20  # of all candidates together that are read at a time; the next as many are read meanwhile
_ROW_BYTES = 4 << 20  # float32 deltas of all candidates that are in memory, or rather in a cache, at a time
_LINE = 64  # bytes of a cache line, the distance of rows: that of a power of two has all want the same places

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""
Part = tuple[Span, int, Span]
"""A span, an offset in it, and the elements from there that are read at a time."""


def scratch_bytes(n: int, longest: int, itemsize: int = 4, read_chunk: int = READ_CHUNK) -> int:
    """Return what a pass over n candidates needs when its longest span has `longest` elements of `itemsize` bytes."""
    read = min(_at_once(n, read_chunk), longest * itemsize)
    columns = min(_columns(n), longest)
    return 2 * n * read + columns * 4 * (n + 1) + 8 * 512 * (n + 3)  # two buffers, the rows, a tile in float64


def _at_once(n: int, read_chunk: int) -> int:
    return max(_LINE, min(read_chunk, _READ_BYTES // n) // _LINE * _LINE)


def _columns(n: int) -> int:
    return max(1, _ROW_BYTES // (4 * (n + 1)))


@dataclass(frozen=True)
class Chunk:
    """A part of a span. The tensors are reused: copy what has to outlive the next chunk."""

    span: Span
    start: int
    """Offset of the chunk within the span, in elements."""
    rows: torch.Tensor
    """(n + 1, m), float32 or float64: the deltas w_i - c, then the center c."""

    @property
    def deltas(self) -> torch.Tensor:
        """(n, m)."""
        return self.rows[:-1]

    @property
    def center(self) -> torch.Tensor:
        """(m,)."""
        return self.rows[-1]


class Stream:
    """Reads spans of n candidates and turns them into deltas around sum_i b_i w_i.

    Everything is computed in float32 (float64 where a candidate has float64), relative to the candidate of the largest
    weight: tensors that are equal in all candidates give deltas of exactly zero and a center that has their bits.

    Threads read the next bytes of all candidates, by exact ranges into one of two buffers, while those of the other are
    worked on.

    Args:
        candidates: known to be alike.
        device: where the rows lie.
        progress: called with the bytes that were just read.
        kernels: what computes the rows.
        read_chunk: most bytes of one read; less where many candidates would need too much memory.
        reads_in_flight: most candidates that are read at the same time.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        device: torch.device,
        progress: Progress | None = None,
        *,
        kernels: Kernels | None = None,
        read_chunk: int = READ_CHUNK,
        reads_in_flight: int = READS_IN_FLIGHT,
    ) -> None:
        self._candidates = candidates
        self._device = device
        self._progress = progress or (lambda _: None)
        self._kernels = kernels or choose_kernels("auto", device)
        self._read_bytes = _at_once(len(candidates), read_chunk)
        self._in_flight = reads_in_flight
        self._rows: dict[torch.dtype, torch.Tensor] = {}
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self.checksums: dict[str, torch.Tensor] = {}
        """By tensor name: (n,), int64, of what was read here; sums over spans and ranks are those of whole tensors."""

    def chunks(self, spans: Sequence[Span], weights: Sequence[float]) -> Iterator[Chunk]:
        """Yield spans of floating point tensors, part by part, around the center of `weights` b (sum 1).

        Raises:
            CandidateError: NaN or Inf, or a file that cannot be read.
        """
        step = _columns(len(self._candidates))
        longest = min(step, max((len(span) for span in spans), default=0))
        for (span, offset, piece), sources in self._read(spans, range(len(self._candidates))):
            rows = self._buffer(self._compute_dtype(span.name), longest)
            for start in range(0, len(piece), step):
                part = rows[:, : min(step, len(piece) - start)]
                cut = slice(start, start + step)
                values = _columns_of(sources, cut)
                self._sum(piece.name, range(len(self._candidates)), values)
                self._kernels.center(values, weights, part)
                # What is not finite makes the center so; but finite numbers can have a sum that is too large.
                if not torch.isfinite(part[-1].sum()):
                    self._blame(piece, start, values)
                yield Chunk(span, offset + start, part)

    def copies(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) of the last candidate, bit for bit: for tensors that cannot be averaged."""
        last = len(self._candidates) - 1
        for (span, offset, piece), (values,) in self._read(spans, range(last, last + 1)):
            self._sum(piece.name, range(last, last + 1), [values])
            yield span, offset, values

    def _read(self, spans: Sequence[Span], who: range) -> Iterator[tuple[Part, Sources]]:
        """Yield what some candidates hold of each part, and read the next meanwhile; one thread a candidate."""
        parts = self._parts(spans)
        turn = 0
        with ThreadPoolExecutor(self._in_flight, "twa-scale-read") as pool:
            upcoming = self._start(pool, next(parts, None), who, turn)
            while upcoming:
                part, sources, reads = upcoming
                for read in reads:
                    read.result()
                turn = 1 - turn
                upcoming = self._start(pool, next(parts, None), who, turn)
                self._progress(sum(source.nbytes for source in sources))
                yield part, sources

    def _parts(self, spans: Iterable[Span]) -> Iterator[Part]:
        for span in spans:
            widest = max(candidate.dtype(span.name).itemsize for candidate in self._candidates)
            for offset, piece in span.pieces(max(1, self._read_bytes // widest)):
                yield span, offset, piece

    def _start(
        self, pool: ThreadPoolExecutor, part: Part | None, who: range, turn: int
    ) -> tuple[Part, Sources, list[Future[None]]] | None:
        """Have the threads read a part into a buffer, each the bytes of some candidates."""
        if part is None:
            return None
        piece = part[2]
        sources = self._sources(piece, who, turn)
        jobs = list(zip([self._candidates[i] for i in who], sources, strict=True))
        shares = [jobs[i :: self._in_flight] for i in range(min(self._in_flight, len(jobs)))]
        return part, sources, [pool.submit(_read_share, share, piece) for share in shares]

    def _sources(self, piece: Span, who: range, turn: int) -> Sources:
        """Return places in a buffer for a part of some candidates: one tensor (n, m) where their types are the same."""
        dtypes = [self._candidates[i].dtype(piece.name) for i in who]
        pitch = (len(piece) * max(dtype.itemsize for dtype in dtypes) // _LINE + 2) * _LINE
        if self._buffers[turn].numel() < len(who) * pitch:
            self._buffers[turn] = torch.empty(len(who) * pitch, dtype=torch.uint8)
        places = self._buffers[turn][: len(who) * pitch].view(len(who), pitch)
        if len(set(dtypes)) == 1:
            return places.view(dtypes[0])[:, : len(piece)]
        return [place[: len(piece) * t.itemsize].view(t) for place, t in zip(places, dtypes, strict=True)]

    def _sum(self, name: str, who: range, sources: Sources) -> None:
        sums = self.checksums.setdefault(name, torch.zeros(len(self._candidates), dtype=torch.int64))
        sums[who.start : who.stop] += self._kernels.checksums(sources)

    def _compute_dtype(self, name: str) -> torch.dtype:
        wide = any(candidate.dtype(name) == torch.float64 for candidate in self._candidates)
        return torch.float64 if wide else torch.float32

    def _buffer(self, dtype: torch.dtype, longest: int) -> torch.Tensor:
        rows = self._rows.get(dtype)
        if rows is None or rows.shape[1] < longest:
            stride = (longest // _LINE + 2) * _LINE - _LINE // 2
            rows = torch.empty(len(self._candidates) + 1, stride, dtype=dtype, device=self._device)
            self._rows[dtype] = rows
        return rows

    def _blame(self, piece: Span, start: int, sources: Sources) -> None:
        for candidate, values in zip(self._candidates, sources, strict=True):
            bad = torch.nonzero(~torch.isfinite(values.to(torch.float64)))
            if len(bad):
                raise CandidateError(
                    f"{candidate.label}: tensor {piece.name!r} holds {values[bad[0, 0]].item()} at element "
                    f"{piece.element(start + int(bad[0, 0]))}; weights must be finite. Leave this candidate out."
                )


def _columns_of(sources: Sources, cut: slice) -> Sources:
    return sources[:, cut] if isinstance(sources, torch.Tensor) else [source[cut] for source in sources]


def _read_share(jobs: Sequence[tuple[Candidate, torch.Tensor]], piece: Span) -> None:
    for candidate, values in jobs:
        done = 0
        for start, stop in piece.runs():
            candidate.read(piece.name, start, values[done : done + stop - start])
            done += stop - start

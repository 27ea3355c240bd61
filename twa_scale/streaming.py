"""One pass over the candidates: their bytes come by slices, and leave as deltas around the center."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Sources, choose_kernels
from twa_scale.reading import LINE, READ_CHUNK, READS_IN_FLIGHT, Part, Progress, Reader, at_once
from twa_scale.sources import Candidate
from twa_scale.spans import Span

_ROW_BYTES = 4 << 20  # float32 deltas of all candidates that are in memory, or rather in a cache, at a time
_WHOLE = 2048  # columns: any number of whole tiles


def scratch_bytes(n: int, longest: int, itemsize: int = 4, read_chunk: int = READ_CHUNK) -> int:
    """Return what a pass over n candidates needs when its longest span has `longest` elements of `itemsize` bytes."""
    read = min(at_once(n, read_chunk), longest * itemsize)
    columns = min(_columns(n), longest)
    return 2 * n * read + columns * 4 * (n + 1) + 8 * 512 * (n + 3)  # two buffers, the rows, a tile in float64


def _columns(n: int) -> int:
    columns = _ROW_BYTES // (4 * (n + 1))
    return columns // _WHOLE * _WHOLE or columns


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
        total: bytes that are read in all, as `progress` is told.
        progress: see Reader.
        kernels: what computes the rows.
        read_chunk: most bytes of one read; less where many candidates would need too much memory.
        reads_in_flight: most candidates that are read at the same time.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        device: torch.device,
        *,
        total: int = 0,
        progress: Progress | None = None,
        kernels: Kernels | None = None,
        read_chunk: int = READ_CHUNK,
        reads_in_flight: int = READS_IN_FLIGHT,
    ) -> None:
        self._candidates = candidates
        self._device = device
        self._kernels = kernels or choose_kernels("auto", device)
        self._reader = Reader(candidates, total, progress, read_chunk=read_chunk, reads_in_flight=reads_in_flight)
        self._rows: dict[torch.dtype, torch.Tensor] = {}
        self.checksums: dict[str, torch.Tensor] = {}
        """By tensor name: (n,), int64, of what was read here; sums over spans and ranks are those of whole tensors."""

    def chunks(self, spans: Sequence[Span], weights: Sequence[float]) -> Iterator[Chunk]:
        """Yield spans of floating point tensors, part by part, around the center of `weights` b (sum 1).

        Raises:
            CandidateError: NaN or Inf, or a file that cannot be read.
        """
        step = _columns(len(self._candidates))
        longest = min(step, max((len(span) for span in spans), default=0))
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in spans):
            rows = self._buffer(self._compute_dtype(part.span.name), longest)
            for start in range(0, len(part.piece), step):
                chunk = rows[:, : min(step, len(part.piece) - start)]
                values = _columns_of(part.sources, slice(start, start + step))
                self._sum(part, values)
                self._kernels.center(values, weights, chunk)
                # What is not finite makes the center so; but finite numbers can have a sum that is too large.
                if not torch.isfinite(chunk[-1].sum()):
                    self._blame(part.piece, start, values)
                yield Chunk(part.span, part.start + start, chunk)

    def copies(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) of the last candidate, bit for bit: for tensors that cannot be averaged."""
        last = [len(self._candidates) - 1]
        for part in self._reader.parts((span, last) for span in spans):
            self._sum(part, part.sources)
            yield part.span, part.start, part.sources[0]

    def _sum(self, part: Part, values: Sources) -> None:
        sums = self.checksums.setdefault(part.span.name, torch.zeros(len(self._candidates), dtype=torch.int64))
        sums[list(part.who)] += self._kernels.checksums(values)

    def _compute_dtype(self, name: str) -> torch.dtype:
        wide = any(candidate.dtype(name) == torch.float64 for candidate in self._candidates)
        return torch.float64 if wide else torch.float32

    def _buffer(self, dtype: torch.dtype, longest: int) -> torch.Tensor:
        rows = self._rows.get(dtype)
        if rows is None or rows.shape[1] < longest:
            stride = (longest // LINE + 2) * LINE - LINE // 2
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

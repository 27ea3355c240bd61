"""One pass over the candidates: their bytes come by slices, and leave as deltas around the center."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from twa_scale.errors import CandidateError
from twa_scale.sources import Candidate
from twa_scale.sources.checksum import checksum
from twa_scale.spans import Span

_CHUNK_BYTES = 32 << 20  # float32 bytes of all candidates' rows that are in memory at a time

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""


def chunk_elements(n: int) -> int:
    """Return how many elements of each of n candidates are in memory at a time."""
    return max(1, _CHUNK_BYTES // (4 * (n + 1)))


def scratch_bytes(n: int, longest: int) -> int:
    """Return what a pass over n candidates needs when its longest span has `longest` elements."""
    chunk = min(chunk_elements(n), longest)
    return chunk * (4 * (n + 1) + 8)  # the rows, the bytes as they were read, one row of temporaries


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
    """

    def __init__(self, candidates: Sequence[Candidate], device: torch.device, progress: Progress | None = None) -> None:
        self._candidates = candidates
        self._device = device
        self._progress = progress or (lambda _: None)
        self._chunk = chunk_elements(len(candidates))
        self._rows: dict[torch.dtype, torch.Tensor] = {}
        self._raw = torch.empty(0, dtype=torch.uint8)
        self.checksums: dict[str, torch.Tensor] = {}
        """By tensor name: (n,), int64, of what was read here; sums over spans and ranks are those of whole tensors."""

    def chunks(self, spans: Sequence[Span], weights: Sequence[float]) -> Iterator[Chunk]:
        """Yield spans of floating point tensors, part by part, around the center of `weights` b (sum 1).

        Raises:
            CandidateError: NaN or Inf, or a file that cannot be read.
        """
        longest = min(self._chunk, max((len(span) for span in spans), default=0))
        for span in spans:
            rows = self._buffer(self._compute_dtype(span.name), longest)
            for offset, piece in span.pieces(self._chunk):
                part = rows[:, : len(piece)]
                self._read_all(piece, part[:-1])
                _center(part, weights)
                yield Chunk(span, offset, part)

    def copies(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) of the last candidate, bit for bit: for tensors that cannot be averaged."""
        for span in spans:
            for offset, piece in span.pieces(self._chunk):
                yield span, offset, self._read(piece, len(self._candidates) - 1)

    def _compute_dtype(self, name: str) -> torch.dtype:
        wide = any(candidate.dtype(name) == torch.float64 for candidate in self._candidates)
        return torch.float64 if wide else torch.float32

    def _buffer(self, dtype: torch.dtype, longest: int) -> torch.Tensor:
        rows = self._rows.get(dtype)
        if rows is None or rows.shape[1] < longest:
            rows = torch.empty(len(self._candidates) + 1, longest, dtype=dtype, device=self._device)
            self._rows[dtype] = rows
        return rows

    def _read_all(self, piece: Span, rows: torch.Tensor) -> None:
        for i, row in enumerate(rows):
            row.copy_(self._read(piece, i))
        if not torch.isfinite(rows.sum()):  # one cheap pass; a sum can overflow without a fault in its terms
            self._blame(piece, rows)

    def _read(self, piece: Span, index: int) -> torch.Tensor:
        candidate = self._candidates[index]
        dtype = candidate.dtype(piece.name)
        nbytes = len(piece) * dtype.itemsize
        if self._raw.numel() < nbytes:
            self._raw = torch.empty(nbytes, dtype=torch.uint8)
        values = self._raw[:nbytes].view(dtype)
        done = 0
        for start, stop in piece.runs():
            candidate.read(piece.name, start, values[done : done + stop - start])
            done += stop - start
        sums = self.checksums.setdefault(piece.name, torch.zeros(len(self._candidates), dtype=torch.int64))
        sums[index] += checksum(values)
        self._progress(nbytes)
        return values

    def _blame(self, piece: Span, rows: torch.Tensor) -> None:
        for candidate, row in zip(self._candidates, rows, strict=True):
            bad = torch.nonzero(~torch.isfinite(row))
            if len(bad):
                raise CandidateError(
                    f"{candidate.label}: tensor {piece.name!r} holds {row[bad[0, 0]].item()} at element "
                    f"{piece.element(int(bad[0, 0]))}; weights must be finite. Leave this candidate out."
                )


def _center(rows: torch.Tensor, weights: Sequence[float]) -> None:
    """Turn rows w_1..w_n, _ into w_1 - c, .., w_n - c, c."""
    deltas, center = rows[:-1], rows[-1]
    center.copy_(deltas[max(range(len(weights)), key=lambda i: weights[i])])
    deltas.sub_(center)
    shift = torch.tensor(weights, dtype=rows.dtype, device=rows.device) @ deltas
    deltas.sub_(shift)
    center.add_(shift)

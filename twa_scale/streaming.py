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
    """(n + 1, m), float32: the deltas w_i - c, then the center c."""

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

    Everything is computed relative to the candidate of the largest weight: tensors that are equal in all candidates
    give deltas of exactly zero and a center that is bit for bit the candidates' own.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        weights: Sequence[float],
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self._candidates = candidates
        self._device = device
        self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self._reference = max(range(len(weights)), key=lambda i: weights[i])
        self._progress = progress or (lambda _: None)
        self.chunk = chunk_elements(len(candidates))
        self._rows = torch.empty(0)
        self._raw = torch.empty(0, dtype=torch.uint8)
        self.checksums: dict[str, torch.Tensor] = {}
        """By tensor name: (n,), int64, of what was read here; sums over spans and ranks are those of whole tensors."""

    def chunks(self, spans: Sequence[Span]) -> Iterator[Chunk]:
        """Yield the spans of floating point tensors, part by part.

        Raises:
            CandidateError: NaN or Inf, or a file that cannot be read.
        """
        longest = min(self.chunk, max((len(span) for span in spans), default=0))
        n = len(self._candidates)
        self._rows = torch.empty(n + 1, longest, dtype=torch.float32, device=self._device)
        for span in spans:
            for piece in span.pieces(self.chunk):
                rows = self._rows[:, : len(piece)]
                self._read(piece, rows[:-1])
                self._center(rows)
                yield Chunk(span, piece.start - span.start, rows)

    def _read(self, piece: Span, rows: torch.Tensor) -> None:
        sums = self.checksums.setdefault(piece.name, torch.zeros(len(rows), dtype=torch.int64))
        for i, candidate in enumerate(self._candidates):
            raw = self._buffer(len(piece), candidate.dtype(piece.name))
            candidate.read(piece.name, piece.start, raw)
            sums[i] += checksum(raw)
            rows[i].copy_(raw)
            self._progress(raw.nbytes)
        if not torch.isfinite(rows.sum()):
            self._blame(piece, rows)

    def _buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes = numel * dtype.itemsize
        if self._raw.numel() < nbytes:
            self._raw = torch.empty(nbytes, dtype=torch.uint8)
        return self._raw[:nbytes].view(dtype)

    def _blame(self, piece: Span, rows: torch.Tensor) -> None:
        for candidate, row in zip(self._candidates, rows, strict=True):
            bad = torch.nonzero(~torch.isfinite(row))
            if len(bad):
                raise CandidateError(
                    f"{candidate.label}: tensor {piece.name!r} holds {row[bad[0, 0]].item()} at element "
                    f"{piece.start + int(bad[0, 0])}; weights must be finite. Leave this candidate out."
                )

    def _center(self, rows: torch.Tensor) -> None:
        """Turn rows w_1..w_n, _ into w_1 - c, .., w_n - c, c."""
        deltas, center = rows[:-1], rows[-1]
        center.copy_(deltas[self._reference])
        deltas.sub_(center)
        shift = self._weights @ deltas
        deltas.sub_(shift)
        center.add_(shift)

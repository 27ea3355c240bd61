"""One pass over the candidates: their bytes come by slices, and leave as deltas around the center."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Target
from twa_scale.kernels.deltas import GRID, ROW_BYTES
from twa_scale.reading import READ_CHUNK, READS_IN_FLIGHT, Part, Progress, Reader, at_once
from twa_scale.sources import Candidate
from twa_scale.spans import Span


def scratch_bytes(n: int, longest: int, itemsize: int = 4, read_chunk: int = READ_CHUNK) -> int:
    """Return what a pass over n candidates needs when its longest span has `longest` elements of `itemsize` bytes."""
    read = min(at_once(n, read_chunk), longest * itemsize)
    columns = min(max(ROW_BYTES // 4 // (n + 1), GRID), longest)
    return 2 * n * read + 2 * columns * 4 * (n + 1)  # two buffers; deltas, and what they are made of or their products


class Stream:
    """Reads spans of n candidates and turns them into deltas around sum_i b_i w_i.

    Everything is computed in float32 (float64 where a candidate has float64), relative to the candidate of the largest
    weight: tensors that are equal in all candidates give deltas of exactly zero and a center that has their bits.

    Threads read the next bytes of all candidates, by exact ranges into one of two buffers, while those of the other are
    worked on.

    Args:
        candidates: known to be alike.
        kernels: what makes deltas.
        total: bytes that are read in all, as `progress` is told.
        progress: see Reader.
        read_chunk: most bytes of one read; less where many candidates would need too much memory.
        reads_in_flight: most candidates that are read at the same time.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        kernels: Kernels,
        *,
        total: int = 0,
        progress: Progress | None = None,
        read_chunk: int = READ_CHUNK,
        reads_in_flight: int = READS_IN_FLIGHT,
    ) -> None:
        self._candidates = candidates
        self._kernels = kernels
        self._reader = Reader(candidates, total, progress, read_chunk=read_chunk, reads_in_flight=reads_in_flight)
        self.checksums: dict[str, torch.Tensor] = {}
        """By tensor name: (n,), int64, of what was read here; sums over spans and ranks are those of whole tensors."""

    def make_deltas(self, targets: Mapping[Span, Target], weights: Sequence[float]) -> None:
        """Turn spans of floating point tensors into deltas around the center of `weights` b (sum 1).

        Raises:
            CandidateError: NaN or Inf, numbers that are too large, or a file that cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in targets):
            seen = self._kernels.make_deltas(part.sources, weights, targets[part.span], part.start)
            self._add(part, seen.checksums)
            if not seen.finite:
                raise self._blamed(part)

    def copies(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) of the last candidate, bit for bit: for tensors that cannot be averaged."""
        last = [len(self._candidates) - 1]
        for part in self._reader.parts((span, last) for span in spans):
            self._add(part, self._kernels.checksums(part.sources))
            yield part.span, part.start, part.sources[0]

    def _add(self, part: Part, checksums: torch.Tensor) -> None:
        sums = self.checksums.setdefault(part.span.name, torch.zeros(len(self._candidates), dtype=torch.int64))
        sums[list(part.who)] += checksums

    def _blamed(self, part: Part) -> CandidateError:
        for candidate, values in zip(self._candidates, part.sources, strict=True):
            bad = torch.nonzero(~torch.isfinite(values.to(torch.float64)))
            if len(bad):
                return CandidateError(
                    f"{candidate.label}: tensor {part.span.name!r} holds {values[bad[0, 0]].item()} at element "
                    f"{part.element(int(bad[0, 0]))}; weights must be finite. Leave this candidate out."
                )
        return CandidateError(
            f"tensor {part.span.name!r}: from element {part.element(0)} on, candidates differ by more than their type "
            "can hold. Leave out those that have diverged."
        )

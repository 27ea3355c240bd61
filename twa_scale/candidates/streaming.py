"""One pass over the candidates: their bytes come by slices, and leave as deltas around the center."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.candidates.read_ahead import (
    READ_CHUNK,
    READS_IN_FLIGHT,
    Part,
    Progress,
    Reader,
    at_once,
    same_values,
    sum_of,
)
from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Target
from twa_scale.kernels.torch.deltas import GRID, ROW_BYTES


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
        self.differing: dict[str, int] = {}
        """Tensors that were copied, of which other candidates hold other values: the index of the one that was."""

    def make_deltas(self, targets: Mapping[Span, Target], weights: Sequence[float]) -> None:
        """Turn spans of floating point tensors into deltas around the center of `weights` b (sum 1).

        Raises:
            CandidateError: NaN or Inf, numbers that are too large, or a file that cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in targets):
            target = targets[part.span]
            only_products = target.rows is None and target.center is None and target.products is not None
            before = target.products.clone() if only_products and target.products is not None else None
            seen = self._kernels.make_deltas(part.sources, weights, target, part.start)
            self._add(part, seen.checksums)
            if not seen.finite:
                if before is not None and target.products is not None:
                    target.products.copy_(before)
                self._make_deltas_of_mask(part, weights, target)
            if target.rows is None:
                self._require_fits(part, target.center)

    def _make_deltas_of_mask(self, part: Part, weights: Sequence[float], target: Target) -> None:
        """Keep the infinite numbers that all candidates share, as masks have them; what is trained may hold none."""
        mask = part.mask()
        if mask is None:
            raise self._blamed(part)
        if target.rows is not None or (target.center is not None and target.products is not None):
            i = int(mask.nonzero()[0])
            raise CandidateError(
                f"{self._candidates[0].label}: tensor {part.span.name!r} holds {part.sources[0][i].item()} at element "
                f"{part.element(i)}, as all candidates do; what is trained must be finite. If it is a mask, name it in "
                "`exclude`: then it is kept as it is."
            )
        if not self._kernels.make_deltas(part.without(mask).sources, weights, target, part.start).finite:
            raise self._blamed(part)
        if target.center is not None:
            center = target.center.detach()[part.start : part.stop]
            center[mask.to(center.device)] = part.sources[0][mask].to(center)

    def copies(self, spans: Mapping[Span, int]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) of one candidate, bit for bit: of tensors that are not averaged.

        All candidates are read, to find out whether they differ.

        Args:
            spans: each with the index of the candidate.

        Raises:
            CandidateError: NaN, or a file that cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in spans):
            self._add(part, self._kernels.checksums(part.sources))
            which = spans[part.span]
            chosen = part.sources[which]
            if not all(same_values(chosen, source) for source in part.sources):
                self.differing[part.span.name] = which
            if chosen.is_floating_point() and bool((nan := torch.isnan(chosen)).any()):
                raise self._bad(part, which, nan)
            yield part.span, part.start, chosen

    def sums(self, spans: Iterable[Span]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) of tensors each element of which is zero in all candidates but one.

        Raises:
            CandidateError: NaN or Inf, or a file that cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in spans):
            self._add(part, self._kernels.checksums(part.sources))
            for i, source in enumerate(part.sources):
                if (wrong := ~torch.isfinite(source)).any():
                    raise self._bad(part, i, wrong)
            yield part.span, part.start, sum_of(part.sources)

    def check(self, jobs: Iterable[tuple[Span, Sequence[int]]]) -> None:
        """Read spans of some candidates for their checksums alone."""
        for part in self._reader.parts(jobs):
            self._add(part, self._kernels.checksums(part.sources))

    def _add(self, part: Part, checksums: torch.Tensor) -> None:
        sums = self.checksums.setdefault(part.span.name, torch.zeros(len(self._candidates), dtype=torch.int64))
        sums[list(part.who)] += checksums

    def _require_fits(self, part: Part, live: torch.Tensor | None) -> None:
        """Refuse an average that is too large for the type of the model."""
        if live is None or live.dtype.itemsize >= 4:
            return
        values = live.detach()[part.start : part.stop]
        wrong = ~torch.isfinite(values).cpu() & torch.isfinite(part.sources[0].float())
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0, 0])
            raise CandidateError(
                f"{self._candidates[0].label}: tensor {part.span.name!r} holds {part.sources[0][i].item():g} at "
                f"element {part.element(i)}; the average is too large for the model's {values.dtype}, which ends at "
                f"{torch.finfo(values.dtype).max:g}. Use a model of a wider type."
            )

    def _blamed(self, part: Part) -> CandidateError:
        for i, values in enumerate(part.sources):
            wrong = ~torch.isfinite(values.to(torch.float64))
            if wrong.any():
                return self._bad(part, i, wrong)
        return CandidateError(
            f"tensor {part.span.name!r}: from element {part.element(0)} on, candidates differ by more than their type "
            "can hold. Leave out those that have diverged."
        )

    def _bad(self, part: Part, i: int, wrong: torch.Tensor) -> CandidateError:
        at = int(wrong.nonzero()[0, 0])
        return CandidateError(
            f"{self._candidates[i].label}: tensor {part.span.name!r} holds {part.sources[i][at].item()} at element "
            f"{part.element(at)}; weights must be finite. Leave this candidate out."
        )

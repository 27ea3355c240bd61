"""Read the candidates once, in parts, and compute deltas around the center."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.candidates.part import Part
from twa_scale.candidates.read_ahead import (
    READ_CHUNK,
    READS_IN_FLIGHT,
    Progress,
    Reader,
    bytes_per_candidate,
)
from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Target
from twa_scale.kernels.torch.deltas import GRID, ROW_BYTES


def scratch_bytes(n: int, longest: int, itemsize: int = 4, read_chunk: int = READ_CHUNK, *, received: int = 0) -> int:
    """Return the bytes of memory for reading n candidates.

    Args:
        n: the number of candidates.
        longest: the number of elements of the longest span.
        itemsize: the bytes of an element.
        read_chunk: the largest number of bytes of one read.
        received: the largest number of reads whose bytes are also held by another library, as for URLs.
    """
    read = min(bytes_per_candidate(n, read_chunk), longest * itemsize)
    columns = min(max(ROW_BYTES // 4 // (n + 1), GRID), longest)
    buffers, deltas = 2 * n * read, 2 * columns * 4 * (n + 1)  # two buffers; deltas, and their inputs or products
    return buffers + deltas + min(received, n) * read


class Stream:
    """A reader of spans of n candidates, which computes deltas around sum_i b_i w_i.

    The computation is in float32 (float64 if a candidate has float64), relative to the candidate with the largest
    weight. A tensor that is equal in all candidates has deltas of exactly zero and a center with the same bits.

    Threads read exact byte ranges of all candidates into one of two buffers, while the other one is processed.

    Args:
        candidates: the candidates, which have the same tensors.
        kernels: compute the deltas.
        total: the number of bytes to read, for `progress`.
        progress: see `Reader`.
        read_chunk: the largest number of bytes of one read; less for many candidates.
        reads_in_flight: the largest number of candidates to read at the same time.
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
        """The checksums of the spans that were read, (n,) int64, by tensor name. They add up over spans and ranks."""
        self.differing: dict[str, int] = {}
        """Copied tensors that differ between candidates, with the index of the candidate they were copied from."""

    def make_deltas(self, targets: Mapping[Span, Target], weights: Sequence[float]) -> None:
        """Write the deltas of floating point spans around the center of `weights` b into their targets.

        Args:
            targets: the spans to read, and where to write their deltas, center and products.
            weights: the weights of the center, n numbers with sum 1.

        Raises:
            CandidateError: a value is not finite or too large, or a file cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in targets):
            target = targets[part.span]
            only_products = target.rows is None and target.center is None and target.products is not None
            before = target.products.clone() if only_products and target.products is not None else None
            checks = self._kernels.make_deltas(part.sources, weights, target, part.start)
            self._add(part, checks.checksums)
            if not checks.finite:
                if before is not None and target.products is not None:
                    target.products.copy_(before)
                self._make_deltas_of_mask(part, weights, target)
            if target.rows is None:
                self._require_fits(part, target.center)

    def _make_deltas_of_mask(self, part: Part, weights: Sequence[float], target: Target) -> None:
        """Write a part with infinite values: they are kept if all candidates have the same, as in a mask.

        Raises:
            CandidateError: a value is NaN, differs between candidates, or belongs to a trained tensor.
        """
        mask = part.mask()
        if mask is None:
            raise part.failure()
        if target.rows is not None or (target.center is not None and target.products is not None):
            i = int(mask.nonzero()[0])
            raise CandidateError(
                f"{self._candidates[0].label}: tensor {part.span.name!r} holds {part.sources[0][i].item()} at element "
                f"{part.element(i)}, as do all candidates; trained tensors must be finite. If it is a mask, name it in "
                "`exclude`, and its values are kept."
            )
        if not self._kernels.make_deltas(part.without(mask).sources, weights, target, part.start).finite:
            raise part.failure()
        if target.center is not None:
            center = target.center.detach()[part.start : part.stop]
            center[mask.to(center.device)] = part.sources[0][mask].to(center)

    def copies(self, spans: Mapping[Span, int]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) with the exact values of one candidate, for tensors that are not averaged.

        All candidates are read, to find tensors that differ.

        Args:
            spans: the index of the candidate for each span.

        Raises:
            CandidateError: a value is NaN, or a file cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in spans):
            self._add(part, self._kernels.checksums(part.sources))
            which = spans[part.span]
            chosen, is_same_in_all = part.copied(which)
            if not is_same_in_all:
                self.differing[part.span.name] = which
            yield part.span, part.start, chosen

    def sums(self, spans: Iterable[Span]) -> Iterator[tuple[Span, int, torch.Tensor]]:
        """Yield (span, offset, values) with the sum of all candidates.

        Args:
            spans: spans of tensors whose elements are nonzero in at most one candidate.

        Raises:
            CandidateError: a value is not finite, or a file cannot be read.
        """
        everyone = range(len(self._candidates))
        for part in self._reader.parts((span, everyone) for span in spans):
            self._add(part, self._kernels.checksums(part.sources))
            yield part.span, part.start, part.total()

    def check(self, jobs: Iterable[tuple[Span, Sequence[int]]]) -> None:
        """Read spans of some candidates for their checksums only."""
        for part in self._reader.parts(jobs):
            self._add(part, self._kernels.checksums(part.sources))

    def _add(self, part: Part, checksums: torch.Tensor) -> None:
        sums = self.checksums.setdefault(part.span.name, torch.zeros(len(self._candidates), dtype=torch.int64))
        sums[list(part.indices)] += checksums

    def _require_fits(self, part: Part, live: torch.Tensor | None) -> None:
        """Check that an average is not too large for the dtype of the model.

        Raises:
            CandidateError: names the tensor and an element.
        """
        if live is None or live.dtype.itemsize >= 4:
            return
        values = live.detach()[part.start : part.stop]
        wrong = ~torch.isfinite(values).cpu() & torch.isfinite(part.sources[0].float())
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0, 0])
            raise CandidateError(
                f"{self._candidates[0].label}: tensor {part.span.name!r} holds {part.sources[0][i].item():g} at "
                f"element {part.element(i)}; the average is too large for the model's {values.dtype}, whose largest "
                f"value is {torch.finfo(values.dtype).max:g}. Use a model of a wider type."
            )

"""A part of a tensor with the values of the candidates, and the checks that these are numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import CandidateError
from twa_scale.kernels import Sources


@dataclass(frozen=True)
class Part:
    """A part of a span with the values of some candidates, which are valid until the next part is read."""

    span: Span
    start: int
    """The offset of the part within the span, in elements."""
    indices: Sequence[int]
    """The indices of the candidates."""
    sources: Sources
    """Their values: one tensor (n, m) if their dtypes are the same."""
    labels: Sequence[str]
    """Their labels."""

    @property
    def stop(self) -> int:
        """The offset of the end of the part within the span, in elements."""
        return self.start + len(self.sources[0])

    def element(self, i: int) -> int:
        """Return the index of the i-th element in the flattened tensor."""
        return self.span.element(self.start + i)

    def copied(self, i: int) -> tuple[torch.Tensor, bool]:
        """Return the values of source `i`, and whether all sources have them.

        Raises:
            CandidateError: a value is NaN.
        """
        chosen = self.sources[i]
        if chosen.is_floating_point() and bool((nan := torch.isnan(chosen)).any()):
            raise self._not_finite(i, nan)
        return chosen, all(_same_values(chosen, source) for source in self.sources)

    def total(self) -> torch.Tensor:
        """Return the sum of the sources, of which at most one is nonzero at each element, so that the sum is exact.

        Raises:
            CandidateError: a value is not finite.
        """
        for i, source in enumerate(self.sources):
            if (wrong := ~torch.isfinite(source)).any():
                raise self._not_finite(i, wrong)
        total = self.sources[0].to(reduce(torch.promote_types, (source.dtype for source in self.sources)), copy=True)
        for source in self.sources[1:]:
            total += source
        return total

    def failure(self) -> CandidateError:
        """Return the error for a part whose combination is not finite: a value is not, or the combination overflows."""
        for i, source in enumerate(self.sources):
            wrong = ~torch.isfinite(source.to(torch.float64))
            if wrong.any():
                return self._not_finite(i, wrong)
        return CandidateError(
            f"tensor {self.span.name!r}: from element {self.element(0)} on, candidates differ by more than their type "
            "can hold. Leave out those that have diverged, or choose smaller weights."
        )

    def mask(self) -> torch.Tensor | None:
        """Return where all candidates have the same infinite value, as in a mask: (m,), bool.

        Return None if no value is infinite, or if another value is not finite.
        """
        first = self.sources[0].to(torch.float64)
        same = torch.isinf(first)
        for source in self.sources[1:]:
            same &= source.to(torch.float64) == first
        finite = all(bool((torch.isfinite(source.to(torch.float64)) | same).all()) for source in self.sources)
        return same if finite and bool(same.any()) else None

    def without(self, mask: torch.Tensor) -> "Part":
        """Return the part with zeros at `mask`, (m,) bool, in float32 or, for float64 sources, in float64."""
        kept = (source if source.dtype == torch.float64 else source.to(torch.float32) for source in self.sources)
        return replace(self, sources=[source.masked_fill(mask, 0) for source in kept])

    def _not_finite(self, i: int, wrong: torch.Tensor) -> CandidateError:
        """Return the error that names the first element of source `i` for which `wrong`, (m,) bool, is true."""
        index = int(wrong.nonzero()[0, 0])
        in_all = len(self.sources) > 1 and not any(
            bool(torch.isfinite(source[index].double())) for source in self.sources
        )
        fix = (
            "No candidate has a number there: leave the tensor out, with `ignore` (--ignore)"
            if in_all
            else "Leave this candidate out"
        )
        return CandidateError(
            f"{self.labels[i]}: tensor {self.span.name!r} holds {self.sources[i][index].item()} at element "
            f"{self.element(index)}; weights must be finite. {fix}."
        )


def _same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two 1-D tensors have the same bits or, if their dtypes differ, the same values."""
    if first.dtype == second.dtype:
        return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    return torch.equal(first.to(torch.float64), second.to(torch.float64))

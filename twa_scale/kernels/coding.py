"""What the rows of a packed store stand for: deltas, or what each candidate adds to one that was coded before it.

A row that is relative to an earlier candidate starts from what the codes made of that one. So the error of one row is
part of the next difference, and errors do not add up along a trajectory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

CENTER = -1
"""In place of a candidate: the row is relative to the center."""


@dataclass(frozen=True)
class Coding:
    """Row i is w_i less what `before[i]` was reconstructed as: an earlier candidate, or the center."""

    before: tuple[int, ...]

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Candidates that can be coded at the same time, after those of the levels before."""
        return tuple(self._levels())

    def _levels(self) -> Iterator[tuple[int, ...]]:
        last = {CENTER}
        while level := tuple(i for i, before in enumerate(self.before) if before in last):
            yield level
            last = set(level)

    @cached_property
    def relative_to_center(self) -> bool:
        """Whether all rows are deltas."""
        return all(before == CENTER for before in self.before)

    @cached_property
    def _sums(self) -> torch.Tensor:
        """Return (n, n): which rows, 1 or 0, add up to the delta of each candidate."""
        sums = torch.eye(len(self.before), dtype=torch.float64)
        for i in (i for level in self.levels for i in level):
            if self.before[i] != CENTER:
                sums[i] += sums[self.before[i]]
        return sums

    def weights_of_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Return what rows have to be multiplied by for deltas to be by `weights`, (n, ..), float64."""
        return weights if self.relative_to_center else torch.tensordot(self._sums.T.to(weights), weights, 1)

    def products_of_deltas(self, products: torch.Tensor) -> torch.Tensor:
        """Return products with deltas of those with rows, (n, ..), float64."""
        return products if self.relative_to_center else torch.tensordot(self._sums.to(products), products, 1)


def of_deltas(n: int) -> Coding:
    """Return the coding in which each of n rows is a delta: w_i less the center."""
    return Coding((CENTER,) * n)


def of_increments(center_weights: Sequence[float]) -> Coding:
    """Return the coding in which rows are the differences of neighbours in a trajectory.

    It begins with the candidate whose place is that of the center, the mean place by `center_weights`, which is near to
    it, and goes from there to both ends.
    """
    n = len(center_weights)
    first = min(max(round(sum(i * weight for i, weight in enumerate(center_weights))), 0), n - 1)
    return Coding(tuple(CENTER if i == first else i - 1 if i > first else i + 1 for i in range(n)))

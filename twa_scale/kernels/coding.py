"""What the rows of a packed store stand for: deltas, or what each candidate adds to one that was coded before it.

A row that is relative to an earlier candidate starts from what the codes made of that one. So the error of one row is
part of the next difference, and errors do not add up along a trajectory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

CENTER = -1
"""In place of a candidate: the row is relative to the center."""


class RowMap(Protocol):
    """How the rows of a store, and the float32 base beside them, make the n deltas and the center."""

    @property
    def num_rows(self) -> int:
        """Number of rows of the store, which need not be n."""

    @property
    def relative_to_center(self) -> bool:
        """Whether all rows are deltas."""

    def row_weights(self, u: torch.Tensor) -> torch.Tensor:
        """Return the factors of the rows and, last, of the base that give c + sum_i u_i delta_i + u_c c.

        Args:
            u: (n + 1, G), float64: the weights of the deltas, then u_c.

        Returns:
            (num_rows + 1, G), float64.
        """

    def delta_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return inner products with the deltas and the center, (n + 1, G), of those with the rows and the base."""


@dataclass(frozen=True)
class Coding:
    """Row i is w_i less what `before[i]` was reconstructed as: an earlier candidate, or the center."""

    before: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """One row for each candidate."""
        return len(self.before)

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

    def row_weights(self, u: torch.Tensor) -> torch.Tensor:
        """Return factors of rows and base: the base is the center."""
        return torch.cat([self.weights_of_rows(u[:-1]), 1 + u[-1:]])

    def delta_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return products with deltas and center of those with rows and base."""
        return torch.cat([self.products_of_deltas(products[:-1]), products[-1:]])


@dataclass(frozen=True)
class Trajectory:
    """Rows are what each candidate adds to the one before it, and the base is the first candidate.

    Candidate i is the base and the sum of the rows `order[:i]`. Other rows take no part.
    """

    order: tuple[int, ...]
    """The row of each candidate but the first, in training order."""
    num_rows: int
    """Number of rows of the store."""
    center_weights: tuple[float, ...]
    """b, (n,), of sum 1."""
    relative_to_center: bool = field(default=False, init=False)

    @cached_property
    def _sums(self) -> torch.Tensor:
        """Return (n, num_rows): which rows, 1 or 0, add up to what each candidate is more than the base."""
        sums = torch.zeros(len(self.order) + 1, self.num_rows, dtype=torch.float64)
        for i, row in enumerate(self.order):
            sums[i + 1 :, row] = 1
        return sums

    def of_candidates(self, a: torch.Tensor) -> torch.Tensor:
        """Return the factors of rows and base, (num_rows + 1, G), of sum_i a_i w_i for a (n, G)."""
        return torch.cat([self._sums.T.to(a) @ a, a.sum(0, keepdim=True)])

    def row_weights(self, u: torch.Tensor) -> torch.Tensor:
        """Return factors of rows and base: those of the candidates, a_i = u_i + (1 + u_c - sum_j u_j) b_i, added up."""
        b = torch.tensor(self.center_weights, dtype=torch.float64).to(u)[:, None]
        return self.of_candidates(u[:-1] + (1 + u[-1] - u[:-1].sum(0)) * b)

    def delta_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return products with deltas and center of those with rows and base."""
        beyond = self._sums.to(products) @ products[:-1]
        center = torch.tensor(self.center_weights, dtype=torch.float64).to(products) @ beyond
        return torch.cat([beyond - center, products[-1:] + center])


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

"""The coding of packed rows: deltas, or differences of a candidate and another one that was coded before it.

A difference is taken from the reconstruction of the earlier candidate, as in predictive coding. The next row therefore
corrects the rounding error of the row before, and errors do not accumulate along a trajectory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

CENTER = -1
"""The index that stands for the center in `Coding.before`."""


class RowMap(Protocol):
    """The linear map from the rows of a store and its float32 base to the n deltas and the center."""

    @property
    def num_rows(self) -> int:
        """The number of rows of the store, which may differ from n."""

    @property
    def relative_to_center(self) -> bool:
        """Whether all rows are deltas."""

    def row_weights(self, u: torch.Tensor) -> torch.Tensor:
        """Return weights of the rows and, last, of the base, whose weighted sum is c + sum_i u_i delta_i + u_c c.

        Args:
            u: the weights of the deltas, then u_c, (n + 1, G), float64.

        Returns:
            (num_rows + 1, G), float64.
        """

    def delta_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return the inner products of a vector with the deltas and the center.

        Args:
            products: its inner products with the rows and the base, (num_rows + 1, G), float64.

        Returns:
            (n + 1, G), float64.
        """


@dataclass(frozen=True)
class Coding:
    """A coding in which row i is w_i minus the reconstruction of another candidate, or minus the center."""

    before: tuple[int, ...]
    """For each row the candidate that is subtracted, or `CENTER`."""

    @property
    def num_rows(self) -> int:
        """The number of rows, one for each candidate."""
        return len(self.before)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The candidates of each step of the coding. Those of one level depend only on the level before."""
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
        """The matrix, (n, n), of ones and zeros that maps rows to deltas."""
        sums = torch.eye(len(self.before), dtype=torch.float64)
        for i in (i for level in self.levels for i in level):
            if self.before[i] != CENTER:
                sums[i] += sums[self.before[i]]
        return sums

    def weights_of_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weights of the rows for which their weighted sum equals that of the deltas, (n, ..), float64."""
        return weights if self.relative_to_center else torch.tensordot(self._sums.T.to(weights), weights, 1)

    def products_of_deltas(self, products: torch.Tensor) -> torch.Tensor:
        """Return inner products with the deltas, given those with the rows, (n, ..), float64."""
        return products if self.relative_to_center else torch.tensordot(self._sums.to(products), products, 1)

    def row_weights(self, u: torch.Tensor) -> torch.Tensor:
        """Return weights of the rows and the base. The base is the center."""
        return torch.cat([self.weights_of_rows(u[:-1]), 1 + u[-1:]])

    def delta_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return inner products with the deltas and the center, given those with the rows and the base."""
        return torch.cat([self.products_of_deltas(products[:-1]), products[-1:]])


@dataclass(frozen=True)
class Trajectory:
    """A map of rows that are differences of consecutive candidates. The base is the first candidate.

    Candidate i is the base plus the sum of the rows `order[:i]`. Other rows are not used.
    """

    order: tuple[int, ...]
    """The row of each candidate except for the first, in training order."""
    num_rows: int
    """The number of rows of the store."""
    center_weights: tuple[float, ...]
    """The weights b of the candidates in the center, n numbers with sum 1."""
    relative_to_center: bool = field(default=False, init=False)

    @cached_property
    def _sums(self) -> torch.Tensor:
        """The matrix, (n, num_rows), of ones and zeros that maps rows to candidates minus the base."""
        sums = torch.zeros(len(self.order) + 1, self.num_rows, dtype=torch.float64)
        for i, row in enumerate(self.order):
            sums[i + 1 :, row] = 1
        return sums

    def of_candidates(self, a: torch.Tensor) -> torch.Tensor:
        """Return weights of the rows and the base, (num_rows + 1, G), of sum_i a_i w_i, for `a` of shape (n, G)."""
        return torch.cat([self._sums.T.to(a) @ a, a.sum(0, keepdim=True)])

    def row_weights(self, u: torch.Tensor) -> torch.Tensor:
        """Return weights of the rows and the base, from the coefficients a_i = u_i + (1 + u_c - sum_j u_j) b_i."""
        b = torch.tensor(self.center_weights, dtype=torch.float64).to(u)[:, None]
        return self.of_candidates(u[:-1] + (1 + u[-1] - u[:-1].sum(0)) * b)

    def delta_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return inner products with the deltas and the center, given those with the rows and the base."""
        beyond = self._sums.to(products) @ products[:-1]
        center = torch.tensor(self.center_weights, dtype=torch.float64).to(products) @ beyond
        return torch.cat([beyond - center, products[-1:] + center])


def of_deltas(n: int) -> Coding:
    """Return the coding in which each of n rows is a delta w_i - c."""
    return Coding((CENTER,) * n)


def of_increments(center_weights: Sequence[float]) -> Coding:
    """Return the coding in which rows are differences of neighbors in a trajectory.

    The first coded candidate is the one at the mean index under `center_weights`, which is close to the center. Its row
    is relative to the center. From there the coding proceeds to both ends.

    Args:
        center_weights: the weights b of the candidates in the center.
    """
    n = len(center_weights)
    first = min(max(round(sum(i * weight for i, weight in enumerate(center_weights))), 0), n - 1)
    return Coding(tuple(CENTER if i == first else i - 1 if i > first else i + 1 for i in range(n)))

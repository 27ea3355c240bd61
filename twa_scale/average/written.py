"""The trained coefficients, and the weights in the model that belong to them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from twa_scale.average.basis import Basis
from twa_scale.average.overflow import WeightLimits
from twa_scale.average.rows import RowCorrections
from twa_scale.average.swap import SwappedWeights
from twa_scale.average.weights import Weights
from twa_scale.base.spans import Span
from twa_scale.errors import RankError, TwaError


class SavedCoefficients(NamedTuple):
    """Copies of the coefficients x, (k, G), and of the corrections of this rank's rows, (k, R)."""

    x: torch.Tensor
    rows: torch.Tensor | None


class WrittenCoefficients:
    """Coefficients whose weights are in the model. New ones are refused if their weights are not finite.

    Args:
        x: the coefficients, (k, G), float64.
        rows: the corrections of rows, if there are any.
        basis: maps x to u.
        weights: writes the weights.
        limits: checks that they are finite.
        swapped: the weights that are shown instead of the trained ones.
        spans: the trained spans of this rank.
        postpone: whether writes of weights can be deferred to their next use.
    """

    def __init__(
        self,
        x: nn.Parameter,
        rows: RowCorrections | None,
        basis: Basis,
        weights: Weights,
        limits: WeightLimits,
        swapped: SwappedWeights,
        spans: Iterable[Span],
        *,
        postpone: bool,
    ) -> None:
        self.x = x
        self.rows = rows
        self._basis = basis
        self._weights = weights
        self._limits = limits
        self._swapped = swapped
        self._spans = spans
        self._postpone = postpone

    def write_first(self) -> None:
        """Write the weights of the coefficients at the start. Collective.

        Raises:
            TwaError: they are not finite.
        """
        self._limits.require_coefficients(self.x)
        self.write()
        self._limits.require_weights(self._spans)

    def saved(self) -> SavedCoefficients:
        """Return copies of the coefficients, for `confirm`."""
        return SavedCoefficients(
            self.x.detach().clone(), None if self.rows is None else self.rows.values.detach().clone()
        )

    def set(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Replace the coefficients and write the weights; if these are not finite, restore both and raise. Collective.

        Args:
            x: (k, G).
            rows: the corrections of this rank's rows, (k, R); by default zero.
        """
        before = self.saved()
        self._restore(SavedCoefficients(x, rows))
        self.confirm(before)

    def confirm(self, before: SavedCoefficients) -> None:
        """Write the weights of new coefficients; if these are not finite, restore those `before` and raise. Collective.

        Raises:
            TwaError: the weights are not finite.
        """
        try:
            self._limits.require_coefficients(self.x)
            self._weights.count_write()
            self.write(postpone=self._postpone)
            self._limits.require_weights(self._spans)
        except RankError:  # another write would wait for the same rank
            raise
        except TwaError:
            self._restore(before)
            self.write()
            raise

    def write(self, *, postpone: bool = False) -> None:
        """Write the current weights. With `postpone`, defer writes to the next forward pass if possible. Collective."""
        self._weights.write(self.current, postpone=postpone)

    def current(self) -> tuple[torch.Tensor, RowCorrections | None]:
        """Return u, (n + 1, G), and the corrections of rows of the current weights."""
        coefficients = self._swapped.now
        return (
            (self._basis.expand(self.x), self.rows)
            if coefficients is None
            else (self._basis.weights_of(coefficients), None)
        )

    def gradient(self, products: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x, (k, G), for that of u: the inner products of deltas and gradient, (n + 1, G)."""
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._basis.expand(self.x), self.x, products)
        return gradient

    @torch.no_grad()
    def _restore(self, saved: SavedCoefficients) -> None:
        self.x.copy_(saved.x)
        if self.rows is not None:
            self.rows.set(saved.rows)

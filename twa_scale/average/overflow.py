"""Weights that their types can hold: found out from norms, and by looking at the weights where these do not tell."""

from collections.abc import Iterable

import torch

from twa_scale.average.basis import Basis
from twa_scale.average.layout import Layout
from twa_scale.average.weights import Weights
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.errors import TwaError
from twa_scale.ranks import Group

_FIX = "Lower optimizer.lr, set max_grad_norm, or use a wider type."
_STRETCH = 4  # deltas in a store of few bits are longer than the exact ones, by less than this
_FULL = 0.99  # of what a type holds, so that rounding to it stays below


class WeightLimits:
    """Refuses coefficients whose weights are not finite.

    Two bounds rule that out without looking at weights, by group: no weight exceeds
    |1 + u_c| ||c|| + sum_i |u_i| ||delta_i||; and none exceeds the largest of those that were looked at last, at u', by
    more than |u_c - u_c'| ||c|| + sum_i |u_i - u_i'| ||delta_i||. The norms of large models exceed what float16 holds,
    though no weight does: then weights are read once, and again when the coefficients are far from where they were.
    """

    def __init__(self, engine: Engine, weights: Weights, layout: Layout, basis: Basis, group: Group) -> None:
        self._engine = engine
        self._weights = weights
        self._layout = layout
        self._basis = basis
        self._group = group
        limits = torch.full((len(layout.groups),), torch.finfo(torch.float32).max, dtype=torch.float64)
        for name, column in layout.group_of.items():
            limits[column] = min(float(limits[column]), torch.finfo(engine.parameters[name].dtype).max)
        self._limits = limits
        self._norms = basis.gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().T.cpu() * _STRETCH
        self._read_at = torch.zeros_like(self._norms)
        self._read_at[-1] = -1.0
        """u where weights were read last. Before, where all are zero."""
        self._largest = torch.zeros_like(limits)
        """The largest weight there by group, as a part of what its type holds."""

    def require_coefficients(self, x: torch.Tensor) -> None:
        """Refuse coefficients that float32, in which weights are computed, cannot hold. The same on every rank.

        Raises:
            TwaError: names the fix.
        """
        u = self._basis.expand(x.detach())
        if not bool(torch.isfinite(u.abs().sum(0).to(torch.float32)).all()):
            raise TwaError(f"with these coefficients the weights are not finite in torch.float32. {_FIX}")

    def require_weights(self, x: torch.Tensor, spans: Iterable[Span]) -> None:
        """Refuse live weights that are not finite. Collective where the bounds do not rule it out.

        Raises:
            TwaError: names the tensor and the fix, on every rank.
        """
        u = self._basis.expand(x.detach()).cpu()
        if self._ruled_out(u):
            return
        self._weights.settle()
        largest = torch.zeros_like(self._largest)
        with self._group.agree():
            for span in spans:
                column = self._layout.group_of[span.name]
                largest[column] = max(float(largest[column]), self._part(span))
        self._largest = torch.stack(self._group.gather(largest)).amax(0)
        self._read_at = u

    def _ruled_out(self, u: torch.Tensor) -> bool:
        moved = ((u - self._read_at).abs() * self._norms).sum(0)
        return bool((self._largest + moved / self._limits < _FULL).all())

    def _part(self, span: Span) -> float:
        """Return the largest weight of a span, as a part of what its type holds.

        Raises:
            TwaError: one that is not finite.
        """
        dtype = self._engine.parameters[span.name].dtype
        live = self._engine.live(span)
        if not len(live):
            return 0.0
        low, high = torch.aminmax(live.to(dtype))
        largest = float(torch.maximum(-low, high))
        end = torch.finfo(dtype).max
        if not largest <= end:  # nor NaN
            raise TwaError(
                f"tensor {span.name!r}: with these coefficients its weights are not finite in {dtype}, which ends at "
                f"{end:g}. {_FIX}"
            )
        return largest / end

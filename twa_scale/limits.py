"""Weights that their types can hold: found out from norms, and by looking at the weights where these do not tell."""

from collections.abc import Iterable

import torch

from twa_scale.basis import Basis
from twa_scale.engines import Engine
from twa_scale.errors import TwaError
from twa_scale.layout import Layout
from twa_scale.ranks import Group
from twa_scale.spans import Span
from twa_scale.weights import Weights

_FIX = "Lower optimizer.lr, set max_grad_norm, or use a wider type."


class WeightLimits:
    """Refuses coefficients whose weights are not finite.

    No weight of a group exceeds |1 + u_c| ||c|| + sum_i |u_i| ||delta_i||: weights are read only where that is large.
    """

    def __init__(self, engine: Engine, weights: Weights, layout: Layout, basis: Basis, group: Group) -> None:
        self._engine = engine
        self._weights = weights
        self._basis = basis
        self._group = group
        limits = torch.full((len(layout.groups),), torch.finfo(torch.float32).max, dtype=torch.float64)
        for name, column in layout.group_of.items():
            limits[column] = min(float(limits[column]), torch.finfo(engine.parameters[name].dtype).max)
        self._limits = limits / 4  # deltas in a store of few bits are longer than the exact ones

    def require_coefficients(self, x: torch.Tensor) -> None:
        """Refuse coefficients that float32, in which weights are computed, cannot hold. The same on every rank.

        Raises:
            TwaError: names the fix.
        """
        u = self._basis.expand(x.detach())
        if not bool(torch.isfinite(u.abs().sum(0).to(torch.float32)).all()):
            raise TwaError(f"with these coefficients the weights are not finite in torch.float32. {_FIX}")

    def require_weights(self, x: torch.Tensor, spans: Iterable[Span]) -> None:
        """Refuse live weights that are not finite. Collective where the norms do not rule it out.

        Raises:
            TwaError: names the tensor and the fix, on every rank.
        """
        u = self._basis.expand(x.detach())
        norms = self._basis.gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().T
        bound = (torch.cat([u[:-1], 1 + u[-1:]]).abs() * norms).sum(0)
        if bool((bound.cpu() < self._limits).all()):
            return
        self._weights.settle()
        with self._group.agree():
            for span in spans:
                dtype = self._engine.parameters[span.name].dtype
                if not bool(torch.isfinite(self._engine.live(span).to(dtype)).all()):
                    raise TwaError(
                        f"tensor {span.name!r}: with these coefficients its weights are not finite in {dtype}, which "
                        f"ends at {torch.finfo(dtype).max:g}. {_FIX}"
                    )

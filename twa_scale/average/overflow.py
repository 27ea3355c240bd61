"""Check that weights are finite in their dtypes: from norms where possible, otherwise by reading the weights."""

from collections.abc import Iterable

import torch

from twa_scale.average.basis import Basis
from twa_scale.average.layout import Layout
from twa_scale.average.rows import RowCorrections
from twa_scale.average.weights import Weights
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.errors import NotFiniteError
from twa_scale.ranks import Ranks

_FIX = "Lower optimizer.lr, set max_grad_norm, or use a wider type."
_NORM_FACTOR = 4  # bound on the norm of a delta in a low-precision store, relative to the exact delta
_MAX_FRACTION = 0.99  # fraction of the largest value of a dtype; leaves room for rounding


class WeightLimits:
    """A check that refuses coefficients whose weights are not finite.

    Two bounds for each group avoid reading the weights. No weight exceeds
    |1 + u_c| ||c|| + sum_i |u_i| ||delta_i||. No weight exceeds the largest one at the last reading, at u', by more
    than |u_c - u_c'| ||c|| + sum_i |u_i - u_i'| ||delta_i||. In large models the norms exceed the largest float16
    value although no weight does. Weights are then read once, and again when the coefficients have moved far enough.

    Args:
        engine: holds the model.
        weights: writes deferred weights before they are read.
        layout: maps each trained tensor to its group.
        basis: maps coefficients to u, and has the norms in its Gram matrix.
        rows: the corrections of rows, if there are any. Both bounds then hold for the largest of them.
        group: all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        layout: Layout,
        basis: Basis,
        rows: RowCorrections | None,
        group: Ranks,
    ) -> None:
        self._engine = engine
        self._weights = weights
        self._layout = layout
        self._basis = basis
        self._rows = rows
        self._group = group
        limits = torch.full((len(layout.groups),), torch.finfo(torch.float32).max, dtype=torch.float64)
        for name in layout.group_of:
            columns = list(layout.groups_of(name))
            limits[columns] = limits[columns].clamp(max=torch.finfo(engine.parameters[name].dtype).max)
        self._limits = limits
        self._norms = basis.gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().T.cpu() * _NORM_FACTOR
        self._read_at = torch.zeros_like(self._norms)
        self._read_at[-1] = -1.0
        """u at the last reading of weights; initially the u of zero weights."""
        self._rows_read_at = torch.zeros_like(self._norms)
        """The largest corrections of rows of this rank at the last reading."""
        self._asked_at = self._read_at, self._rows_read_at
        """u and the corrections at the last call of `require_coefficients`."""
        self._must_read = True
        self._largest = torch.zeros_like(limits)
        """The largest weight of each group at `_read_at`, as a fraction of the largest value of its dtype."""

    def require_coefficients(self, x: torch.Tensor) -> None:
        """Refuse coefficients that overflow float32, the dtype of the computation. Collective with rows.

        Raises:
            NotFiniteError: the coefficients are too large; on every rank.
        """
        u = self._basis.expand(x.detach()).cpu()
        corrections = torch.zeros_like(u) if self._rows is None else self._rows.largest()
        fits = bool(torch.isfinite((u.abs() + corrections).sum(0).to(torch.float32)).all())
        # Coefficients are the same on all ranks, but rows are not.
        flags = torch.tensor([not fits, not self._is_excluded(u, corrections)], dtype=torch.float64)
        if self._rows is not None:
            flags = self._group.sum_(flags.to(self._engine.device)).cpu()
        too_large, self._must_read = (flags > 0).tolist()
        if too_large:
            raise NotFiniteError(f"with these coefficients the weights are not finite in torch.float32. {_FIX}")
        self._asked_at = u, corrections

    def require_weights(self, spans: Iterable[Span]) -> None:
        """Refuse live weights of `require_coefficients` that are not finite. Collective if they have to be read.

        Raises:
            NotFiniteError: names the tensor and the fix, on every rank.
        """
        if not self._must_read:
            return
        self._weights.write_deferred()
        largest = torch.zeros_like(self._largest)
        with self._group.agree():
            for span in spans:
                column = self._layout.group(span)
                largest[column] = max(float(largest[column]), self._part(span))
        self._largest = torch.stack(self._group.gather(largest)).amax(0)
        self._read_at, self._rows_read_at = self._asked_at

    def _is_excluded(self, u: torch.Tensor, corrections: torch.Tensor) -> bool:
        """Return whether the bounds show that the weights are finite. Corrections count with any sign."""
        moved = (((u - self._read_at).abs() + corrections + self._rows_read_at) * self._norms).sum(0)
        return bool((self._largest + moved / self._limits < _MAX_FRACTION).all())

    def _part(self, span: Span) -> float:
        """Return the largest weight of a span, as a fraction of the largest value of its dtype.

        Raises:
            NotFiniteError: a weight is not finite.
        """
        dtype = self._engine.parameters[span.name].dtype
        live = self._engine.live(span)
        if not len(live):
            return 0.0
        low, high = torch.aminmax(live.to(dtype))
        largest = float(torch.maximum(-low, high))
        end = torch.finfo(dtype).max
        if not largest <= end:  # `not <=` also catches NaN
            raise NotFiniteError(
                f"tensor {span.name!r}: with these coefficients its weights are not finite in {dtype}, whose largest "
                f"value is {end:g}. {_FIX}"
            )
        return largest / end

"""What a set of kernels has to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from twa_scale.kernels.coding import Coding
from twa_scale.kernels.packed_rows import Packed
from twa_scale.kernels.rows import Dense


@dataclass(frozen=True)
class Differences:
    """n rows w_i - c that are nowhere stored: each is formed in float32 where it is used."""

    rows: Sequence[torch.Tensor]
    """n of (m,), any floating types."""
    center: torch.Tensor
    """(m,), float32."""


Rows = Dense | Packed | Differences
Sources = torch.Tensor | Sequence[torch.Tensor]
"""n of (m,), contiguous, on the CPU: of one type as one tensor (n, m), or of several."""


@dataclass(frozen=True)
class Target:
    """Where what is made of the candidates' elements of a span goes; None: it is not wanted."""

    rows: Dense | Packed | None = None
    """The deltas w_i - c, n of m elements; or, packed, what `coding` says. Packed rows are zero before."""
    center: torch.Tensor | None = None
    """(m,): float32 beside rows; without them any floating type, and live model memory, written only when finite."""
    products: torch.Tensor | None = None
    """(n + 1, n + 1) or (n + 1,), float64: what inner products of the deltas and, last, the center are added to."""
    coding: Coding | None = None
    """What packed rows stand for: deltas when not given."""
    errors: torch.Tensor | None = None
    """(n,), float64: what the squared norm of each candidate less what packed rows make of it is added to."""

    @property
    def device(self) -> torch.device:
        """The one where it is made."""
        places = (*(self.rows.tensors if self.rows else ()), self.products, self.center)
        return next(place.device for place in places if place is not None)


class Seen(NamedTuple):
    """What was found out about sources on the way."""

    checksums: torch.Tensor
    """(n,), int64."""
    finite: bool
    """Whether all of the center is: an element that is NaN or Inf makes it so, or a difference that is too large."""


class Kernels(Protocol):
    """The operations on data of the size of the model, one pass over the rows each.

    Products of a tile are added in float32, tiles in float64. Left out on purpose: groups, spans and ranks.
    """

    name: str

    def project(self, rows: Rows, gradient: torch.Tensor) -> torch.Tensor:
        """Return <row_i, gradient>: (n,), float64. The gradient is (m,), of any floating type, on the same device."""

    def combine(self, rows: Rows, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write scale * base + sum_i weights_i row_i into `out`, rounded once from float32.

        Args:
            rows: n of m elements.
            weights: (n,), any floating type.
            base: (m,), float32: the center.
            scale: the weight of the center.
            out: (m,), any floating type; it may be live model memory.
        """

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source, 1-D on the CPU: (n,), int64."""

    def make_deltas(self, sources: Sources, weights: Sequence[float], target: Target, start: int) -> Seen:
        """Make deltas w_i - c around c = sum_i b_i w_i of elements `start` and following of a span.

        All is relative to the source of the largest weight b: where sources w_i (k,) agree, the deltas are zero and the
        center has their bits. It is computed in float32, or in float64 where a source has it. Blocks of packed rows
        must be whole, but for the first and the last of the rows.
        """

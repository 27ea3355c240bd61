"""What a set of kernels has to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from twa_scale.kernels.packed import Packed
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


class Kernels(Protocol):
    """The operations on data of the size of the model, one pass over the rows each.

    Products of a tile are added in float32, tiles in float64. Left out on purpose: groups, spans and ranks, and
    anything whose result has as many numbers as the rows.
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

    def center(self, sources: Sources, weights: Sequence[float], rows: torch.Tensor) -> None:
        """Write w_i - c and, last, c = sum_i b_i w_i into rows (n + 1, m), float32 or float64.

        All is relative to the source of the largest weight: where sources w_i (m,) agree, the deltas are zero and the
        center has their bits. The sum of the weights b is 1.
        """

    def gram(self, rows: torch.Tensor) -> torch.Tensor:
        """Return <row_i, row_j> of rows (k, m), summed in float64: (k, k)."""

    def squares(self, rows: torch.Tensor) -> torch.Tensor:
        """Return <row_i, row_i> of rows (k, m), summed in float64: (k,)."""

    def pack(self, rows: Packed, block: int, values: torch.Tensor) -> None:
        """Quantize values (n, k), float32, into blocks `block` and following, which must still be zero.

        The values start where the block starts (block 0: at column 0), and end with a block or with the rows.
        """

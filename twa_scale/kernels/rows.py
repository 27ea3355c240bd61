"""What kernels work on: n rows of m numbers, laid out so that one pass over them is one sequential stream.

Both layouts cut the columns into tiles, and keep the n rows of a tile beside each other: a kernel that needs a tile of
the gradient, or of the result, for all rows then reads memory in order, which is what prefetchers reward. The last tile
is as narrow as what is left, so nothing is padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

TILE = 128  # elements of a dense tile; wider ones are no faster, and take more of the cache with many rows


@dataclass(frozen=True)
class Dense:
    """Rows as they are, float32 or bfloat16: tile by tile, (n, width) each."""

    values: torch.Tensor
    """(n * m,)."""
    n: int
    m: int

    @classmethod
    def empty(cls, n: int, m: int, dtype: torch.dtype, device: torch.device) -> "Dense":
        """Return rows whose values are still to be written."""
        return cls(torch.empty(n * m, dtype=dtype, device=device), n, m)

    @classmethod
    def one(cls, row: torch.Tensor) -> "Dense":
        """Return a contiguous row (m,) as it lies, without a copy."""
        return cls(row, 1, row.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.values.nbytes

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield views (tiles, n, width) of tiles [start, stop) and their first column: the full ones, then the last."""
        full = self.m // TILE
        if start < (middle := min(stop, full)):
            yield start * TILE, self.values[start * TILE * self.n : middle * TILE * self.n].view(-1, self.n, TILE)
        if stop > full:
            yield full * TILE, self.values[full * TILE * self.n :].view(1, self.n, -1)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Write columns `start` and following, (n, k), rounding to the type of the rows."""
        stop = start + values.shape[1]
        for first, part in self.tiles(start // TILE, -(-stop // TILE)):
            width = part.shape[2]
            if first >= start and first + len(part) * width <= stop:
                for i, row in enumerate(_columns(values, first - start, len(part), width)):
                    part[:, i] = row  # all rows at once are 20 times slower
                continue
            for i, tile in enumerate(part):  # the first or the last tile is written in part
                at = first + i * width
                low, high = max(at, start), min(at + width, stop)
                tile[:, low - at : high - at] = values[:, low - start : high - start]


def _columns(values: torch.Tensor, start: int, count: int, width: int) -> torch.Tensor:
    """Return a view (n, count, width) of `count` tiles of (n, k) from column `start` on."""
    columns = values[:, start : start + count * width]
    return columns.view(len(values), count, width)

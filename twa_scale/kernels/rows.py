"""The layout of n rows of m numbers in memory, which kernels read as one sequential stream.

Dense and packed rows split the columns into tiles, and store the n rows of a tile next to each other. A kernel that
processes all rows of a tile while a tile of the gradient or of the result is in cache then reads memory in order, as
prefetchers need it. The last tile may be narrower, so there is no padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Allocate = Callable[..., torch.Tensor]
"""An allocator, called like `torch.zeros` with a number of elements, a `dtype` and a `device`."""
TILE = 128  # columns of a dense tile; wider tiles are not faster, and use more cache with many rows


@dataclass(frozen=True)
class Dense:
    """n rows of m elements in float32 or bfloat16. Each tile holds (n, width) values."""

    values: torch.Tensor
    """The tiles one after the other, (n * m,)."""
    n: int
    m: int

    @classmethod
    def empty(
        cls, n: int, m: int, dtype: torch.dtype, device: torch.device, allocate: Allocate = torch.empty
    ) -> "Dense":
        """Return rows with uninitialized values."""
        assert dtype in (torch.float32, torch.bfloat16), f"the kernels do not support rows of {dtype}"
        return cls(allocate(n * m, dtype=dtype, device=device), n, m)

    @classmethod
    def one(cls, row: torch.Tensor) -> "Dense":
        """Return a contiguous tensor (m,) as a single row, without a copy."""
        return cls(row, 1, row.numel())

    @property
    def nbytes(self) -> int:
        """The size in memory, in bytes."""
        return self.values.nbytes

    @property
    def tile(self) -> int:
        """The number of columns of a full tile."""
        return TILE

    @property
    def run(self) -> int:
        """The number of tiles that must not be separated, which is 1 for dense rows."""
        return 1

    @property
    def tile_bytes(self) -> int:
        """The size of a full tile of all rows, in bytes."""
        return TILE * self.n * self.values.itemsize

    @property
    def count(self) -> int:
        """The number of tiles."""
        return -(-self.m // TILE)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the rows."""
        return (self.values,)

    def over(self, tensors: Sequence[torch.Tensor]) -> "Dense":
        """Return the same rows on other tensors, which are copies of `self.tensors`."""
        (values,) = tensors
        return Dense(values, self.n, self.m)

    def tiles_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return the tiles [first, last) that hold columns [start, stop)."""
        return start // TILE, -(-stop // TILE)

    def part(self, start: int, stop: int) -> tuple[int, "Dense"]:
        """Return the first column of tiles [start, stop), and a view of the rows with only these columns."""
        low, high = start * TILE, min(stop * TILE, self.m)
        return low, Dense(self.values[low * self.n : high * self.n], self.n, high - low)

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first column and a view (tiles, n, width) of tiles [start, stop): full ones, then a narrow one."""
        full = self.m // TILE
        if start < (middle := min(stop, full)):
            yield start * TILE, self.values[start * TILE * self.n : middle * TILE * self.n].view(-1, self.n, TILE)
        if stop > full:
            yield full * TILE, self.values[full * TILE * self.n :].view(1, self.n, -1)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Write `values`, (n, k), to columns [start, start + k), rounded to the type of the rows."""
        stop = start + values.shape[1]
        first_full = min(-(-start // TILE) * TILE, stop)  # Full tiles are written in one copy.
        last_full = max(stop // TILE * TILE, first_full)
        for low, high in ((start, first_full), (first_full, last_full), (last_full, stop)):
            for first, part in self.tiles(low // TILE, -(-high // TILE)) if low < high else ():
                columns = values[:, low - start : high - start].unflatten(1, (len(part), -1))
                part[:, :, low - first : high - first] = columns.transpose(0, 1)

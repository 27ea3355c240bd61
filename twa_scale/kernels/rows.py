"""What kernels work on: n rows of m numbers, laid out so that one pass over them is one sequential stream.

Both layouts cut the columns into tiles, and keep the n rows of a tile beside each other: a kernel that needs a tile of
the gradient, or of the result, for all rows then reads memory in order, which is what prefetchers reward. The last tile
is as narrow as what is left, so nothing is padded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Allocate = Callable[..., torch.Tensor]
"""What gives memory: called as `torch.zeros` is, with a number of elements, a `dtype` and a `device`."""
TILE = 128  # elements of a dense tile; wider ones are no faster, and take more of the cache with many rows


@dataclass(frozen=True)
class Dense:
    """Rows as they are, float32 or bfloat16: tile by tile, (n, width) each."""

    values: torch.Tensor
    """(n * m,)."""
    n: int
    m: int

    @classmethod
    def empty(
        cls, n: int, m: int, dtype: torch.dtype, device: torch.device, allocate: Allocate = torch.empty
    ) -> "Dense":
        """Return rows whose values are still to be written."""
        assert dtype in (torch.float32, torch.bfloat16), f"the kernels do not know rows of {dtype}"
        return cls(allocate(n * m, dtype=dtype, device=device), n, m)

    @classmethod
    def one(cls, row: torch.Tensor) -> "Dense":
        """Return a contiguous row (m,) as it lies, without a copy."""
        return cls(row, 1, row.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.values.nbytes

    @property
    def tile(self) -> int:
        """Elements of a full tile."""
        return TILE

    @property
    def run(self) -> int:
        """Tiles that belong together: each is for itself."""
        return 1

    @property
    def tile_bytes(self) -> int:
        """Bytes of a full tile of all rows."""
        return TILE * self.n * self.values.itemsize

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-self.m // TILE)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The memory of the rows."""
        return (self.values,)

    def over(self, tensors: Sequence[torch.Tensor]) -> "Dense":
        """Return the same rows in other memory, which holds a copy of `tensors`."""
        (values,) = tensors
        return Dense(values, self.n, self.m)

    def part(self, start: int, stop: int) -> tuple[int, "Dense"]:
        """Return the first column of tiles [start, stop), and the rows of these columns as a view."""
        low, high = start * TILE, min(stop * TILE, self.m)
        return low, Dense(self.values[low * self.n : high * self.n], self.n, high - low)

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
        up = min(-(-start // TILE) * TILE, stop)  # from here to `down` tiles are written whole, all in one copy
        down = max(stop // TILE * TILE, up)
        for low, high in ((start, up), (up, down), (down, stop)):
            for first, part in self.tiles(low // TILE, -(-high // TILE)) if low < high else ():
                columns = values[:, low - start : high - start].unflatten(1, (len(part), -1))
                part[:, :, low - first : high - first] = columns.transpose(0, 1)

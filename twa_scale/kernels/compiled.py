"""Kernels for CPUs, compiled by numba on their first use."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from twa_scale.kernels import delta_loops, loops
from twa_scale.kernels.packed import RUN, Packed
from twa_scale.kernels.packed_loops import packed_loops
from twa_scale.kernels.protocol import Differences, Rows, Sources
from twa_scale.kernels.quantize_loops import quantize_loop
from twa_scale.kernels.reference import TorchKernels, reference_of
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.threads import Threads

_PIECE = 1 << 17  # elements of a sum of differences: it stays in cache while the rows go by
_REFERENCE = TorchKernels()
_PART = 1024  # elements of them that are added in float32


class NumbaKernels:
    """Each thread takes a range of tiles, and reads all rows of a tile while the gradient or the sum is in cache."""

    name = "numba"

    def __init__(self) -> None:
        self._threads = Threads()

    def project(self, rows: Rows, gradient: torch.Tensor) -> torch.Tensor:
        """Return <row_i, gradient>."""
        right = _array(gradient)
        parts: list[tuple[int, Any]] = []

        def work(start: int, stop: int) -> None:
            match rows:
                case Dense():
                    total = np.zeros(rows.n)
                    loops.project_dense(_array(rows.values), rows.n, rows.m, TILE, right, start, stop, total)
                case Packed():
                    total = np.zeros(rows.n)
                    packed_loops(rows.bits).project(_packed(rows), right, *_tiles(rows, start, stop), total)
                case Differences():
                    center = rows.center.numpy()
                    cut = (start * _PIECE, min(stop * _PIECE, len(center)))
                    arrays = map(_array, rows.rows)
                    total = np.array([loops.project_differences(a, center, right, *cut, _PART) for a in arrays])
            parts.append((start, total))

        self._threads.share(work, *_size(rows))
        return torch.from_numpy(_in_order(parts))

    def combine(self, rows: Rows, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write scale * base + sum_i weights_i row_i."""
        out = out.detach()
        if out.dtype not in (torch.float32, torch.bfloat16) or not out.is_contiguous():
            total = torch.empty(out.shape, dtype=torch.float32)
            self.combine(rows, weights, base, scale, total)
            out.copy_(total)
            return
        factors, center, factor, target = (
            weights.to(torch.float32).numpy(),
            base.numpy(),
            np.float32(scale),
            _array(out),
        )

        def work(start: int, stop: int) -> None:
            match rows:
                case Dense():
                    size = (rows.n, rows.m, TILE)
                    loops.combine_dense(_array(rows.values), *size, factors, center, factor, target, start, stop)
                case Packed():
                    cut = _tiles(rows, start, stop)
                    packed_loops(rows.bits).combine(_packed(rows), factors, center, factor, target, *cut)
                case Differences():
                    for piece in range(start, stop):
                        self._combine_differences(rows, factors, base, scale, out, piece * _PIECE)

        self._threads.share(work, *_size(rows))

    def _combine_differences(
        self, rows: Differences, weights: Any, base: torch.Tensor, scale: float, out: torch.Tensor, start: int
    ) -> None:
        total = base[start : start + _PIECE] * scale
        for row, weight in zip(rows.rows, weights, strict=True):
            loops.add_difference(total.numpy(), _array(row), rows.center.numpy(), weight, start)
        out[start : start + _PIECE] = total

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source."""
        if not isinstance(sources, torch.Tensor) or sources.itemsize != 2:
            return _REFERENCE.checksums(sources)
        total = np.zeros(len(sources), np.int64)
        delta_loops.checksums(_flat(sources.view(torch.int16)), sources.stride(0), sources.shape[1], total)
        return torch.from_numpy(total)

    def center(self, sources: Sources, weights: Sequence[float], rows: torch.Tensor) -> None:
        """Write deltas and center, a tile of columns after the other."""
        if rows.dtype != torch.float32:
            return _REFERENCE.center(sources, weights, rows)
        if not isinstance(sources, torch.Tensor) or sources.dtype not in (torch.bfloat16, torch.float32):
            for row, source in zip(rows, sources, strict=False):
                row.copy_(source)
            sources = rows[:-1]
        source = _flat(sources.view(torch.uint16) if sources.dtype == torch.bfloat16 else sources)
        rule = (np.array(weights, np.float32), reference_of(weights))
        data = (source, sources.stride(0), *rule, _flat(rows), rows.stride(0))
        self._threads.share(lambda start, stop: delta_loops.center(*data, start, stop), rows.shape[1], rows.nbytes)
        return None

    def gram(self, rows: torch.Tensor) -> torch.Tensor:
        """Return <row_i, row_j>: half of them, nine at a time, and the others by symmetry."""
        n = len(rows)
        upper = self._products(delta_loops.gram, rows, (-(-n // 3) * 3,) * 2)[:n, :n].triu()
        return upper + upper.triu(1).T

    def squares(self, rows: torch.Tensor) -> torch.Tensor:
        """Return <row_i, row_i>."""
        return self._products(delta_loops.squares, rows, (len(rows),))

    def _products(self, loop: Callable[..., None], rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return what a loop adds up over columns, to a total of this shape."""
        parts: list[tuple[int, Any]] = []

        def work(start: int, stop: int) -> None:
            total = np.zeros(shape)
            loop(_flat(rows), rows.stride(0), len(rows), start, stop, total)
            parts.append((start, total))

        self._threads.share(work, rows.shape[1], rows.nbytes)
        return torch.from_numpy(_in_order(parts))

    def pack(self, rows: Packed, block: int, values: torch.Tensor) -> None:
        """Quantize, each thread some of the rows: two of them never write into the same word."""
        count = values.shape[1]
        if not rows.n or not count:
            return
        values = values if values.stride(1) == 1 else values.contiguous()
        stride = values.stride(0)
        flat = _flat(values)

        def work(start: int, stop: int) -> None:
            quantize_loop(rows.bits)(_packed(rows), block, flat, stride, count, start, stop)

        self._threads.share(work, rows.n, values.nbytes)


def _in_order(parts: list[tuple[int, Any]]) -> Any:
    """Add up parts in the order of the columns: the same bits whichever thread was first."""
    return np.sum([total for _, total in sorted(parts, key=lambda part: part[0])], axis=0)


def _array(tensor: torch.Tensor) -> Any:
    """Return a tensor's memory as numpy has it: bfloat16 as uint16, and what loops do not know as float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.to(torch.float32).contiguous().numpy()


def _flat(rows: torch.Tensor) -> Any:
    """Return the memory of rows (n, m), however far apart, as one array."""
    assert rows.stride(1) == 1 or rows.shape[1] <= 1
    size = (len(rows) - 1) * rows.stride(0) + rows.shape[1] if rows.numel() else 0
    return rows.as_strided((size,), (1,)).numpy()


def _packed(rows: Packed) -> Any:
    return rows.words.numpy(), _array(rows.scales), tuple(map(np.uint64, (rows.n, rows.m, rows.lead)))


def _tiles(rows: Packed, start: int, stop: int) -> tuple[int, int]:
    """Return the tiles of a range of runs."""
    return start * RUN, min(stop * RUN, rows.count)


def _size(rows: Rows) -> tuple[int, int]:
    """Return how many ranges rows can be cut into, and their bytes."""
    match rows:
        case Dense():
            return -(-rows.m // TILE), rows.nbytes
        case Packed():
            return -(-rows.count // RUN), rows.nbytes
        case Differences():
            return -(-len(rows.center) // _PIECE), sum(row.nbytes for row in rows.rows)

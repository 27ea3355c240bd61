"""Kernels for CPUs, compiled by numba on first use."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from twa_scale.kernels.coding import CENTER, of_deltas
from twa_scale.kernels.kernels import Differences, Rows, SourceChecks, Sources, Target, new_sums
from twa_scale.kernels.numba import delta_loops, loops
from twa_scale.kernels.numba.packed_loops import packed_loops
from twa_scale.kernels.numba.threads import Threads
from twa_scale.kernels.packed_rows import RUN, Packed
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.segments import Segments
from twa_scale.kernels.torch.deltas import (
    GRID,
    ROW_BYTES,
    checksums,
    cuts,
    grid_column,
    make_deltas,
    reference_of,
    require_whole_blocks,
)

_PIECE = 1 << 17  # elements of a weighted sum of differences that stay in cache while all rows are added
_PART = 1024  # elements of differences whose products are added in float32
_ENDLESS = np.uint64(1 << 62), np.uint64(0)  # the length and the lead of a segment that never ends


class NumbaKernels:
    """Kernels in which each thread processes ranges of tiles, and all rows of a tile while the gradient is in cache."""

    name = "numba"

    def __init__(self) -> None:
        self._threads = Threads()

    def project(
        self,
        rows: Rows,
        gradient: torch.Tensor,
        segments: Segments | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the inner products <row_i, gradient> to `out`, and return it."""
        n, gradient_values = rows.n, _array(gradient)
        out = new_sums(n, segments, gradient.device) if out is None else out
        table = out.T if segments else out[None]
        found = table.numpy()  # Arithmetic of torch would start threads of its own in each of these.
        shared: list[tuple[int, int, Any]] = []

        def work(start: int, stop: int) -> None:
            first, count, part = _part(segments, rows, start, stop)
            # Products are written to a part of `table`. If an earlier range has a part of the first segment, they are
            # written to new memory and copied, and those of this segment are added below.
            begins = start == 0 or (segments is not None and part[1] == 0)
            target = table[first : first + count] if begins else torch.from_numpy(np.empty((count, n)))
            own, total = target.numpy(), (_flat(target), np.uint64(target.stride(0)))
            match rows:
                case Dense():
                    loops.project_dense(_array(rows.values), n, rows.m, TILE, gradient_values, part, start, stop, total)
                case Packed():
                    packed_loops(rows.bits, segments is not None).project(
                        _packed(rows), gradient_values, part, *_tiles(rows, start, stop), total
                    )
                case Differences():
                    cut, sums = (start * _PIECE, min(stop * _PIECE, len(gradient_values))), np.zeros((n, count))
                    for row, some in zip(rows.rows, sums, strict=True):
                        loops.project_differences(
                            _array(row), rows.center.numpy(), gradient_values, *cut, _PART, part, some
                        )
                    own[:] = sums.T
            if not begins:
                found[first + 1 : first + count] = own[1:]
                shared.append((start, first, own[0]))

        self._threads.run(work, *_ranges_and_bytes(rows))
        for _, first, sums in sorted(shared, key=lambda part: part[0]):  # in the order of columns
            found[first] += sums
        return out

    def combine(
        self,
        rows: Rows,
        weights: torch.Tensor,
        base: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        segments: Segments | None = None,
    ) -> None:
        """Write scale * base + sum_i weights_i row_i."""
        out = out.detach()
        if out.dtype not in (torch.float32, torch.bfloat16) or not out.is_contiguous():
            total = torch.empty(out.shape, dtype=torch.float32)
            self.combine(rows, weights, base, scale, total, segments)
            out.copy_(total)
            return
        weights = weights.to(torch.float32)
        factors = weights.T.contiguous().numpy() if segments else weights.numpy()[None]
        center, factor, target = base.numpy(), np.float32(scale), _array(out)

        def work(start: int, stop: int) -> None:
            first, count, part = _part(segments, rows, start, stop)
            data = (factors[first : first + count].reshape(-1), part, center, factor, target)
            match rows:
                case Dense():
                    loops.combine_dense(_array(rows.values), rows.n, rows.m, TILE, *data, start, stop)
                case Packed():
                    packed_loops(rows.bits, segments is not None).combine(
                        _packed(rows), *data, *_tiles(rows, start, stop)
                    )
                case Differences():
                    for piece in range(start, stop):
                        first, count, part = _part(segments, rows, piece, piece + 1)
                        own = factors[first : first + count]
                        _combine_differences(rows, own, part, base, scale, out, piece * _PIECE)

        self._threads.run(work, *_ranges_and_bytes(rows))

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source."""
        if not isinstance(sources, torch.Tensor) or sources.itemsize != 2:
            return checksums(sources)
        total = np.zeros(len(sources), np.int64)
        pitch, width = map(np.uint64, (sources.stride(0), sources.shape[1]))
        delta_loops.checksums(_flat(sources.view(torch.int16)), pitch, width, total)
        return torch.from_numpy(total)

    def make_deltas(self, sources: Sources, weights: Sequence[float], target: Target, start: int) -> SourceChecks:
        """Compute deltas, center, inner products and errors. Threads process columns that share no packed word."""
        types = {source.dtype for source in sources}
        if torch.float64 in types:
            return make_deltas(sources, weights, target, start)
        require_whole_blocks(target.rows, start, len(sources[0]))
        if isinstance(sources, torch.Tensor) and types <= {torch.bfloat16, torch.float32}:
            return self._make_deltas(sources, weights, target, start)
        finite = True
        for low, high in cuts(target.rows, start, len(sources[0]), ROW_BYTES // 4 // len(sources)):
            wide = torch.empty(len(sources), high - low)
            for row, source in zip(wide, sources, strict=True):
                row.copy_(source[low:high])
            finite &= self._make_deltas(wide, weights, target, start + low).finite
        return SourceChecks(self.checksums(sources), finite)

    def _make_deltas(self, sources: torch.Tensor, weights: Sequence[float], target: Target, start: int) -> SourceChecks:
        n, m = sources.shape
        at = grid_column(target.rows, start)
        integers, floats = (torch.int16, torch.uint16) if sources.itemsize == 2 else (torch.int32, torch.float32)
        bits = target.rows.bits if isinstance(target.rows, Packed) else 0
        rule = (np.array(weights, np.float32), np.uint64(reference_of(weights)), _coding_order(target, n))
        data = (_flat(sources.view(floats)), _flat(sources.view(integers)), np.uint64(sources.stride(0)))
        center = None if target.center is None else target.center.detach()[start : start + m]
        live = target.rows is None  # Live weights are written only if all values are finite.
        place = torch.empty(m) if center is None or live else center
        parts: list[tuple[int, Any]] = []

        def work(first: int, last: int) -> None:
            low, high = (min(max((at // GRID + i) * GRID - at, 0), m) for i in (first, last))
            sums = np.zeros(n, np.int64), _new_products(target, n), np.zeros(1), np.zeros(n)
            delta_loops.delta_loop(bits)(data, rule, _row_memory(target), at, place.numpy(), sums, low, high)
            parts.append((first, sums))

        self._threads.run(work, -(-(at % GRID + m) // GRID), sources.nbytes)
        checked, products, size, errors = (_sum_in_order([(first, sums[k]) for first, sums in parts]) for k in range(4))
        if target.products is not None and target.products.ndim == 1:
            target.products.add_(torch.from_numpy(products[0]))
        elif target.products is not None:
            upper = torch.from_numpy(products)[: n + 1, : n + 1].triu()
            target.products.add_(upper + upper.triu(1).T)
        if target.errors is not None:
            target.errors.add_(torch.from_numpy(errors))
        finite = bool(np.isfinite(size[0]))
        if center is not None and live and finite:
            center.copy_(place)
        return SourceChecks(torch.from_numpy(checked), finite)


def _new_products(target: Target, n: int) -> Any:
    """Return zeros for the inner products, in the shape that `delta_loop` needs: a multiple of three for all pairs."""
    if target.products is None:
        return np.zeros((0, 0))
    return np.zeros((1, n + 1) if target.products.ndim == 1 else (-(-(n + 1) // 3) * 3,) * 2)


def _coding_order(target: Target, n: int) -> Any:
    """Return the order in which rows are coded, and for each the row that is subtracted; n stands for the center."""
    coding = target.coding or of_deltas(n)
    order = [i for level in coding.levels for i in level]
    before = [n if coding.before[i] == CENTER else coding.before[i] for i in order]
    return np.array(order, np.uint64), np.array(before, np.uint64)


def _row_memory(target: Target) -> Any:
    """Return the memory of a target's rows, as an argument of `delta_loop`."""
    match target.rows:
        case Packed():
            return _packed(target.rows)
        case Dense():
            return _array(target.rows.values), np.uint64(target.rows.m)
        case _:
            return np.empty(0, np.float32), np.uint64(0)


def _sum_in_order(parts: list[tuple[int, Any]]) -> Any:
    """Return the sum of the parts, added in the order of the columns so that it does not depend on the threads."""
    return np.sum([total for _, total in sorted(parts, key=lambda part: part[0])], axis=0)


def _array(tensor: torch.Tensor) -> Any:
    """Return a tensor as a numpy array: bfloat16 as uint16, and types that the loops do not support as float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.to(torch.float32).contiguous().numpy()


def _flat(rows: torch.Tensor) -> Any:
    """Return rows (n, m) with any row stride as a flat array."""
    assert rows.stride(1) == 1 or rows.shape[1] <= 1
    size = (len(rows) - 1) * rows.stride(0) + rows.shape[1] if rows.numel() else 0
    return rows.as_strided((size,), (1,)).numpy()


def _packed(rows: Packed) -> Any:
    return rows.words.numpy(), _array(rows.scales), tuple(map(np.uint64, (rows.n, rows.m, rows.lead)))


def _combine_differences(
    rows: Differences, weights: Any, part: Any, base: torch.Tensor, scale: float, out: torch.Tensor, start: int
) -> None:
    total = base[start : start + _PIECE] * scale
    for row, own in zip(rows.rows, np.ascontiguousarray(weights.T), strict=True):
        loops.add_difference(total.numpy(), _array(row), rows.center.numpy(), own, part, start)
    out[start : start + _PIECE] = total


def _part(segments: Segments | None, rows: Rows, start: int, stop: int) -> tuple[int, int, Any]:
    """Return the first segment of some ranges, their number of segments, and the argument of the loops.

    Without segments, all columns are in one. [start, stop) are ranges of `_ranges_and_bytes`.
    """
    if segments is None:
        return 0, 1, _ENDLESS
    size, lead = _PIECE if isinstance(rows, Differences) else TILE, 0
    if isinstance(rows, Packed):
        size, lead = rows.tile * RUN, rows.lead
    first, part = segments.part(*(min(max(i * size - lead, 0), segments.m) for i in (start, stop)))
    return first, part.count, (np.uint64(part.length), np.uint64(part.lead))


def _tiles(rows: Packed, start: int, stop: int) -> tuple[int, int]:
    """Return the tiles (start, stop) of runs [start, stop)."""
    return start * RUN, min(stop * RUN, rows.count)


def _ranges_and_bytes(rows: Rows) -> tuple[int, int]:
    """Return the number of ranges into which rows can be split, and their size in bytes."""
    match rows:
        case Dense():
            return -(-rows.m // TILE), rows.nbytes
        case Packed():
            return -(-rows.count // RUN), rows.nbytes
        case Differences():
            return -(-len(rows.center) // _PIECE), sum(row.nbytes for row in rows.rows)

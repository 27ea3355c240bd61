"""The loop that computes deltas on a CPU. It processes a chunk of columns completely while it is in a core's cache.

Differences are compiled without fast math, which could change (w - r) - s to w - (r + s). Equal candidates would then
not give zeros.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from twa_scale.kernels.numba.intrinsics import FUSED, LANES, Emitter, splat
from twa_scale.kernels.numba.loops import FLOAT0, U, compiled, exact, narrow, widen
from twa_scale.kernels.numba.quantize_loops import quantize
from twa_scale.kernels.rows import TILE
from twa_scale.kernels.torch.deltas import GRID

_STRIDE = U(GRID + LANES)  # Rows with a stride of a power of two would map to the same cache sets.
ONE, TWO, THREE = U(1), U(2), U(3)
_WIDE = U(512)
_VECTORS = 4  # vectors at a time, whose independent sums hide the latency of additions
_ABREAST = U(_VECTORS * LANES)


def _sum(integers: Any, start: Any, stop: Any) -> Any:
    """Return the sum of at most GRID integers. Those of 16 bits are added in 32 bits, twice as fast as in 64 bits."""


@overload(_sum, strict=False, jit_options={"fastmath": True})  # type: ignore[untyped-decorator]
def _sum_of(integers: Any, start: Any, stop: Any) -> Any:
    wide = np.int32 if integers.dtype.bitwidth == 16 else np.int64

    def total(integers: Any, start: Any, stop: Any) -> Any:
        part = wide(0)
        for j in range(start, stop):
            part = wide(part + wide(integers[j]))
        return np.int64(part)

    return total


@compiled
def checksums(integers: Any, pitch: int, width: int, total: Any) -> None:
    """Add the sum of the first `width` integers of each row, with row stride `pitch`, to `total`, (n,), int64."""
    for i in range(U(len(total))):
        for t in range(U(0), U(width), U(GRID)):
            total[i] += _sum(integers, U(i) * U(pitch) + t, U(i) * U(pitch) + min(t + U(GRID), U(width)))


@exact
def _center(source: Any, pitch: Any, weights: Any, reference: Any, rows: Any, width: Any) -> None:
    """Write `width` columns of w_i - c and, last, of c to `rows`. The sources w_i have row stride `pitch`."""
    n, rest = U(len(weights)), width - width % _ABREAST
    for t in range(U(0), rest, _ABREAST):
        subtract_mean(source, pitch, weights, n, reference, rows, _STRIDE, t)
    for t in range(rest, width):
        base, shift = widen(source[reference * pitch + t]), FLOAT0
        for i in range(n):
            shift += weights[i] * (widen(source[i * pitch + t]) - base)
        for i in range(n):
            rows[i * _STRIDE + t] = widen(source[i * pitch + t]) - base - shift
        rows[n * _STRIDE + t] = base + shift


@intrinsic
def subtract_mean(typing, source, pitch, weights, n, reference, rows, stride, at):  # type: ignore[no-untyped-def]
    """Implement `_center` for 64 columns. The sources are read twice, and only sums are kept in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        names = "source pitch weights n reference rows stride at"
        v = Emitter(context, builder, signature.args, arguments, names)
        columns = [v.at(v["at"], c * LANES) for c in range(_VECTORS)]

        def differences(row: Any) -> list[Any]:
            start = builder.mul(row, v["pitch"])
            return [builder.fsub(v.floats("source", v.at(start, c)), b) for c, b in zip(columns, bases, strict=True)]

        start = builder.mul(v["reference"], v["pitch"])
        bases = [v.floats("source", v.at(start, column)) for column in columns]
        shifts = [v.variable(splat(0.0)) for _ in columns]
        with cgutils.for_range(builder, v["n"]) as row:
            weight = v.broadcast_element("weights", row.index)
            for shift, difference in zip(shifts, differences(row.index), strict=True):
                shift.set(builder.fadd(shift.get(), builder.fmul(weight, difference, flags=FUSED), flags=FUSED))
        with cgutils.for_range(builder, v["n"]) as row:
            ahead = v.at(builder.mul(row.index, v["pitch"]), v["at"], GRID)
            for c in range(0, _VECTORS * LANES, 32):
                v.prefetch("source", v.at(ahead, c))
            start = builder.mul(row.index, v["stride"])
            for column, shift, difference in zip(columns, shifts, differences(row.index), strict=True):
                v.store("rows", v.at(start, column), builder.fsub(difference, shift.get()))
        start = builder.mul(v["n"], v["stride"])
        for column, shift, base in zip(columns, shifts, bases, strict=True):
            v.store("rows", v.at(start, column), builder.fadd(base, shift.get()))
        return context.get_dummy_value()

    index = types.uint64
    return types.void(source, index, weights, index, index, rows, index, index), generate


@compiled
def _squares(rows: Any, width: Any, total: Any) -> None:
    """Add <row_i, row_i> to `total`, float64."""
    for i in range(U(len(total))):
        part = 0.0
        for j in range(U(i) * _STRIDE, U(i) * _STRIDE + width):
            part += np.float64(rows[j]) * np.float64(rows[j])
        total[i] += part


@compiled
def _gram(rows: Any, n: Any, width: Any, total: Any) -> None:
    """Add <row_i, row_j> to `total`, float64, for i <= j < n.

    The size of `total` is n rounded up to a multiple of three.
    """
    size = U(len(total))
    wide = np.zeros((size, _WIDE + U(8)))  # also without a stride of a power of two
    for t in range(U(0), width, _WIDE):
        part = min(_WIDE, width - t)
        for i in range(n):
            at = i * _STRIDE + t
            for j in range(part):
                wide[i, j] = rows[at + j]
        for i in range(U(0), size, THREE):
            for k in range(i, size, THREE):
                _products(wide, i, k, part, total)


@compiled
def _products(wide: Any, i: Any, k: Any, width: Any, total: Any) -> None:
    """Add the inner products of rows i to i + 2 with rows k to k + 2, which needs six loads for nine products."""
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = 0.0
    for j in range(width):
        x0, x1, x2 = wide[i, j], wide[i + ONE, j], wide[i + TWO, j]
        y0, y1, y2 = wide[k, j], wide[k + ONE, j], wide[k + TWO, j]
        s00 += x0 * y0
        s01 += x0 * y1
        s02 += x0 * y2
        s10 += x1 * y0
        s11 += x1 * y1
        s12 += x1 * y2
        s20 += x2 * y0
        s21 += x2 * y1
        s22 += x2 * y2
    total[i, k] += s00
    total[i, k + ONE] += s01
    total[i, k + TWO] += s02
    total[i + ONE, k] += s10
    total[i + ONE, k + ONE] += s11
    total[i + ONE, k + TWO] += s12
    total[i + TWO, k] += s20
    total[i + TWO, k + ONE] += s21
    total[i + TWO, k + TWO] += s22


@compiled
def _write(rows: Any, at: Any, deltas: Any, n: Any, width: Any) -> None:
    """Write columns of deltas to dense rows, from their column `at` on, or do nothing if m is 0."""
    values, m = rows
    done = U(0) if m else width
    while done < width:
        first = (at + done) // U(TILE) * U(TILE)
        size, begin = min(U(TILE), m - first), at + done - first
        count = min(size - begin, width - done)
        for i in range(n):
            target, source = first * n + i * size + begin, i * _STRIDE + done
            for j in range(count):
                values[target + j] = narrow(values, deltas[source + j])
        done += count


@compiled
def _copy(rows: Any, start: Any, target: Any, at: Any, width: Any) -> Any:
    """Copy a row, and return its sum."""
    total = 0.0  # In float64 the sum of finite values is finite.
    for j in range(width):
        target[at + j] = rows[start + j]
        total += np.float64(rows[start + j])
    return total


@cache
def delta_loop(bits: int) -> Callable[..., None]:
    """Return the loop that computes deltas of columns [start, stop) of some sources.

    The arguments of the loop are:

    - `data`: the sources as floats, their bits as integers, and the row stride;
    - `rule`: the weights of the center, the index of the reference, and `coding_order` of quantize_loops.py;
    - `rows`: packed rows as in packed_loops.py, or dense ones (values, m), where m is 0 if no rows are written;
    - `at`: the column of the rows, counted from the start of the first block, that is column 0 of the sources;
    - `target`: the center, float32;
    - `sums`: to which checksums, inner products, the sum of the center and squared errors are added. The shape of the
      inner products is (0, 0) for none, (1, n + 1) for squared norms, or square for all pairs.

    Args:
        bits: the number of bits of packed rows, or 0 for dense rows.
    """

    @partial(compiled, variant=bits)
    def make_deltas(data: Any, rule: Any, rows: Any, at: int, target: Any, sums: Any, start: int, stop: int) -> None:
        source, integers, pitch = data
        weights, reference, coding_order = rule
        checked, products, size, errors = sums
        n = U(len(weights))
        deltas = np.empty((n + ONE) * _STRIDE, np.float32)
        t, end = U(start), U(stop)
        while t < end:
            to = min(end, ((U(at) + t) // U(GRID) + ONE) * U(GRID) - U(at))
            width = to - t
            checksums(integers[t:], pitch, width, checked)
            _center(source[t:], pitch, weights, reference, deltas, width)
            if len(products) == 1:
                _squares(deltas, width, products[0])
            elif len(products) > 1:
                _gram(deltas, n + ONE, width, products)
            size[0] += _copy(deltas, n * _STRIDE, target, t, width)
            if bits == 0:
                _write(rows, U(at) + t, deltas, n, width)
            else:
                quantize(bits, rows, U(at) + t, deltas, _STRIDE, coding_order, width, errors)
            t = to

    return make_deltas

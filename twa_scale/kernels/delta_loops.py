"""The inner loops that make deltas of candidates on a CPU, as in loops.py. What they work on stays in the first cache.

Differences are taken as they are written: fast math could turn (w - r) - s into w - (r + s), and candidates that agree
would no longer give zeros.
"""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from twa_scale.kernels.emit import FUSED, LANES, Emitter, splat
from twa_scale.kernels.loops import FLOAT0, U, compiled, exact, widen

ONE, TWO, THREE = U(1), U(2), U(3)
_TILE = U(512)
_ABREAST = 4  # vectors of sums, each of which waits for its own last addition
_COLUMNS = U(_ABREAST * LANES)


@compiled
def checksums(bits: Any, pitch: int, m: int, total: Any) -> None:
    """Add the sum of `m` integers of each row, `pitch` apart, to total (n,), int64."""
    for i in range(U(len(total))):
        part = np.int64(0)
        for j in range(U(i) * U(pitch), U(i) * U(pitch) + U(m)):
            part += np.int64(bits[j])
        total[i] += part


@exact
def center(
    source: Any, pitch: int, weights: Any, reference: int, rows: Any, stride: int, start: int, stop: int
) -> None:
    """Write columns [start, stop) of w_i - c and, last, c into rows `stride` apart.

    The sources w_i are `pitch` apart, and may be the rows themselves.
    """
    n, first, end, pitch, stride, reference = map(U, (len(weights), start, stop, pitch, stride, reference))
    rest = end - (end - first) % _COLUMNS
    for t in range(first, rest, _COLUMNS):
        subtract_mean(source, pitch, weights, n, reference, rows, stride, t)
    for t in range(rest, end):
        base, shift = widen(source[reference * pitch + t]), FLOAT0
        for i in range(n):
            shift += weights[i] * (widen(source[i * pitch + t]) - base)
        for i in range(n):
            rows[i * stride + t] = widen(source[i * pitch + t]) - base - shift
        rows[n * stride + t] = base + shift


@intrinsic
def subtract_mean(typing, source, pitch, weights, n, reference, rows, stride, at):  # type: ignore[no-untyped-def]
    """Do what `center` does for 64 columns, of which the sources are read twice and nothing else is kept."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        names = "source pitch weights n reference rows stride at"
        v = Emitter(context, builder, signature.args, arguments, names)
        columns = [v.at(v["at"], c * LANES) for c in range(_ABREAST)]

        def differences(row: Any) -> list[Any]:
            start = builder.mul(row, v["pitch"])
            return [builder.fsub(v.floats("source", v.at(start, c)), b) for c, b in zip(columns, bases, strict=True)]

        start = builder.mul(v["reference"], v["pitch"])
        bases = [v.floats("source", v.at(start, column)) for column in columns]
        shifts = [v.variable(splat(0.0)) for _ in columns]
        with cgutils.for_range(builder, v["n"]) as row:
            weight = v.spread("weights", row.index)
            for shift, difference in zip(shifts, differences(row.index), strict=True):
                shift.set(builder.fadd(shift.get(), builder.fmul(weight, difference, flags=FUSED), flags=FUSED))
        with cgutils.for_range(builder, v["n"]) as row:
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
def squares(rows: Any, stride: int, n: int, start: int, stop: int, total: Any) -> None:
    """Add <row_i, row_i> over columns [start, stop) to total (n,), float64."""
    for i in range(U(n)):
        part = 0.0
        for j in range(U(i) * U(stride) + U(start), U(i) * U(stride) + U(stop)):
            part += np.float64(rows[j]) * np.float64(rows[j])
        total[i] += part


@compiled
def gram(rows: Any, stride: int, n: int, start: int, stop: int, total: Any) -> None:
    """Add <row_i, row_j> over columns [start, stop) to total, float64, for i <= j < n.

    The size of total is a multiple of three, so up to two more than n.
    """
    n, end, stride, size = U(n), U(stop), U(stride), U(len(total))
    wide = np.zeros((size, _TILE + U(8)))  # rows a power of two apart would all want the same places in the cache
    for t in range(U(start), end, _TILE):
        width = min(_TILE, end - t)
        for i in range(n):
            at = i * stride + t
            for j in range(width):
                wide[i, j] = rows[at + j]
        for i in range(U(0), size, THREE):
            for k in range(i, size, THREE):
                _products(wide, i, k, width, total)


@compiled
def _products(wide: Any, i: Any, k: Any, width: Any, total: Any) -> None:
    """Add the products of rows i to i + 2 with rows k to k + 2: nine for six loads."""
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

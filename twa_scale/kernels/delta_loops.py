"""The inner loops that make deltas of candidates on a CPU, as in loops.py. What they work on stays in the first cache.

Differences are taken as they are written: fast math could turn (w - r) - s into w - (r + s), and candidates that agree
would no longer give zeros.
"""

from typing import Any

import numpy as np

from twa_scale.kernels.loops import FLOAT0, U, compiled, exact, widen

ONE, TWO, THREE = U(1), U(2), U(3)
_TILE = U(512)


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
    n, end, pitch, stride = U(len(weights)), U(stop), U(pitch), U(stride)
    base, shift = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for t in range(U(start), end, _TILE):
        width = min(_TILE, end - t)
        at = U(reference) * pitch + t
        for j in range(width):
            base[j] = widen(source[at + j])
            shift[j] = FLOAT0
        for i in range(n):
            _subtract(source, i * pitch + t, base, rows, i * stride + t, width)
            _add(shift, weights[i], rows, i * stride + t, width)
        for i in range(n):
            at = i * stride + t
            for j in range(width):
                rows[at + j] -= shift[j]
        at = n * stride + t
        for j in range(width):
            rows[at + j] = base[j] + shift[j]


@exact
def _subtract(source: Any, start: Any, base: Any, rows: Any, to: Any, width: Any) -> None:
    for j in range(width):
        rows[to + j] = widen(source[start + j]) - base[j]


@exact
def _add(shift: Any, weight: Any, rows: Any, start: Any, width: Any) -> None:
    for j in range(width):
        shift[j] += weight * rows[start + j]


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

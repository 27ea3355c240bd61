"""The inner loops over packed rows on a CPU. The argument `rows` is (words, scales, (n, m, lead)) of a `Packed`."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from twa_scale.kernels.numba.intrinsics import LANES, WIDE
from twa_scale.kernels.numba.loops import FLOAT0, U, compiled, inlined, narrow, widen
from twa_scale.kernels.numba.packed_vectors import (
    add_dots,
    quantize_factors,
    quantize_gradient,
    store_fence,
    store_past_caches,
    sum_rows,
)
from twa_scale.kernels.packed_rows import BLOCKS, RUN

ONE, SIXTEEN, CHUNK = U(1), U(LANES), U(WIDE)
_BLOCKS = tuple(BLOCKS.get(bits, 0) for bits in range(9))
_LARGE = U(1 << 18)  # elements, from which the output does not stay in a cache until it is read


@inlined
def sizes(bits: Any) -> Any:
    """Return the number of elements of a block, and of fields of a word."""
    return U(_BLOCKS[bits]), U(16 // bits)


@inlined
def extent(shape: Any, bits: Any, t: Any) -> Any:
    """Return the extent of tile `t`.

    Returns:
        The number of missing first elements, the end of the elements, the number of words and of scales of a row, and
        the first index of its words and of its scales.
    """
    n, m, lead = shape
    block, fields = sizes(bits)
    tile = block * fields
    used = min(tile, lead + m - t * tile)
    blocks = (used + block - ONE) // block
    return lead if t == U(0) else U(0), used, min(block, used), blocks, t * n * block, t * n * fields


@inlined
def _chunks(n: Any, fields: Any) -> Any:
    """Return the number of vectors of 16 scales that hold the scales of a tile, rounded up to an even number."""
    return (n * fields + CHUNK - ONE) // CHUNK * U(2)


@inlined
def _padded(source: Any, first: Any, n: Any, width: Any, target: Any, pitch: Any) -> None:
    """Copy n contiguous rows to rows with stride `pitch`."""
    if width == pitch:
        for q in range(n * pitch):
            target[q] = source[first + q]
    else:
        for i in range(n):
            for k in range(width):
                target[i * pitch + k] = source[first + i * width + k]


@inlined
def _project(bits: Any, rows: Any, gradient: Any, start: int, stop: int, total: Any) -> None:
    words, scales, shape = rows
    n, _, lead = shape
    block, fields = sizes(bits)
    tile, chunks = block * fields, _chunks(n, fields)
    factors, lanes = np.empty(chunks * SIXTEEN, np.float32), np.zeros(n * SIXTEEN, np.float32)
    own, padded = np.zeros(chunks * SIXTEEN, np.uint16), np.zeros(n * block, np.int16)
    right, integers, units = np.empty(tile, np.float32), np.empty(tile, np.int16), np.empty(SIXTEEN, np.float32)
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = extent(shape, bits, t)
        if skip == U(0) and used == tile:
            quantize_gradient(bits, integers, units, gradient, t * tile - lead)
        else:
            right[:] = FLOAT0
            own[:] = np.uint16(0)
            for j in range(skip, used):
                right[j] = widen(gradient[t * tile + j - lead])
            quantize_gradient(bits, integers, units, right, U(0))
        _padded(scales, scale, n, blocks, own, fields)
        if width == block:
            add_dots(bits, lanes, words, word, n, own, factors, chunks, integers, units)
        else:
            _padded(words, word, n, width, padded, block)
            add_dots(bits, lanes, padded, U(0), n, own, factors, chunks, integers, units)
        if (t + ONE) % U(RUN) == U(0) or t + ONE == U(stop):
            for i in range(n):
                row = FLOAT0
                for j in range(i * SIXTEEN, (i + ONE) * SIXTEEN):
                    row += lanes[j]
                total[i] += row
            lanes[:] = FLOAT0


@inlined
def _combine(bits: Any, rows: Any, weights: Any, base: Any, center: Any, out: Any, start: int, stop: int) -> None:
    words, scales, shape = rows
    n, m, lead = shape
    block, fields = sizes(bits)
    tile, chunks = block * fields, _chunks(n, fields)
    factors, total = np.empty(chunks * SIXTEEN, np.float32), np.empty(tile, np.float32)
    own, padded = np.zeros(chunks * SIXTEEN, np.uint16), np.zeros(n * block, np.int16)
    pairs, firsts = np.empty(chunks * SIXTEEN // U(2), np.int32), np.empty(SIXTEEN, np.int32)
    units, each = np.empty(SIXTEEN, np.float32), np.zeros(chunks * SIXTEEN, np.float32)
    for i in range(n):
        each[i * fields : (i + ONE) * fields] = weights[i]
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = extent(shape, bits, t)
        if used < tile:
            own[:] = np.uint16(0)
        _padded(scales, scale, n, blocks, own, fields)
        quantize_factors(bits, pairs, firsts, units, factors, own, each, chunks)
        if width == block:
            sum_rows(bits, total, words, word, n, pairs, firsts, units)
        else:
            _padded(words, word, n, width, padded, block)
            sum_rows(bits, total, padded, U(0), n, pairs, firsts, units)
        if (
            m >= _LARGE
            and used == tile
            and skip == U(0)
            and store_past_caches(out, t * tile - lead, center, base, total, tile)
        ):
            continue
        for j in range(skip, used):
            at = t * tile + j - lead
            out[at] = narrow(out, center * base[at] + total[j])
    store_fence()


class Loops(NamedTuple):
    """The compiled loops for one number of bits. They process tiles [start, stop)."""

    project: Callable[..., None]
    """Adds <row_i, gradient> to `total`, (n,), float64."""
    combine: Callable[..., None]
    """Writes center * base + sum_i weights_i row_i."""


@cache
def packed_loops(bits: int) -> Loops:
    """Return the loops for a constant number of bits, so that the compiler unrolls the code that depends on it."""

    @partial(compiled, variant=bits)
    def project(rows: Any, gradient: Any, start: int, stop: int, total: Any) -> None:
        _project(bits, rows, gradient, start, stop, total)

    @partial(compiled, variant=bits)
    def combine(rows: Any, weights: Any, base: Any, center: Any, out: Any, start: int, stop: int) -> None:
        _combine(bits, rows, weights, base, center, out, start, stop)

    return Loops(project, combine)

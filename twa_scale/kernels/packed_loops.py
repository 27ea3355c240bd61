"""The inner loops over packed rows on a CPU, as in loops.py."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from twa_scale.kernels.emit import LANES, WIDE
from twa_scale.kernels.loops import FLOAT0, U, bfloat16, compiled, inlined, narrow, widen
from twa_scale.kernels.vectors import add_dots, number_gradient, number_rows, sum_rows, write, written

ONE, SIXTEEN, CHUNK = U(1), U(LANES), U(WIDE)
FLUSH = 16
"""Tiles whose products are added in float32."""
_LARGE = U(1 << 18)  # elements: what is written is not read from a cache next
_TOGETHER = U(16)  # blocks that are quantized at a time


@inlined
def _sizes(bits: Any) -> Any:
    """Return the elements of a block, and the fields of a word."""
    return U(64) if bits >= 4 else U(128), U(16 // bits)


@inlined
def _extent(shape: Any, bits: Any, t: Any) -> Any:
    """Return of a tile its absent first elements, its end, the words and the scales of a row, and where both start."""
    n, m, lead = shape
    block, fields = _sizes(bits)
    tile = block * fields
    used = min(tile, lead + m - t * tile)
    blocks = (used + block - ONE) // block
    return lead if t == U(0) else U(0), used, min(block, used), blocks, t * n * block, t * n * fields


@inlined
def _chunks(n: Any, fields: Any) -> Any:
    """Return how many vectors of 16 the scales of a tile fill, an even number."""
    return (n * fields + CHUNK - ONE) // CHUNK * U(2)


@inlined
def _padded(source: Any, first: Any, n: Any, width: Any, target: Any, pitch: Any) -> None:
    """Copy n rows that lie close to each other to rows `pitch` apart."""
    if width == pitch:
        for q in range(n * pitch):
            target[q] = source[first + q]
    else:
        for i in range(n):
            for k in range(width):
                target[i * pitch + k] = source[first + i * width + k]


@inlined
def _project(bits: Any, words: Any, scales: Any, shape: Any, gradient: Any, start: int, stop: int, total: Any) -> None:
    n, _, lead = shape
    block, fields = _sizes(bits)
    tile, chunks = block * fields, _chunks(n, fields)
    factors, lanes = np.empty(chunks * SIXTEEN, np.float32), np.zeros(n * SIXTEEN, np.float32)
    own, padded = np.zeros(chunks * SIXTEEN, np.uint16), np.zeros(n * block, np.int16)
    right, numbers, units = np.empty(tile, np.float32), np.empty(tile, np.int16), np.empty(SIXTEEN, np.float32)
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = _extent(shape, bits, t)
        if skip == U(0) and used == tile:
            number_gradient(bits, numbers, units, gradient, t * tile - lead)
        else:
            right[:] = FLOAT0
            own[:] = np.uint16(0)
            for j in range(skip, used):
                right[j] = widen(gradient[t * tile + j - lead])
            number_gradient(bits, numbers, units, right, U(0))
        _padded(scales, scale, n, blocks, own, fields)
        if width == block:
            add_dots(bits, lanes, words, word, n, own, factors, chunks, numbers, units)
        else:
            _padded(words, word, n, width, padded, block)
            add_dots(bits, lanes, padded, U(0), n, own, factors, chunks, numbers, units)
        if (t + ONE) % U(FLUSH) == U(0) or t + ONE == U(stop):
            for i in range(n):
                row = FLOAT0
                for j in range(i * SIXTEEN, (i + ONE) * SIXTEEN):
                    row += lanes[j]
                total[i] += row
            lanes[:] = FLOAT0


@inlined
def _combine(
    bits: Any,
    words: Any,
    scales: Any,
    shape: Any,
    weights: Any,
    base: Any,
    center: Any,
    out: Any,
    start: int,
    stop: int,
) -> None:
    n, m, lead = shape
    block, fields = _sizes(bits)
    tile, chunks = block * fields, _chunks(n, fields)
    factors, total = np.empty(chunks * SIXTEEN, np.float32), np.empty(tile, np.float32)
    own, padded = np.zeros(chunks * SIXTEEN, np.uint16), np.zeros(n * block, np.int16)
    pairs, firsts = np.empty(chunks * SIXTEEN // U(2), np.int32), np.empty(SIXTEEN, np.int32)
    units, each = np.empty(SIXTEEN, np.float32), np.zeros(chunks * SIXTEEN, np.float32)
    for i in range(n):
        each[i * fields : (i + ONE) * fields] = weights[i]
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = _extent(shape, bits, t)
        if used < tile:
            own[:] = np.uint16(0)
        _padded(scales, scale, n, blocks, own, fields)
        number_rows(bits, pairs, firsts, units, factors, own, each, chunks)
        if width == block:
            sum_rows(bits, total, words, word, n, pairs, firsts, units)
        else:
            _padded(words, word, n, width, padded, block)
            sum_rows(bits, total, padded, U(0), n, pairs, firsts, units)
        if m >= _LARGE and used == tile and skip == U(0) and write(out, t * tile - lead, center, base, total, tile):
            continue
        for j in range(skip, used):
            at = t * tile + j - lead
            out[at] = narrow(out, center * base[at] + total[j])
    written()


@inlined
def _pack(
    bits: Any,
    words: Any,
    scales: Any,
    shape: Any,
    b: int,
    values: Any,
    stride: int,
    count: int,
    rule: Any,
    start: int,
    stop: int,
) -> None:
    """Quantize rows [start, stop) of `values`, `stride` apart and `count` long, into blocks b and following.

    Step by step for some blocks: each step of one waits for the one before, and the others have work meanwhile.
    """
    _, _, lead = shape
    block, fields = _sizes(bits)
    unit, refinements, least = rule
    middle = np.float32(ONE << (bits - ONE))
    code = (middle - np.float32(0.0 if bits >= 4 else 0.5), np.float32((ONE << bits) - ONE))
    scale = np.empty(_TOGETHER, np.float32)
    for i in range(U(start), U(stop)):
        at, end, g = i * U(stride), i * U(stride) + U(count), U(b)
        low = lead if b == 0 else U(0)
        while at < end:
            size = min(block - low, end - at)
            several = max(ONE, min(_TOGETHER, (end - at) // block)) if size == block else ONE
            for s in range(several):
                place = at + s * size
                found = _size(values, place, U(64), bits) if size == U(64) else _size(values, place, size, bits)
                scale[s] = _rounded(unit * found, least)
            for _ in range(refinements):
                for s in range(several):
                    place = at + s * size
                    if size == U(64):
                        scale[s] = _rounded(_fitted(values, place, U(64), scale[s], code), least)
                    else:
                        scale[s] = _rounded(_fitted(values, place, size, scale[s], code), least)
            for s in range(several):
                t = (g + s) // fields
                k = g + s - t * fields
                _, _, width, blocks, word, first = _extent(shape, bits, t)
                scales[first + i * blocks + k] = narrow(scales, scale[s])
                to, place, shift = word + i * width + low, at + s * size, np.int16(bits * k)
                if size == U(64):
                    _place(words, to, shift, values, place, U(64), scale[s], code)
                else:
                    _place(words, to, shift, values, place, size, scale[s], code)
            at += several * size
            g += several
            low = U(0)


@compiled
def _size(values: Any, at: Any, count: Any, bits: Any) -> Any:
    """Return the largest magnitude of `count` elements, or with few bits their mean one."""
    if bits >= 4:
        largest = np.uint32(0)
        for j in range(at, at + count):  # finite magnitudes are in the order of their bits, and integers vectorize
            largest = max(largest, np.uint32(np.float32(values[j]).view(np.uint32) & np.uint32(0x7FFFFFFF)))
        return np.uint32(largest).view(np.float32)
    total = FLOAT0
    for j in range(at, at + count):
        total += abs(values[j])
    return total / np.float32(count)


@compiled
def _fitted(values: Any, at: Any, count: Any, scale: Any, code: Any) -> Any:
    """Return the scale that fits best to the codes that `scale` gives: quantize.py's rule."""
    zero, top = code
    inverse = _inverse(scale)
    along = square = FLOAT0
    for j in range(at, at + count):
        level = np.float32(_code(values[j] * inverse, zero, top)) - zero
        along += values[j] * level
        square += level * level
    return along / max(square, np.float32(0.25))


@compiled
def _place(words: Any, to: Any, shift: Any, values: Any, at: Any, count: Any, scale: Any, code: Any) -> None:
    """Put codes into their field of `count` words."""
    zero, top = code
    inverse = _inverse(scale)
    for j in range(count):
        words[to + j] = np.int16(words[to + j] | np.int16(_code(values[at + j] * inverse, zero, top) << shift))


@compiled
def _code(level: Any, zero: Any, top: Any) -> Any:
    # What is not below zero, a conversion rounds down.
    return np.int32(min(max(level + (zero + np.float32(0.5)), FLOAT0), top))


@compiled
def _inverse(scale: Any) -> Any:
    return np.float32(1) / scale if scale > FLOAT0 else FLOAT0


@compiled
def _rounded(scale: Any, least: Any) -> Any:
    return widen(bfloat16(scale if scale >= least else FLOAT0))


class Loops(NamedTuple):
    """The loops for one number of bits. `shape` is (n, m, lead) of a Packed; tiles [start, stop) are worked on."""

    project: Callable[..., None]
    """Add <row_i, gradient> to total (n,), float64."""
    combine: Callable[..., None]
    """Write center * base + sum_i weights_i row_i."""
    pack: Callable[..., None]
    """Quantize rows [start, stop) of `values`, `stride` apart and `count` long, into blocks b and following."""


@cache
def packed_loops(bits: int) -> Loops:
    """Return the loops in which the number of bits is a constant, so that the compiler unrolls what depends on it."""

    @compiled
    def project(words: Any, scales: Any, shape: Any, gradient: Any, start: int, stop: int, total: Any) -> None:
        _project(bits, words, scales, shape, gradient, start, stop, total)

    @compiled
    def combine(
        words: Any, scales: Any, shape: Any, weights: Any, base: Any, center: Any, out: Any, start: int, stop: int
    ) -> None:
        _combine(bits, words, scales, shape, weights, base, center, out, start, stop)

    @compiled
    def pack(
        words: Any,
        scales: Any,
        shape: Any,
        b: int,
        values: Any,
        stride: int,
        count: int,
        rule: Any,
        start: int,
        stop: int,
    ) -> None:
        _pack(bits, words, scales, shape, b, values, stride, count, rule, start, stop)

    return Loops(project, combine, pack)

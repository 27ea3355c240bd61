"""The inner loop that quantizes on a CPU, as in loops.py, by the rule of quantize.py: 16 blocks at once, one a lane."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from twa_scale.kernels.numba.intrinsics import FLOAT, FLOATS, FUSED, HALF, INTS, LANES, Join, splat
from twa_scale.kernels.numba.loops import FLOAT0, U, inlined
from twa_scale.kernels.numba.packed_loops import ONE, SIXTEEN, extent, sizes
from twa_scale.kernels.numba.packed_vectors import Tile, of_tile
from twa_scale.kernels.packed_rows import zero_of
from twa_scale.kernels.torch.quantize import EXTREMES, MEAN_SIZE, REFINEMENTS, SMALLEST

Part = Callable[[Any, int], Any]
"""Gives 16 neighbours of block k, an index at run time, from element c on."""


@inlined
def quantize(bits: Any, rows: Any, at: Any, deltas: Any, stride: Any, walk: Any, count: Any, errors: Any) -> None:
    """Put the first `count` columns of n rows of `deltas`, `stride` apart, into blocks, and what these hold over them.

    `at` counts the columns of `rows`, which are as in packed_loops.py, from the beginning of the first block. A block
    begins there, or the rows. `walk` is the order of the rows, and for each the one to which it is relative, n for
    none. The squared norms of the errors are added to `errors`, (n,), float64.
    """
    words, scales, _ = rows
    order, before = walk
    n = U(len(order))
    block, fields = sizes(bits)
    most = SIXTEEN * block
    packed, padded, off = np.empty(most // fields, np.int16), np.empty(most, np.float32), np.empty(SIXTEEN, np.float32)
    found, present = np.empty(SIXTEEN, np.uint16), np.empty(SIXTEEN, np.float32)
    done, end, tile = U(0), count, at // (block * fields)
    low = at - tile * block * fields
    while done < end:  # rows within columns: those of a tile lie beside each other
        high = min(most, low + end - done)
        size = high - low
        for k in range(SIXTEEN):
            present[k] = max(ONE, _inside(high, k, block) - _inside(low, k, block))
        for p in range(n):
            i, error = order[p], 0.0
            source, base = i * stride + done, before[p] * stride + done
            if before[p] != n:
                for j in range(size):
                    deltas[source + j] -= deltas[base + j]
            if size == most:
                first = tile * n + i
                quantize_blocks(bits, words, scales, off, present, deltas, source, first * block, first * fields, n)
                for j in range(SIXTEEN):
                    error += np.float64(off[j])
            else:
                padded[:] = FLOAT0
                for j in range(size):
                    padded[low + j] = deltas[source + j]
                quantize_blocks(bits, packed, found, off, present, padded, U(0), U(0), U(0), ONE)
                for j in range(size):
                    difference = np.float64(deltas[source + j] - padded[low + j])
                    error += difference * difference
                    deltas[source + j] = padded[low + j]
                _clear_absent(bits, packed, low, high)
                _place(bits, rows, tile, i, packed, found, low, high)
            if before[p] != n:
                for j in range(size):
                    deltas[source + j] += deltas[base + j]
            errors[i] += error
        done += size
        tile += SIXTEEN // fields
        low = U(0)


@inlined
def _place(bits: Any, rows: Any, tile: Any, i: Any, packed: Any, found: Any, low: Any, high: Any) -> None:
    """Put the words and the scales of row i of some tiles, which are not all there, where they belong."""
    words, scales, shape = rows
    block, fields = sizes(bits)
    for t in range((high + fields * block - ONE) // (fields * block)):
        _, _, width, blocks, word, scale = extent(shape, bits, tile + t)
        for j in range(width):
            words[word + i * width + j] |= packed[t * block + j]
        first, last = _inside(low, t, block * fields), _inside(high, t, block * fields)
        for k in range(first // block, (last + block - ONE) // block):
            scales[scale + i * blocks + k] = found[t * fields + k]


@inlined
def _inside(place: Any, k: Any, size: Any) -> Any:
    """Return how much of the k-th of some parts of a size lies before a place."""
    return min(max(place, k * size) - k * size, size)


@inlined
def _clear_absent(bits: Any, packed: Any, low: Any, high: Any) -> None:
    """Take the codes of zeros out of the fields that are absent."""
    block, fields = sizes(bits)
    for k in range(SIXTEEN):
        to, code = k // fields * block, np.int16(1 << (bits - 1) << k % fields * bits)
        for j in range(_inside(low, k, block)):
            packed[to + j] ^= code
        for j in range(_inside(high, k, block), block):
            packed[to + j] ^= code


@intrinsic
def quantize_blocks(  # type: ignore[no-untyped-def]
    typing, bits, words, scales, off, present, values, at, word, scale, n
):
    """Write words and scales of a row of 16 blocks, of which `present` elements count and the others are 0.

    The first go to `word` and `scale`, those of the tiles that follow are n rows farther. Values become what the codes
    stand for, and `off` 16 parts of the squared norm of what they change by.
    """
    names = "words scales off present values at word scale n"
    return of_tile(_quantize_blocks, names, bits, words, scales, off, present, values, at, word, scale, n)


def _quantize_blocks(v: Tile) -> None:
    b, values, present = v.build, _values(v), v.load("present", 0)
    for name, count in (("inverses", LANES), ("units", LANES), ("joined", LANES * LANES)):
        v.room(name, FLOAT, count)
    if v.bits >= 4:
        low, high = (_of_blocks(v, values, partial(_chosen, v, order)) for order in "<>")
        below, (far, near) = b.fneg(low), EXTREMES[v.bits]
        extents = (b.fmul(_chosen(v, o, below, high), splat(unit)) for o, unit in ((">", far), ("<", near)))
        extent = _chosen(v, ">", *extents)
        first = b.select(b.fcmp_ordered(">=", below, high), extent, b.fneg(extent))
    else:
        total = _of_blocks(v, lambda k, c: b.bitcast(v.magnitudes(values(k, c)), FLOATS), b.fadd)
        first = b.fmul(b.fdiv(total, present), splat(MEAN_SIZE))
    scales = v.variable(_rounded(v, first))
    if REFINEMENTS[v.bits]:
        with cgutils.for_range(b, v.at(REFINEMENTS[v.bits])):
            scales.set(_rounded(v, _fitted(v, present, scales.get())))
    _write_codes(v, scales.get())


def _write_codes(v: Tile, scales: Any) -> None:
    """Write scales and codes, and over the values what these stand for."""
    b, values, off = v.build, _values(v), v.variable(splat(0.0))
    _use(v, scales)
    halves = v.bfloat16(scales)
    for k in range(0, LANES, v.fields):
        v.store("scales", v.at(v["scale"], v.times(v["n"], k)), v.shuffle(halves, halves, range(k, k + v.fields)))
    with (
        cgutils.for_range(b, v.at(LANES // v.fields)) as tile,
        cgutils.for_range(b, v.at(v.block // LANES)) as part,
    ):
        c, words = v.times(part.index, LANES), splat(0)
        for f in range(v.fields):
            k = v.at(v.times(tile.index, v.fields), f)
            some = values(k, c)
            code = _codes(v, some, k)
            kept = b.fmul(_level(v, code), v.spread("units", k))
            error = b.fsub(some, kept)
            off.set(b.fadd(off.get(), b.fmul(error, error)))
            v.store("values", v.at(v["at"], v.times(k, v.block), c), kept)
            words = b.or_(words, b.shl(code, splat(v.bits * f)))
        word = v.at(v["word"], b.mul(v["n"], v.times(tile.index, v.block)), c)
        v.store("words", word, b.trunc(words, ir.VectorType(HALF, LANES)))
    v.store("off", 0, off.get())


def _values(v: Tile) -> Part:
    return lambda k, c: v.load("values", v.at(v["at"], v.times(k, v.block), c))


def _use(v: Tile, scales: Any) -> None:
    """Have `_codes` and `_write_codes` use these scales."""
    some = v.build.fcmp_ordered("!=", scales, splat(0.0))
    v.store("inverses", 0, v.build.select(some, v.build.fdiv(splat(1.0), scales), splat(0.0)))
    v.store("units", 0, scales)


def _of_blocks(v: Tile, part: Part, join: Join) -> Any:
    """Join the elements of each of 16 blocks: lane l has block l. The loop keeps the machine code short."""
    with cgutils.for_range(v.build, v.at(LANES)) as block:
        vectors = (part(block.index, c) for c in range(0, v.block, LANES))
        v.store("joined", v.times(block.index, LANES), reduce(join, vectors))
    return _joined(v, join, 0, LANES)


def _joined(v: Tile, join: Join, first: int, count: int) -> Any:
    """Join the lanes of each of `count` vectors; lane l has that of first + l % count."""
    if count == 1:
        return v.load("joined", first * LANES)
    half = count // 2
    a, b = (_joined(v, join, k, half) for k in (first, first + half))
    one = [lane if lane % count < half else LANES + lane - half for lane in range(LANES)]
    other = [lane + half if lane % count < half else LANES + lane for lane in range(LANES)]
    return join(v.shuffle(a, b, one), v.shuffle(a, b, other))


def _fitted(v: Tile, present: Any, scales: Any) -> Any:
    """Return the scales that fit best to the codes that `scales` give: quantize.py's rule."""
    b, values, zero = v.build, _values(v), zero_of(v.bits)
    _use(v, scales)

    def level(k: Any, c: int) -> Any:
        return _level(v, _codes(v, values(k, c), k))

    along = _of_blocks(v, lambda k, c: b.fmul(values(k, c), level(k, c)), b.fadd)
    square = _of_blocks(v, lambda k, c: b.fmul(level(k, c), level(k, c)), b.fadd)
    of_absent = b.fmul(b.fsub(splat(float(v.block)), present), splat((zero % 1) ** 2))  # the level of 0
    square = b.fsub(square, of_absent)
    return b.fdiv(along, _chosen(v, ">", square, splat(0.25)))


def _level(v: Tile, codes: Any) -> Any:
    return v.build.fsub(v.build.sitofp(codes, FLOATS), splat(zero_of(v.bits)))


def _codes(v: Tile, values: Any, k: Any) -> Any:
    """Return the codes of elements of block k: what is not below zero, a conversion rounds down.

    With 8 and 4 bits nothing has to be clipped. A scale is rounded by up to 1 / 256, so that extremes come to lie at
    1.004 and 255.996 of [0, 256), or at 0.47 and 15.53 of [0, 16).
    """
    b, zero, top = v.build, splat(0.0), splat(float((1 << v.bits) - 1))
    level = b.fmul(values, v.spread("inverses", k), flags=FUSED)
    level = b.fadd(level, splat(zero_of(v.bits) + 0.5), flags=FUSED)
    inside = level if v.bits >= 4 else _chosen(v, "<", _chosen(v, ">", level, zero), top)
    return b.fptosi(inside, INTS)


def _rounded(v: Tile, scales: Any) -> Any:
    """Return scales as bfloat16 holds them, but zero for the smallest."""
    b = v.build
    some = b.fcmp_ordered(">=", b.bitcast(v.magnitudes(scales), FLOATS), splat(SMALLEST))
    return v.widened(v.bfloat16(b.select(some, scales, splat(0.0))))


def _chosen(v: Tile, order: str, a: Any, b: Any) -> Any:
    """Return the larger (">") or the smaller ("<") of floats."""
    return v.build.select(v.build.fcmp_ordered(order, a, b), a, b)

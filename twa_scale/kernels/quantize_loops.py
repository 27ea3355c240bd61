"""The inner loop that quantizes on a CPU, as in loops.py, by the rule of quantize.py: 16 blocks at once, one a lane."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from twa_scale.kernels.emit import FLOATS, FUSED, HALF, INTS, LANES, Join, splat
from twa_scale.kernels.loops import FLOAT0, U, inlined
from twa_scale.kernels.packed import zero_of
from twa_scale.kernels.packed_loops import ONE, SIXTEEN, extent, sizes
from twa_scale.kernels.quantize import EXTREMES, MEAN_SIZE, REFINEMENTS, SMALLEST
from twa_scale.kernels.vectors import Tile, of_tile

Part = Callable[[int, int], Any]
"""Gives 16 neighbours of block k from element c on."""


@inlined
def quantize(bits: Any, rows: Any, at: Any, values: Any, stride: Any, n: Any, count: Any) -> None:
    """Put the first `count` columns of n rows of `values`, `stride` apart, into blocks.

    `at` counts the columns of `rows`, which are as in packed_loops.py, from the beginning of the first block. A block
    begins there, or the rows.
    """
    words, scales, shape = rows
    block, fields = sizes(bits)
    most = SIXTEEN * block
    packed, padded = np.empty(most // fields, np.int16), np.empty(most, np.float32)
    found, present = np.empty(SIXTEEN, np.uint16), np.empty(SIXTEEN, np.float32)
    done, end, tile = U(0), count, at // (block * fields)
    low = at - tile * block * fields
    while done < end:  # rows within columns: those of a tile lie beside each other
        high = min(most, low + end - done)
        for k in range(SIXTEEN):
            present[k] = max(ONE, _inside(high, k, block) - _inside(low, k, block))
        for i in range(n):
            source = i * stride + done
            if high - low == most:
                first = tile * n + i
                quantize_blocks(bits, words, scales, present, values, source, first * block, first * fields, n)
                continue
            padded[:] = FLOAT0
            padded[low:high] = values[source : source + high - low]
            quantize_blocks(bits, packed, found, present, padded, U(0), U(0), U(0), ONE)
            _clear_absent(bits, packed, low, high)
            for t in range((high + fields * block - ONE) // (fields * block)):
                _, _, width, blocks, word, scale = extent(shape, bits, tile + t)
                for j in range(width):
                    words[word + i * width + j] |= packed[t * block + j]
                first, last = _inside(low, t, block * fields), _inside(high, t, block * fields)
                for k in range(first // block, (last + block - ONE) // block):
                    scales[scale + i * blocks + k] = found[t * fields + k]
        done += high - low
        tile += SIXTEEN // fields
        low = U(0)


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
def quantize_blocks(typing, bits, words, scales, present, values, at, word, scale, n):  # type: ignore[no-untyped-def]
    """Write words and scales of a row of 16 blocks, of which `present` elements count and the others are 0.

    The first go to `word` and `scale`, those of the tiles that follow are n rows farther.
    """
    names = "words scales present values at word scale n"
    return of_tile(_quantize_blocks, names, bits, words, scales, present, values, at, word, scale, n)


def _quantize_blocks(v: Tile) -> None:
    b, present = v.build, v.load("present", 0)
    values: Part = lambda k, c: v.load("values", v.at(v["at"], k * v.block + c))  # noqa: E731
    if v.bits >= 4:
        low, high = _of_blocks(v, values, partial(_chosen, v, "<")), _of_blocks(v, values, partial(_chosen, v, ">"))
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
            scales.set(_rounded(v, _fitted(v, values, present, scales.get())))
    inverses, halves = _inverses(v, scales.get()), v.bfloat16(scales.get())
    for k in range(0, LANES, v.fields):
        word, scale = (v.times(v["n"], k // v.fields * size) for size in (v.block, v.fields))
        v.store("scales", v.at(v["scale"], scale), v.shuffle(halves, halves, range(k, k + v.fields)))
        for c in range(0, v.block, LANES):
            codes = [_codes(v, values(k + f, c), inverses, k + f) for f in range(v.fields)]
            words = reduce(b.or_, (b.shl(code, splat(v.bits * f)) for f, code in enumerate(codes)))
            v.store("words", v.at(v["word"], word, c), b.trunc(words, ir.VectorType(HALF, LANES)))


def _of_blocks(v: Tile, part: Part, join: Join, first: int = 0, count: int = LANES) -> Any:
    """Join the elements of each of `count` blocks; lane l has block first + l % count."""
    if count == 1:
        return reduce(join, (part(first, c) for c in range(0, v.block, LANES)))
    half = count // 2
    a, b = (_of_blocks(v, part, join, k, half) for k in (first, first + half))
    one = [lane if lane % count < half else LANES + lane - half for lane in range(LANES)]
    other = [lane + half if lane % count < half else LANES + lane for lane in range(LANES)]
    return join(v.shuffle(a, b, one), v.shuffle(a, b, other))


def _fitted(v: Tile, values: Part, present: Any, scales: Any) -> Any:
    """Return the scales that fit best to the codes that `scales` give: quantize.py's rule."""
    b, inverses, zero = v.build, _inverses(v, scales), zero_of(v.bits)

    def level(k: int, c: int) -> Any:
        return b.fsub(b.sitofp(_codes(v, values(k, c), inverses, k), FLOATS), splat(zero))

    along = _of_blocks(v, lambda k, c: b.fmul(values(k, c), level(k, c)), b.fadd)
    square = _of_blocks(v, lambda k, c: b.fmul(level(k, c), level(k, c)), b.fadd)
    of_absent = b.fmul(b.fsub(splat(float(v.block)), present), splat((zero % 1) ** 2))  # the level of 0
    square = b.fsub(square, of_absent)
    return b.fdiv(along, _chosen(v, ">", square, splat(0.25)))


def _codes(v: Tile, values: Any, inverses: Any, k: int) -> Any:
    """Return the codes of elements of block k: what is not below zero, a conversion rounds down.

    With 8 and 4 bits nothing has to be clipped. A scale is rounded by up to 1 / 256, so that extremes come to lie at
    1.004 and 255.996 of [0, 256), or at 0.47 and 15.53 of [0, 16).
    """
    b, zero, top = v.build, splat(0.0), splat(float((1 << v.bits) - 1))
    level = b.fmul(values, v.shuffle(inverses, inverses, [k] * LANES), flags=FUSED)
    level = b.fadd(level, splat(zero_of(v.bits) + 0.5), flags=FUSED)
    inside = level if v.bits >= 4 else _chosen(v, "<", _chosen(v, ">", level, zero), top)
    return b.fptosi(inside, INTS)


def _inverses(v: Tile, scales: Any) -> Any:
    some = v.build.fcmp_ordered("!=", scales, splat(0.0))
    return v.build.select(some, v.build.fdiv(splat(1.0), scales), splat(0.0))


def _rounded(v: Tile, scales: Any) -> Any:
    """Return scales as bfloat16 holds them, but zero for the smallest."""
    b = v.build
    some = b.fcmp_ordered(">=", b.bitcast(v.magnitudes(scales), FLOATS), splat(SMALLEST))
    return v.widened(v.bfloat16(b.select(some, scales, splat(0.0))))


def _chosen(v: Tile, order: str, a: Any, b: Any) -> Any:
    """Return the larger (">") or the smaller ("<") of floats."""
    return v.build.select(v.build.fcmp_ordered(order, a, b), a, b)

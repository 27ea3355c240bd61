"""The inner loop that quantizes on a CPU, as `kernels/torch/quantize.py` does, for 16 blocks at once, one per lane."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from twa_scale.kernels.numba.intrinsics import FLOAT, FLOATS, FUSED, INT16, INTS, LANES, Join, splat
from twa_scale.kernels.numba.loops import FLOAT0, OPTIONS, U, inlined
from twa_scale.kernels.numba.packed_loops import ONE, SIXTEEN, block_and_fields, extent
from twa_scale.kernels.numba.packed_vectors import TileEmitter, tile_intrinsic
from twa_scale.kernels.packed_rows import zero_of
from twa_scale.kernels.torch.quantize import EXTREMES, MEAN_SIZE, REFINEMENTS, SMALLEST

Part = Callable[[Any, int], Any]
"""A function of a block k, an index at run time, and an element c, that returns 16 consecutive elements from c on."""


def quantize(
    bits: Any, rows: Any, at: Any, deltas: Any, stride: Any, coding_order: Any, count: Any, errors: Any
) -> None:
    """Quantize the first `count` columns of n rows of `deltas`, and replace them by the rounded values.

    Args:
        bits: the number of bits of a code, a constant.
        rows: packed rows as in packed_loops.py.
        at: the column of `rows`, counted from the start of the first block, to which the first column goes. It is the
            start of a block or of the rows.
        deltas: the deltas, float32.
        stride: the row stride of `deltas`.
        coding_order: the order of the rows, and for each the row that is subtracted, where n stands for none.
        count: the number of columns.
        errors: (n,), float64, to which the squared norms of the rounding errors are added.
    """


@overload(quantize, strict=False, prefer_literal=True, jit_options=OPTIONS)  # type: ignore[untyped-decorator]
def _quantize(
    bits: Any, rows: Any, at: Any, deltas: Any, stride: Any, coding_order: Any, count: Any, errors: Any
) -> Any:
    block, fields = block_and_fields(bits.literal_value)

    def columns(
        bits: Any, rows: Any, at: Any, deltas: Any, stride: Any, coding_order: Any, count: Any, errors: Any
    ) -> None:
        words, scales, _ = rows
        order, before = coding_order
        n = U(len(order))
        capacity = SIXTEEN * block
        packed, padded, block_errors = (
            np.empty(capacity // fields, np.int16),
            np.empty(capacity, np.float32),
            np.empty(SIXTEEN, np.float32),
        )
        row_scales, present = np.empty(SIXTEEN, np.uint16), np.empty(SIXTEEN, np.float32)
        done, end, tile = U(0), count, at // (block * fields)
        low = at - tile * block * fields
        while done < end:  # The loop over rows is inside, because the rows of a tile are next to each other.
            high = min(capacity, low + end - done)
            size = high - low
            for k in range(SIXTEEN):
                present[k] = max(ONE, _inside(high, k, block) - _inside(low, k, block))
            for p in range(n):
                i, error = order[p], 0.0
                source, base = i * stride + done, before[p] * stride + done
                if before[p] != n:
                    for j in range(size):
                        deltas[source + j] -= deltas[base + j]
                if size == capacity:
                    first = tile * n + i
                    quantize_blocks(
                        bits, words, scales, block_errors, present, deltas, source, first * block, first * fields, n
                    )
                    for j in range(SIXTEEN):
                        error += np.float64(block_errors[j])
                else:
                    padded[:] = FLOAT0
                    for j in range(size):
                        padded[low + j] = deltas[source + j]
                    quantize_blocks(bits, packed, row_scales, block_errors, present, padded, U(0), U(0), U(0), ONE)
                    for j in range(size):
                        difference = np.float64(deltas[source + j] - padded[low + j])
                        error += difference * difference
                        deltas[source + j] = padded[low + j]
                    _clear_absent(bits, block, fields, packed, low, high)
                    _place(block, fields, rows, tile, i, packed, row_scales, low, high)
                if before[p] != n:
                    for j in range(size):
                        deltas[source + j] += deltas[base + j]
                errors[i] += error
            done += size
            tile += SIXTEEN // fields
            low = U(0)

    return columns


@inlined
def _place(
    block: Any, fields: Any, rows: Any, tile: Any, i: Any, packed: Any, row_scales: Any, low: Any, high: Any
) -> None:
    """Write the words and scales of row i for columns [low, high) of some tiles."""
    words, scales, shape = rows
    for t in range((high + fields * block - ONE) // (fields * block)):
        _, _, width, blocks, word, scale = extent(shape, block, fields, tile + t)
        for j in range(width):
            words[word + i * width + j] |= packed[t * block + j]
        first, last = _inside(low, t, block * fields), _inside(high, t, block * fields)
        for k in range(first // block, (last + block - ONE) // block):
            scales[scale + i * blocks + k] = row_scales[t * fields + k]


@inlined
def _inside(place: Any, k: Any, size: Any) -> Any:
    """Return how many elements of the k-th part of size `size` lie before `place`."""
    return min(max(place, k * size) - k * size, size)


@inlined
def _clear_absent(bits: Any, block: Any, fields: Any, packed: Any, low: Any, high: Any) -> None:
    """Clear the codes of elements outside [low, high)."""
    for k in range(SIXTEEN):
        to, code = k // fields * block, np.int16(1 << (bits - 1) << k % fields * bits)
        for j in range(_inside(low, k, block)):
            packed[to + j] ^= code
        for j in range(_inside(high, k, block), block):
            packed[to + j] ^= code


@intrinsic
def quantize_blocks(  # type: ignore[no-untyped-def]
    typing, bits, words, scales, block_errors, present, values, at, word, scale, n
):
    """Quantize 16 blocks of a row, and replace the values by the rounded ones.

    Words and scales of the first tile go to indices `word` and `scale`, and those of the next tiles n rows later.
    `present` is the number of elements of each block that exist; the other values are 0. `block_errors` gets 16 partial
    sums of the squared rounding errors.
    """
    names = "words scales block_errors present values at word scale n"
    return tile_intrinsic(
        _quantize_blocks, names, bits, words, scales, block_errors, present, values, at, word, scale, n
    )


def _quantize_blocks(v: TileEmitter) -> None:
    b, values, present = v.build, _values(v), v.load("present", 0)
    for name, count in (("inverses", LANES), ("units", LANES), ("vectors_of_blocks", LANES * LANES)):
        v.allocate(name, FLOAT, count)
    if v.bits >= 4:
        low, high = (_reduce_blocks(v, values, partial(_select, v, order)) for order in "<>")
        below, (far, near) = b.fneg(low), EXTREMES[v.bits]
        extents = (b.fmul(_select(v, o, below, high), splat(unit)) for o, unit in ((">", far), ("<", near)))
        extent = _select(v, ">", *extents)
        first = b.select(b.fcmp_ordered(">=", below, high), extent, b.fneg(extent))
    else:
        total = _reduce_blocks(v, lambda k, c: b.bitcast(v.magnitudes(values(k, c)), FLOATS), b.fadd)
        first = b.fmul(b.fdiv(total, present), splat(MEAN_SIZE))
    scales = v.variable(_rounded(v, first))
    if REFINEMENTS[v.bits]:
        with cgutils.for_range(b, v.at(REFINEMENTS[v.bits])):
            scales.set(_rounded(v, _fitted(v, present, scales.get())))
    _write_codes(v, scales.get())


def _write_codes(v: TileEmitter, scales: Any) -> None:
    """Write scales and codes, and replace the values by the rounded ones."""
    b, values, block_errors = v.build, _values(v), v.variable(splat(0.0))
    _set_scales(v, scales)
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
            kept = b.fmul(_level(v, code), v.broadcast_element("units", k))
            error = b.fsub(some, kept)
            block_errors.set(b.fadd(block_errors.get(), b.fmul(error, error)))
            v.store("values", v.at(v["at"], v.times(k, v.block), c), kept)
            words = b.or_(words, b.shl(code, splat(v.bits * f)))
        word = v.at(v["word"], b.mul(v["n"], v.times(tile.index, v.block)), c)
        v.store("words", word, b.trunc(words, ir.VectorType(INT16, LANES)))
    v.store("block_errors", 0, block_errors.get())


def _values(v: TileEmitter) -> Part:
    return lambda k, c: v.load("values", v.at(v["at"], v.times(k, v.block), c))


def _set_scales(v: TileEmitter, scales: Any) -> None:
    """Set the scales that `_codes` and `_write_codes` use."""
    some = v.build.fcmp_ordered("!=", scales, splat(0.0))
    v.store("inverses", 0, v.build.select(some, v.build.fdiv(splat(1.0), scales), splat(0.0)))
    v.store("units", 0, scales)


def _reduce_blocks(v: TileEmitter, part: Part, join: Join) -> Any:
    """Reduce the elements of each of 16 blocks to lane l for block l. A run-time loop keeps the machine code short."""
    with cgutils.for_range(v.build, v.at(LANES)) as block:
        vectors = (part(block.index, c) for c in range(0, v.block, LANES))
        v.store("vectors_of_blocks", v.times(block.index, LANES), reduce(join, vectors))
    return _reduce_lanes(v, join, 0, LANES)


def _reduce_lanes(v: TileEmitter, join: Join, first: int, count: int) -> Any:
    """Reduce the lanes of each of `count` vectors. Lane l gets the result of vector first + l % count."""
    if count == 1:
        return v.load("vectors_of_blocks", first * LANES)
    half = count // 2
    a, b = (_reduce_lanes(v, join, k, half) for k in (first, first + half))
    one = [lane if lane % count < half else LANES + lane - half for lane in range(LANES)]
    other = [lane + half if lane % count < half else LANES + lane for lane in range(LANES)]
    return join(v.shuffle(a, b, one), v.shuffle(a, b, other))


def _fitted(v: TileEmitter, present: Any, scales: Any) -> Any:
    """Return the least-squares scales for the codes that follow from `scales`."""
    b, values, zero = v.build, _values(v), zero_of(v.bits)
    _set_scales(v, scales)

    def level(k: Any, c: int) -> Any:
        return _level(v, _codes(v, values(k, c), k))

    along = _reduce_blocks(v, lambda k, c: b.fmul(values(k, c), level(k, c)), b.fadd)
    square = _reduce_blocks(v, lambda k, c: b.fmul(level(k, c), level(k, c)), b.fadd)
    of_absent = b.fmul(b.fsub(splat(float(v.block)), present), splat((zero % 1) ** 2))  # the level of 0
    square = b.fsub(square, of_absent)
    return b.fdiv(along, _select(v, ">", square, splat(0.25)))


def _level(v: TileEmitter, codes: Any) -> Any:
    return v.build.fsub(v.build.sitofp(codes, FLOATS), splat(zero_of(v.bits)))


def _codes(v: TileEmitter, values: Any, k: Any) -> Any:
    """Return the codes of elements of block k. The conversion to integers rounds nonnegative values down.

    With 8 and 4 bits no code has to be clipped: the rounding of a scale changes it by up to 1 / 256, so that extremes
    are at 1.004 and 255.996 in [0, 256), or at 0.47 and 15.53 in [0, 16).
    """
    b, zero, top = v.build, splat(0.0), splat(float((1 << v.bits) - 1))
    level = b.fmul(values, v.broadcast_element("inverses", k), flags=FUSED)
    level = b.fadd(level, splat(zero_of(v.bits) + 0.5), flags=FUSED)
    inside = level if v.bits >= 4 else _select(v, "<", _select(v, ">", level, zero), top)
    return b.fptosi(inside, INTS)


def _rounded(v: TileEmitter, scales: Any) -> Any:
    """Return scales rounded to bfloat16, with those below `SMALLEST` replaced by zero."""
    b = v.build
    some = b.fcmp_ordered(">=", b.bitcast(v.magnitudes(scales), FLOATS), splat(SMALLEST))
    return v.widened(v.bfloat16(b.select(some, scales, splat(0.0))))


def _select(v: TileEmitter, order: str, a: Any, b: Any) -> Any:
    """Return the lane-wise maximum (">") or minimum ("<") of floats."""
    return v.build.select(v.build.fcmp_ordered(order, a, b), a, b)

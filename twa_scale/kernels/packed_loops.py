"""The inner loops over packed rows on a CPU, as in loops.py. `shape` is (n, m, lead, bits, block) of a Packed."""

from typing import Any

import numpy as np

from twa_scale.kernels.loops import FLOAT0, U, bfloat16, compiled, narrow, widen
from twa_scale.kernels.vectors import LANES, UNIT, add_dots, sum_rows

ONE, FOUR, SIXTEEN, SIXTY_FOUR = U(1), U(4), U(LANES), U(UNIT)
_TOGETHER = U(16)  # blocks that are quantized at a time


@compiled
def _codes(bits: Any) -> Any:
    """Return for each field its mask, the factor that moves it to the lowest place, and the code of 0 in its place."""
    fields = U(32) // bits
    masks, places, zeros = np.empty(fields, np.int32), np.empty(fields, np.float32), np.empty(fields, np.float32)
    half = float(ONE << (bits - ONE))
    for k in range(fields):
        value = np.int64(1) << np.int64(bits * k)
        masks[k] = np.int32(((np.int64(1) << np.int64(bits)) - 1) * value)
        places[k] = 1.0 / value
        zeros[k] = ((half if bits >= FOUR else half - 0.5) - (half if k + ONE == fields else 0.0)) * value
    return masks, places, zeros


@compiled
def _extent(shape: Any, t: Any) -> Any:
    """Return of a tile its absent first elements, its end, the words and the scales of a row, and where both start."""
    n, m, lead, bits, block = shape
    tile = block * (U(32) // bits)
    used = min(tile, lead + m - t * tile)
    blocks = (used + block - ONE) // block
    return lead if t == U(0) else U(0), used, min(block, used), blocks, t * n * block, t * n * (U(32) // bits)


@compiled
def _factors(factors: Any, fields: Any, scales: Any, first: Any, blocks: Any, weights: Any, places: Any) -> None:
    """Fill in (n, fields): what multiplies masked words; 0 for blocks that are not there."""
    for i in range(U(len(weights))):
        for k in range(blocks):
            factors[i * fields + k] = weights[i] * places[k] * widen(scales[first + i * blocks + k])
        for k in range(blocks, fields):
            factors[i * fields + k] = FLOAT0


@compiled
def project_packed(words: Any, scales: Any, shape: Any, gradient: Any, start: int, stop: int, total: Any) -> None:
    """Add <row_i, gradient> over tiles [start, stop) to total (n,), float64."""
    n, _, lead, bits, block = shape
    fields = U(32) // bits
    tile = block * fields
    masks, places, zeros = _codes(bits)
    factors, ones, zero = np.empty(n * fields, np.float32), np.ones(n, np.float32), np.empty(fields, np.float32)
    right, lanes = np.empty(tile, np.float32), np.empty(n * SIXTEEN, np.float32)
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = _extent(shape, t)
        if skip > U(0) or used < tile:
            right[:] = FLOAT0
        for j in range(skip, used):
            right[j] = widen(gradient[t * tile + j - lead])
        for k in range(fields):
            part = FLOAT0
            for j in range(k * block, (k + ONE) * block):
                part += right[j]
            zero[k] = part * zeros[k]
        _factors(factors, fields, scales, scale, blocks, ones, places)
        lanes[:] = FLOAT0
        if width == block:
            for k in range(U(0), blocks, FOUR):
                for s in range(U(0), block, SIXTY_FOUR):
                    add_dots(lanes, words, word + s, width, n, masks, k, factors, fields, right, s, block)
        else:  # all that there is fits into one block
            for i in range(n):
                for j in range(width):
                    masked = np.float32(np.int32(words[word + i * width + j] & masks[0]))
                    lanes[i * SIXTEEN] += factors[i * fields] * masked * right[j]
        for i in range(n):
            row = FLOAT0
            for k in range(fields):
                row -= factors[i * fields + k] * zero[k]
            for j in range(i * SIXTEEN, (i + ONE) * SIXTEEN):
                row += lanes[j]
            total[i] += row


@compiled
def combine_packed(
    words: Any, scales: Any, shape: Any, weights: Any, base: Any, center: Any, out: Any, start: int, stop: int
) -> None:
    """Write center * base + sum_i weights_i row_i of tiles [start, stop)."""
    n, _, lead, bits, block = shape
    fields = U(32) // bits
    tile = block * fields
    masks, places, zeros = _codes(bits)
    factors, zero = np.empty(n * fields, np.float32), np.empty(fields, np.float32)
    total = np.empty(tile, np.float32)
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = _extent(shape, t)
        _factors(factors, fields, scales, scale, blocks, weights, places)
        zero[:] = FLOAT0
        for i in range(n):
            for k in range(fields):
                zero[k] += factors[i * fields + k] * zeros[k]
        if width == block:
            for k in range(U(0), blocks, FOUR):
                for s in range(U(0), block, SIXTY_FOUR):
                    sum_rows(total, s, words, word + s, width, n, masks, k, factors, fields, block)
        else:
            total[:] = FLOAT0
            for i in range(n):
                for j in range(width):
                    total[j] += factors[i * fields] * np.float32(np.int32(words[word + i * width + j] & masks[0]))
        for k in range(blocks):
            for j in range(max(skip, k * block), min(used, (k + ONE) * block)):
                at = t * tile + j - lead
                out[at] = narrow(out, center * base[at] + (total[j] - zero[k]))


@compiled
def pack(
    words: Any, scales: Any, shape: Any, b: int, values: Any, stride: int, count: int, rule: Any, start: int, stop: int
) -> None:
    """Quantize rows [start, stop) of `values`, `stride` apart and `count` long, into blocks b and following.

    Step by step for some blocks: each step of one waits for the one before, and the others have work meanwhile.
    """
    _, _, lead, bits, block = shape
    unit, refinements, least = rule
    fields = U(32) // bits
    half = np.float32(ONE << (bits - ONE))
    code = (half - np.float32(0.0 if bits >= FOUR else 0.5), np.float32((ONE << bits) - ONE))
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
                _, _, width, blocks, word, first = _extent(shape, t)
                scales[first + i * blocks + k] = narrow(scales, scale[s])
                to, place, shift = word + i * width + low, at + s * size, np.int32(bits * k)
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
    if bits >= FOUR:
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
        words[to + j] = np.int32(words[to + j] ^ np.int32(_code(values[at + j] * inverse, zero, top) << shift))


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

"""The inner loops over packed rows on a CPU, as in loops.py. `shape` is (n, m, lead, bits, block) of a Packed."""

from typing import Any

import numpy as np

from twa_scale.kernels.loops import FLOAT0, U, bfloat16, compiled, narrow, widen

ONE, TWO, FOUR = U(1), U(2), U(4)
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
def _dots(words: Any, at: Any, width: Any, masks: Any, right: Any, k: Any, block: Any) -> Any:
    """Return <masked words, gradient> of fields k to k + 3; `right` holds the gradient block by block."""
    m0, m1, m2, m3 = masks[k], masks[k + U(1)], masks[k + U(2)], masks[k + U(3)]
    s0 = s1 = s2 = s3 = FLOAT0
    g0 = k * block
    g1 = g0 + block
    g2 = g1 + block
    g3 = g2 + block
    for j in range(width):
        x = words[at + j]
        s0 += np.float32(np.int32(x & m0)) * right[g0 + j]
        s1 += np.float32(np.int32(x & m1)) * right[g1 + j]
        s2 += np.float32(np.int32(x & m2)) * right[g2 + j]
        s3 += np.float32(np.int32(x & m3)) * right[g3 + j]
    return s0, s1, s2, s3


@compiled
def _add(
    total: Any, words: Any, at: Any, next_at: Any, width: Any, masks: Any, factors: Any, more: Any, k: Any, block: Any
) -> None:
    """Add factor * masked words of fields k to k + 3 of two rows to `total`, block by block."""
    m0, m1, m2, m3 = masks[k], masks[k + U(1)], masks[k + U(2)], masks[k + U(3)]
    f0, f1, f2, f3 = factors[k], factors[k + U(1)], factors[k + U(2)], factors[k + U(3)]
    h0, h1, h2, h3 = more[k], more[k + U(1)], more[k + U(2)], more[k + U(3)]
    t0 = k * block
    t1 = t0 + block
    t2 = t1 + block
    t3 = t2 + block
    for j in range(width):
        x = words[at + j]
        y = words[next_at + j]
        total[t0 + j] += f0 * np.float32(np.int32(x & m0)) + h0 * np.float32(np.int32(y & m0))
        total[t1 + j] += f1 * np.float32(np.int32(x & m1)) + h1 * np.float32(np.int32(y & m1))
        total[t2 + j] += f2 * np.float32(np.int32(x & m2)) + h2 * np.float32(np.int32(y & m2))
        total[t3 + j] += f3 * np.float32(np.int32(x & m3)) + h3 * np.float32(np.int32(y & m3))


@compiled
def _factors(
    factors: Any, shifts: Any, scales: Any, at: Any, blocks: Any, weight: Any, places: Any, zeros: Any
) -> None:
    """Fill in what multiplies the masked words of a row, and add up what their zeros amount to."""
    for k in range(U(len(factors))):
        factors[k] = weight * places[k] * widen(scales[at + k]) if k < blocks else FLOAT0
        shifts[k] += factors[k] * zeros[k]


@compiled
def project_packed(words: Any, scales: Any, shape: Any, gradient: Any, start: int, stop: int, total: Any) -> None:
    """Add <row_i, gradient> over tiles [start, stop) to total (n,), float64."""
    n, _, lead, bits, block = shape
    fields = U(32) // bits
    tile = block * fields
    masks, places, zeros = _codes(bits)
    factors, shifts = np.empty(fields, np.float32), np.empty(fields, np.float32)
    right = np.empty(tile, np.float32)
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = _extent(shape, t)
        right[:] = FLOAT0
        for j in range(skip, used):
            right[j] = widen(gradient[t * tile + j - lead])
        for k in range(fields):
            part = FLOAT0
            for j in range(k * block, (k + ONE) * block):
                part += right[j]
            shifts[k] = part * zeros[k]
        for i in range(n):
            for k in range(fields):
                factors[k] = places[k] * widen(scales[scale + i * blocks + k]) if k < blocks else FLOAT0
            row = 0.0
            for k in range(U(0), blocks, FOUR):
                at = word + i * width
                if width == U(64):  # a number that is known: LLVM unrolls the loop
                    d0, d1, d2, d3 = _dots(words, at, U(64), masks, right, k, U(64))
                else:
                    d0, d1, d2, d3 = _dots(words, at, width, masks, right, k, block)
                row += factors[k] * (d0 - shifts[k]) + factors[k + U(1)] * (d1 - shifts[k + U(1)])
                row += factors[k + U(2)] * (d2 - shifts[k + U(2)]) + factors[k + U(3)] * (d3 - shifts[k + U(3)])
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
    factors, more, shifts = np.empty(fields, np.float32), np.empty(fields, np.float32), np.empty(fields, np.float32)
    total = np.empty(tile, np.float32)
    for t in range(U(start), U(stop)):
        skip, used, width, blocks, word, scale = _extent(shape, t)
        total[:] = FLOAT0
        shifts[:] = FLOAT0
        for i in range(U(0), n, TWO):
            _factors(factors, shifts, scales, scale + i * blocks, blocks, weights[i], places, zeros)
            other = min(i + ONE, n - ONE)  # an odd last row is added once, and once with weight 0
            weight = weights[other] if other > i else FLOAT0
            _factors(more, shifts, scales, scale + other * blocks, blocks, weight, places, zeros)
            at, next_at = word + i * width, word + other * width
            for k in range(U(0), blocks, FOUR):
                if width == U(64):
                    _add(total, words, at, next_at, U(64), masks, factors, more, k, U(64))
                else:
                    _add(total, words, at, next_at, width, masks, factors, more, k, block)
        for k in range(blocks):
            for j in range(max(skip, k * block), min(used, (k + ONE) * block)):
                at = t * tile + j - lead
                out[at] = narrow(out, center * base[at] + (total[j] - shifts[k]))


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

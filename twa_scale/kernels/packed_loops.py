"""The inner loops over packed rows on a CPU, as in loops.py. `shape` is (n, m, lead, bits, block) of a Packed."""

from typing import Any

import numpy as np

from twa_scale.kernels.loops import FLOAT0, U, bfloat16, compiled, narrow, widen

ONE, TWO, FOUR = U(1), U(2), U(4)


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
    """Quantize rows [start, stop) of `values`, `stride` apart and `count` long, into blocks b and following."""
    _, _, lead, bits, block = shape
    unit, refinements, smallest = rule
    fields = U(32) // bits
    top = np.float32((ONE << bits) - ONE)
    zero = np.float32(ONE << (bits - ONE)) - np.float32(0.0 if bits >= FOUR else 0.5)
    front = lead if b == 0 else U(0)
    code = np.empty(block, np.float32)
    x = np.empty(block, np.float32)
    for i in range(U(start), U(stop)):
        done = U(0)
        g = U(b)
        low = front
        while done < U(count):
            high = min(block, low + U(count) - done)
            for j in range(low, high):
                x[j] = values[i * U(stride) + done + j - low]
            scale = _fit(x, code, low, high, bits, zero, top, unit, refinements, np.float32(smallest))
            t = g // fields
            k = g - t * fields
            _, _, width, blocks, word, at = _extent(shape, t)
            scales[at + i * blocks + k] = narrow(scales, scale)
            for j in range(low, high):
                place = word + i * width + j
                words[place] = np.int32(words[place] ^ np.int32(np.int64(code[j]) << np.int64(bits * k)))
            done += high - low
            low = U(0)
            g += ONE


@compiled
def _fit(
    x: Any, code: Any, low: Any, high: Any, bits: Any, zero: Any, top: Any, unit: Any, times: int, least: Any
) -> Any:
    """Choose the scale of elements [low, high) of a block, fill in their codes, and return it: quantize.py's rule."""
    largest = mean = FLOAT0
    for j in range(low, high):
        largest = max(largest, abs(x[j]))
        mean += abs(x[j])
    scale = _rounded(np.float32(unit) * (largest if bits >= FOUR else mean / np.float32(high - low)), least)
    _encode(x, code, low, high, zero, top, scale)
    for _ in range(times):
        along = square = FLOAT0
        for j in range(low, high):
            level = code[j] - zero
            along += x[j] * level
            square += level * level
        scale = _rounded(along / max(square, np.float32(0.25)), least)
        _encode(x, code, low, high, zero, top, scale)
    return scale


@compiled
def _encode(x: Any, code: Any, low: Any, high: Any, zero: Any, top: Any, scale: Any) -> None:
    inverse = np.float32(1) / scale if scale > FLOAT0 else FLOAT0
    for j in range(low, high):
        code[j] = min(max(np.floor(x[j] * inverse + (zero + np.float32(0.5))), FLOAT0), top)


@compiled
def _rounded(scale: Any, least: Any) -> Any:
    return widen(bfloat16(scale if scale >= least else FLOAT0))

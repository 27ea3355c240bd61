"""The inner loops that quantize on a CPU, as in loops.py, by the rule of quantize.py."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from twa_scale.kernels.loops import FLOAT0, U, bfloat16, compiled, inlined, narrow, widen
from twa_scale.kernels.packed_loops import ONE, extent, sizes

_TOGETHER = U(16)  # blocks that are worked on at a time


@inlined
def _quantize(
    bits: Any, rows: Any, b: int, values: Any, stride: int, count: int, rule: Any, start: int, stop: int
) -> None:
    # Step by step for some blocks: each step of one waits for the one before, and the others have work meanwhile.
    words, scales, shape = rows
    _, _, lead = shape
    block, fields = sizes(bits)
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
                found = _size(values, place, block, bits) if size == block else _size(values, place, size, bits)
                scale[s] = _rounded(unit * found, least)
            for _ in range(refinements):
                for s in range(several):
                    place = at + s * size
                    if size == block:
                        scale[s] = _rounded(_fitted(values, place, block, scale[s], code), least)
                    else:
                        scale[s] = _rounded(_fitted(values, place, size, scale[s], code), least)
            for s in range(several):
                t = (g + s) // fields
                k = g + s - t * fields
                _, _, width, blocks, word, first = extent(shape, bits, t)
                scales[first + i * blocks + k] = narrow(scales, scale[s])
                to, place, shift = word + i * width + low, at + s * size, np.int16(bits * k)
                if size == block:
                    _place(words, to, shift, values, place, block, scale[s], code)
                else:
                    _place(words, to, shift, values, place, size, scale[s], code)
            at += several * size
            g += several
            low = U(0)


@inlined
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


@inlined
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


@inlined
def _place(words: Any, to: Any, shift: Any, values: Any, at: Any, count: Any, scale: Any, code: Any) -> None:
    """Put codes into their field of `count` words."""
    zero, top = code
    inverse = _inverse(scale)
    for j in range(count):
        words[to + j] = np.int16(words[to + j] | np.int16(_code(values[at + j] * inverse, zero, top) << shift))


@inlined
def _code(level: Any, zero: Any, top: Any) -> Any:
    # What is not below zero, a conversion rounds down.
    return np.int32(min(max(level + (zero + np.float32(0.5)), FLOAT0), top))


@inlined
def _inverse(scale: Any) -> Any:
    return np.float32(1) / scale if scale > FLOAT0 else FLOAT0


@inlined
def _rounded(scale: Any, least: Any) -> Any:
    return widen(bfloat16(scale if scale >= least else FLOAT0))


@cache
def quantize_loop(bits: int) -> Callable[..., None]:
    """Return the loop that puts rows [start, stop) of `values` into blocks b and following.

    The values are `stride` apart and `count` long; `rows` are as in packed_loops.py. The number of bits is a constant.
    """

    @partial(compiled, variant=bits)
    def quantize(rows: Any, b: int, values: Any, stride: int, count: int, rule: Any, start: int, stop: int) -> None:
        _quantize(bits, rows, b, values, stride, count, rule, start, stop)

    return quantize

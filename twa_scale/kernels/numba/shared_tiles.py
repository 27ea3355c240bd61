"""Tiles of packed rows that several segments share: their blocks, and the rests of blocks.

The vector code handles a block as part of one segment, that of its first element. The functions here handle the rests
of blocks, which belong to further segments, in float32. Their argument `bits` is not a constant, so each is compiled
once.
"""

from typing import Any

import numpy as np

from twa_scale.kernels.numba.loops import FLOAT0, U, compiled, inlined, widen

ONE = U(1)


@compiled
def divide(block: Any, skip: Any, used: Any, place: Any, length: Any, size: Any, blocks: Any, rests: Any) -> Any:
    """Find the segments of a tile.

    Args:
        block: the number of elements of a block.
        skip: the number of missing first elements.
        used: the end of the elements.
        place: the segment of the first element, and the end of this segment, counted from the start of the tile.
        length: the length of a segment.
        size: the number of lanes for the sums of a segment.
        blocks: three arrays that get, for each block, the segment of its first element and the first lane of this
            segment, and the different ones of these segments, in order.
        rests: three arrays that get the first element, the end and the segment of each rest.

    Returns:
        The segment of the last element, its end, the number of rests, and the number of different segments of blocks.
    """
    owners, places, different = blocks
    starts, stops, segments = rests
    segment, end = place
    k, count, lanes, num_blocks = U(0), U(0), U(0), (used + block - ONE) // block
    while True:
        after = min((end + block - ONE) // block, num_blocks)  # the blocks that begin in this segment
        if k < after:
            different[lanes] = segment
            for j in range(k, after):
                owners[j], places[j] = segment, lanes * size
            k, lanes = after, lanes + ONE
        stop = min(k * block, used)
        while end < stop:
            segment, starts[count] = segment + ONE, end
            end += length
            stops[count], segments[count] = min(end, stop), segment
            count += ONE
        if k == num_blocks:
            return segment, end, count, lanes
        if end == k * block:
            segment, end = segment + ONE, end + length


@inlined
def _level(word: Any, k: Any, bits: Any) -> Any:
    """Return code k of a word, times two, minus twice the code of 0."""
    code = np.int32(np.int32(np.int32(word) >> np.int32(U(bits) * k)) & np.int32((U(1) << U(bits)) - U(1)))
    return np.float32(np.int32(code * np.int32(2)) - np.int32((U(1) << U(bits)) - U(bits < 4)))


@compiled
def project_rests(
    rows: Any, bits: Any, block: Any, tile: Any, rests: Any, count: Any, gradient: Any, total: Any
) -> None:
    """Add the products of the rests of a tile to `total`, and set their gradient to zero.

    Args:
        rows: words and scales of packed rows, and n.
        bits: the number of bits of a code.
        block: the number of elements of a block.
        tile: the number of words and of scales of a row of the tile, and the first index of each.
        rests: from `divide`.
        count: the number of rests.
        gradient: the gradient of the tile, float32.
        total: the sums, (count, n), flat, and their row stride.
    """
    words, scales, n = rows
    sums, pitch = total
    width, blocks, word, scale = tile
    starts, stops, segments = rests
    for r in range(U(count)):
        low, high, k = starts[r], stops[r], starts[r] // block
        for i in range(n):
            row, first = FLOAT0, word + i * width - k * block
            for j in range(low, high):
                row += _level(words[first + j], k, bits) * gradient[j]
            sums[segments[r] * pitch + i] += row * np.float32(0.5) * widen(scales[scale + i * blocks + k])
        gradient[low:high] = FLOAT0


@compiled
def combine_rests(
    rows: Any, bits: Any, block: Any, tile: Any, rests: Any, count: Any, weights: Any, total: Any
) -> None:
    """Write sum_i weight_i row_i of the rests of a tile to `total`. The weights are (count, n)."""
    words, scales, n = rows
    width, blocks, word, scale = tile
    starts, stops, segments = rests
    for r in range(U(count)):
        low, high, k = starts[r], stops[r], starts[r] // block
        total[low:high] = FLOAT0
        for i in range(n):
            first = word + i * width - k * block
            factor = np.float32(0.5) * weights[segments[r] * n + i] * widen(scales[scale + i * blocks + k])
            for j in range(low, high):
                total[j] += factor * _level(words[first + j], k, bits)

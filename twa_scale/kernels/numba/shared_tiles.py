"""Tiles of packed rows that several segments share: their blocks, and the rests of blocks.

The vector code handles a block as part of one segment, that of its first element. The functions here handle the rests
of blocks, which belong to further segments, in float32. Their argument `bits` is not a constant, so each is compiled
once.
"""

from typing import Any

import numpy as np

from twa_scale.kernels.numba.loops import FLOAT0, U, compiled, inlined, widen
from twa_scale.kernels.numba.packed_vectors import TOGETHER

ONE = U(1)


@compiled
def divide(block: Any, skip: Any, used: Any, place: Any, length: Any, owners: Any, rests: Any) -> Any:
    """Find the segments of a tile.

    Args:
        block: the number of elements of a block.
        skip: the number of missing first elements.
        used: the end of the elements.
        place: the segment of the first element, and the end of this segment, counted from the start of the tile.
        length: the length of a segment.
        owners: gets the segment of the first element of each block.
        rests: three arrays that get the first element, the end and the segment of each rest.

    Returns:
        The segment of the last element, its end, and the number of rests.
    """
    starts, stops, segments = rests
    segment, end = place
    count = U(0)
    for k in range((used + block - ONE) // block):
        stop = min((k + ONE) * block, used)
        if end <= max(k * block, skip):
            segment, end = segment + ONE, end + length
        owners[k] = segment
        while end < stop:
            segment, starts[count] = segment + ONE, end
            end += length
            stops[count], segments[count] = min(end, stop), segment
            count += ONE
    return segment, end, count


@compiled
def assign_lanes(owners: Any, blocks: Any, size: Any, places: Any) -> Any:
    """Assign lanes for sums to the segments of the blocks of a tile: `size` lanes to each.

    Args:
        owners: the segments of the blocks. They are replaced by the different ones, in order.
        blocks: the number of blocks.
        size: the number of lanes of a segment.
        places: gets the first lane of each block.

    Returns:
        The number of different segments, and whether all blocks that are computed together have one segment.
    """
    last, together = U(0), True
    places[:] = U(0)
    for k in range(blocks):
        if owners[k] != owners[last]:
            last += ONE
            owners[last] = owners[k]
        places[k] = last * size
        together = together and (k % U(TOGETHER) == U(0) or places[k] == places[k - ONE])
    return last + ONE, together


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

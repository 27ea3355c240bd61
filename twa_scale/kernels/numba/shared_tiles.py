"""Tiles of packed rows that several segments share: their blocks, and the rests of blocks.

The loops over packed rows handle a block as part of one segment, that of its first element. The functions here handle
the rests of blocks, which belong to further segments.
"""

from typing import Any

import numpy as np

from twa_scale.kernels.numba.intrinsics import LANES, WIDE
from twa_scale.kernels.numba.loops import FLOAT0, U, compiled, inlined
from twa_scale.kernels.numba.packed_vectors import quantize_gradient
from twa_scale.kernels.numba.segment_vectors import dot_rest, move_lanes, sum_rest

ONE, SIXTEEN, CHUNK = U(1), U(LANES), U(WIDE)


@compiled
def find_segments(
    block: Any, skip: Any, used: Any, place: Any, length: Any, size: Any, of_blocks: Any, rests: Any
) -> Any:
    """Find the segments of a tile.

    Args:
        block: the number of elements of a block.
        skip: the number of missing first elements.
        used: the end of the elements.
        place: the segment of the first element, and the end of this segment, counted from the start of the tile.
        length: the length of a segment.
        size: the number of lanes for the sums of a segment.
        of_blocks: three arrays that get, for each block, the segment of its first element and the first lane of this
            segment, and the different ones of these segments, in order.
        rests: three arrays that get the first element, the end and the segment of each rest.

    Returns:
        The segment of the last element, its end, the number of rests, and the number of different segments of blocks.
    """
    owners, places, different = of_blocks
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
def add_to_products(products: Any, to: Any, lanes: Any, first: Any, n: Any, sums: Any) -> None:
    """Add the sums of the lanes of n rows to n products, float64, and set the lanes to zero."""
    move_lanes(products, to, lanes, first, n, sums)
    for i in range(n // SIXTEEN * SIXTEEN, n):
        products[to + i] += sums[i % SIXTEEN]
        lanes[first + i * SIXTEEN : first + (i + ONE) * SIXTEEN] = FLOAT0


@inlined
def rest_memory(n: Any, block: Any) -> Any:
    """Return memory for `project_rests`: lanes, their sums, and the gradient of a block as integers and as floats."""
    # With 16 more rows, because `move_lanes` reads whole groups of 16 rows.
    lanes, sums = np.empty((n + SIXTEEN) * SIXTEEN, np.float32), np.empty(SIXTEEN, np.float32)
    return lanes, sums, np.empty(block, np.int16), np.empty(SIXTEEN, np.float32), np.empty(block, np.float32)


@inlined
def project_rests(
    bits: Any, block: Any, rows: Any, rests: Any, count: Any, gradient: Any, total: Any, memory: Any
) -> None:
    """Add the products of the rests of a tile to `total`, and set their gradient to zero.

    Args:
        bits: the number of bits of a code, a constant.
        block: the number of elements of a block.
        rows: words of complete tiles, the first index of those of this tile, its scales, and n.
        rests: from `find_segments`.
        count: the number of rests.
        gradient: the gradient of the tile, float32.
        total: products (count, n), float64, flat, and their row stride.
        memory: from `rest_memory`.
    """
    products, pitch = total
    lanes, sums, integers, units, block_gradient = memory
    words, at, scales, n = rows
    starts, stops, segments = rests
    for r in range(U(count)):
        low, high, k = starts[r], stops[r], starts[r] // block
        block_gradient[:] = FLOAT0
        for j in range(low, high):
            block_gradient[j - k * block] = gradient[j]
        gradient[low:high] = FLOAT0
        quantize_gradient(bits, integers, units, block_gradient, U(0), ONE)
        dot_rest(bits, lanes, words, at, n, scales, k, integers, units)
        add_to_products(products, segments[r] * pitch, lanes, U(0), n, sums)


@inlined
def combine_rests(
    bits: Any, block: Any, rows: Any, rests: Any, count: Any, weights: Any, total: Any, part: Any
) -> None:
    """Write sum_i weight_i row_i of the rests of a tile to `total`. The weights are (count, n); `part` is memory."""
    words, at, scales, n = rows
    starts, stops, segments = rests
    for r in range(U(count)):
        k = starts[r] // block
        low, high = starts[r] - k * block, stops[r] - k * block
        sum_rest(bits, part, words, at, n, scales, weights, segments[r] * n, k, low // CHUNK * CHUNK, high)
        for j in range(low, high):
            total[k * block + j] = part[j]

"""The inner loops over packed rows on a CPU. The argument `rows` is (words, scales, (n, m, lead)) of a `Packed`.

Sums and weights belong to segments of the columns. A tile in one segment is the common case. In other tiles each block
has the sums or weights of the segment of its first element, and the rests of blocks are in `shared_tiles.py`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from twa_scale.kernels.numba.intrinsics import LANES, WIDE
from twa_scale.kernels.numba.loops import FLOAT0, U, compiled, inlined, narrow, widen
from twa_scale.kernels.numba.packed_vectors import (
    add_dots,
    add_dots_apart,
    quantize_factors,
    quantize_gradient,
    spread_weights,
    store_fence,
    store_past_caches,
    sum_rows,
)
from twa_scale.kernels.numba.segment_vectors import prefetch_products
from twa_scale.kernels.numba.shared_tiles import (
    add_to_products,
    combine_rests,
    find_segments,
    project_rests,
    rest_memory,
)
from twa_scale.kernels.packed_rows import BLOCKS, RUN

ONE, SIXTEEN, CHUNK = U(1), U(LANES), U(WIDE)
_LARGE = U(1 << 18)  # elements, from which the output does not stay in a cache until it is read


def block_and_fields(bits: int) -> tuple[Any, Any]:
    """Return the number of elements of a block, and of fields of a word."""
    return U(BLOCKS[bits]), U(16 // bits)


@inlined
def extent(shape: Any, block: Any, fields: Any, t: Any) -> Any:
    """Return the extent of tile `t`.

    Returns:
        The number of missing first elements, the end of the elements, the number of words and of scales of a row, and
        the first index of its words and of its scales.
    """
    n, m, lead = shape
    tile = block * fields
    used = min(tile, lead + m - t * tile)
    blocks = (used + block - ONE) // block
    return lead if t == U(0) else U(0), used, min(block, used), blocks, t * n * block, t * n * fields


@inlined
def _chunks(n: Any, fields: Any) -> Any:
    """Return the number of vectors of 16 scales that hold the scales of a tile, rounded up to an even number."""
    return (n * fields + CHUNK - ONE) // CHUNK * U(2)


@inlined
def _padded(source: Any, first: Any, n: Any, width: Any, target: Any, pitch: Any) -> None:
    """Copy n contiguous rows to rows with stride `pitch`."""
    if width == pitch:
        for q in range(n * pitch):
            target[q] = source[first + q]
    else:
        for i in range(n):
            for k in range(width):
                target[i * pitch + k] = source[first + i * width + k]


@inlined
def _division(fields: Any, tile: Any) -> Any:
    """Return uninitialized arrays for the blocks and the rests of a tile, as `find_segments` writes them."""
    of_blocks = np.empty(fields, U), np.empty(fields, U), np.empty(fields, U)
    return of_blocks, (np.empty(tile, U), np.empty(tile, U), np.empty(tile, U))


def _project_loop(bits: int, many: bool) -> Callable[..., None]:
    """Return the loop that writes <row_i, gradient> to `total`, float64."""
    block, fields = block_and_fields(bits)

    @partial(compiled, variant=bits + 16 * many)
    def project(rows: Any, gradient: Any, segments: Any, start: int, stop: int, total: Any) -> None:
        words, scales, shape = rows
        n, _, lead = shape
        length, front = segments
        products, pitch = total
        tile, chunks, size = block * fields, _chunks(n, fields), n * SIXTEEN
        factors, sums = np.empty(chunks * SIXTEEN, np.float32), np.empty(SIXTEEN, np.float32)
        # With 16 more rows, because `move_lanes` reads whole groups of 16 rows.
        lanes = np.zeros((fields if many else ONE) * size + SIXTEEN * SIXTEEN, np.float32)
        own, padded = np.zeros(chunks * SIXTEEN, np.uint16), np.zeros(n * block, np.int16)
        tile_gradient, integers, units = (
            np.empty(tile, np.float32),
            np.empty(tile, np.int16),
            np.empty(SIXTEEN, np.float32),
        )
        of_blocks, rests = _division(fields, tile if many else ONE)
        _, places, different = of_blocks
        memory = rest_memory(n if many else U(0), block)
        places[:] = U(0)
        # The end of the segment is counted from the start of the first block, as tiles are.
        segment, end = U(0), max(U(start) * tile, lead) + length - front
        products[:n], zeroed = 0.0, U(0)  # the last segment whose products are zero or more
        for t in range(U(start), U(stop)):
            skip, used, width, blocks, word, scale = extent(shape, block, fields, t)
            at, apart, count, num_places = t * tile, False, U(0), ONE
            if many:
                if end <= at + skip:
                    segment, end = segment + ONE, end + length
                apart = end < at + used
            whole = skip == U(0) and used == tile  # whether the gradient is used in place
            different[0] = segment
            if many and apart:
                place = segment, end - at
                segment, end, count, num_places = find_segments(
                    block, skip, used, place, length, size, of_blocks, rests
                )
                end += at
                whole = whole and count == U(0)
            elif many:
                places[:] = U(0)
            # Products are zeroed here, and not all at once, so that they are in a cache when sums are added to them.
            if many and zeroed < segment:
                prefetch_products(products, (segment + ONE) * pitch, (segment + segment - zeroed + ONE) * pitch)
                while zeroed < segment:
                    zeroed += ONE
                    products[zeroed * pitch : zeroed * pitch + n] = 0.0
            if blocks < fields:
                own[:] = np.uint16(0)
            _padded(scales, scale, n, blocks, own, fields)
            codes = words
            if width < block:
                _padded(words, word, n, width, padded, block)
                codes, word = padded, U(0)
            if whole:
                quantize_gradient(bits, integers, units, gradient, at - lead, fields)
            else:
                tile_gradient[:] = FLOAT0
                for j in range(skip, used):
                    tile_gradient[j] = widen(gradient[at + j - lead])
                if many and count > U(0):
                    project_rests(bits, block, (codes, word, own, n), rests, count, tile_gradient, total, memory)
                quantize_gradient(bits, integers, units, tile_gradient, U(0), fields)
            after = at + tile - lead
            if many:
                add_dots_apart(
                    bits, lanes, codes, word, n, own, factors, chunks, integers, units, places, gradient, after
                )
            else:
                add_dots(bits, lanes, codes, word, n, own, factors, chunks, integers, units, places, gradient, after)
            # The lanes are float32. Add them to the float64 products after RUN tiles, and before the segment changes.
            if (t + ONE) % U(RUN) == U(0) or t + ONE == U(stop) or (many and end <= at + tile) or apart:
                for q in range(num_places):
                    add_to_products(products, different[q] * pitch, lanes, q * size, n, sums)

    return project


def _combine_loop(bits: int, many: bool) -> Callable[..., None]:
    """Return the loop that writes scale * base + sum_i weights_i row_i."""
    block, fields = block_and_fields(bits)

    @partial(compiled, variant=bits + 16 * many)
    def combine(rows: Any, weights: Any, segments: Any, base: Any, scale: Any, out: Any, start: int, stop: int) -> None:
        words, scales, shape = rows
        n, m, lead = shape
        length, front = segments
        tile, chunks = block * fields, _chunks(n, fields)
        factors, total = np.empty(chunks * SIXTEEN, np.float32), np.empty(tile, np.float32)
        own, padded = np.zeros(chunks * SIXTEEN, np.uint16), np.zeros(n * block, np.int16)
        pairs, firsts = np.empty(chunks * SIXTEEN // U(2), np.int32), np.empty(SIXTEEN, np.int32)
        units, each = np.empty(SIXTEEN, np.float32), np.zeros(chunks * SIXTEEN, np.float32)
        of_blocks, rests = _division(fields, tile if many else ONE)
        owners, part = of_blocks[0], np.empty(block, np.float32)
        segment, end = U(0), max(U(start) * tile, lead) + length - front
        owners[:] = segment
        new = True  # whether the weights of this tile differ from those of the tile before
        for t in range(U(start), U(stop)):
            skip, used, width, blocks, word, first_scale = extent(shape, block, fields, t)
            at, count, apart = t * tile, U(0), False
            if many:
                if end <= at + skip:
                    segment, end, new = segment + ONE, end + length, True
                apart = end < at + used
                if new:
                    owners[:] = segment
                if apart:
                    place = segment, end - at
                    segment, end, count, _ = find_segments(block, skip, used, place, length, U(0), of_blocks, rests)
                    end += at
            if new or apart:
                spread_weights(bits, each, weights, owners, n)
                for i in range(n // SIXTEEN * SIXTEEN, n):
                    for k in range(fields):
                        each[i * fields + k] = weights[owners[k] * n + i]
                new = apart
            if used < tile:
                own[:] = np.uint16(0)
            _padded(scales, first_scale, n, blocks, own, fields)
            quantize_factors(bits, pairs, firsts, units, factors, own, each, chunks)
            codes, first = words, word
            if width < block:
                _padded(words, word, n, width, padded, block)
                codes, first = padded, U(0)
            sum_rows(bits, total, codes, first, n, pairs, firsts, units, base, at + tile - lead)
            if many and count > U(0):
                combine_rests(bits, block, (codes, first, own, n), rests, count, weights, total, part)
            if (
                m >= _LARGE
                and used == tile
                and skip == U(0)
                and store_past_caches(out, at - lead, scale, base, total, tile)
            ):
                continue
            for j in range(skip, used):
                out[at + j - lead] = narrow(out, scale * base[at + j - lead] + total[j])
        store_fence()

    return combine


class Loops(NamedTuple):
    """The compiled loops for one number of bits. They process tiles [start, stop).

    `segments` is the length of a segment, and the position of the first column of tile `start` in its segment. Sums and
    weights are (count, n), from that segment on. `total` is the sums, flat, and their row stride.
    """

    project: Callable[..., None]
    """Writes <row_i, gradient> to `total`, float64."""
    combine: Callable[..., None]
    """Writes scale * base + sum_i weights_i row_i."""


@cache
def packed_loops(bits: int, many: bool) -> Loops:
    """Return the loops for a constant number of bits, so that the compiler unrolls the code that depends on it.

    Args:
        bits: the number of bits of a code.
        many: whether there may be several segments. The code for them is compiled only when it is needed.
    """
    return Loops(_project_loop(bits, many), _combine_loop(bits, many))

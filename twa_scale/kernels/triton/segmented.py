# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Kernels for GPUs in Triton, as in `fused.py`, with sums and weights for each segment.

A program handles the same tiles as a program of `fused.py`, and reads them once. Its elements form parts of 64, each of
which lies in at most two segments. The sums of the parts are added to the program's slots, one for each segment that it
overlaps. A second kernel adds the slots of a segment over programs in float64, in a fixed order. If segments consist of
whole parts, the code for a second segment of a part is left out.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from twa_scale.kernels.packed_rows import Packed
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.segments import Segments
from twa_scale.kernels.triton.programs import (
    COMBINE,
    DENSE,
    EXPONENT,
    PROJECT,
    Shape,
    clipped,
    decoded,
    launches,
    load_codes,
)

SHORTEST = 64
"""The number of elements of a part, and of the shortest segments that these kernels support."""
PROJECT_SEGMENTS = {**PROJECT, 1: Shape(tiles=1, rows=1)}
COMBINE_SEGMENTS = {**COMBINE, 2: Shape(tiles=2, rows=1)}
"""The shapes of programs by bits. Where they differ from those of `fused.py`, a second row would spill registers."""
_CHUNK = 4096  # programs whose sums are added by one program
_STEP = 32  # programs whose sums are loaded at the same time


@triton.jit
def _first(program, lead, front, length, SIZE: tl.constexpr):
    """Return the segment of the first column of a program, and the offset in the program at which it ends."""
    column = tl.maximum(program * SIZE - lead, 0)
    segment = (column + front) // length
    skip = (column - (program * SIZE - lead)).to(tl.int32)
    left = tl.minimum((segment + 1) * length - front - column, SIZE).to(tl.int32)
    return segment, skip + left


@triton.jit
def _slot(offset, end, step):
    """Return the segment of an offset in a program, counted from the program's first segment."""
    return tl.where(offset < end, 0, 1 + (offset - end) // step)


@triton.jit
def _divided(gradient, offset, end, step):
    """Return the gradient in the first segment of each part, and in the second one, with zeros elsewhere."""
    own = offset < end + _slot(offset // 64 * 64, end, step) * step
    return tl.where(own, gradient, 0.0), tl.where(own, 0.0, gradient)


@triton.jit
def _add_parts(parts, slots, SLOTS: tl.constexpr):
    """Return sums (rows, SLOTS) of parts (rows, parts) by their slots (parts,)."""
    here = slots[None, :, None] == tl.arange(0, SLOTS)[None, None, :]
    return tl.sum(tl.where(here, parts[:, :, None], 0.0), 1)


@triton.jit
def _project_dense(
    values,
    gradient,
    partial,
    n,
    m,
    first,
    front,
    length,
    step,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    PARTS: tl.constexpr = TILES * TILE // 64
    program = first + tl.program_id(0).to(tl.int64)
    _, end = _first(program, 0, front, length, TILES * TILE)
    tile = tl.arange(0, TILES)[None, :, None, None]
    column = tl.arange(0, TILE // 8)[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    at, offset = (program * TILES + tile) * TILE, tile * TILE + column
    if FULL:
        width = TILE
        right = tl.load(gradient + at + column).to(tl.float32)
    else:
        width = tl.minimum(TILE, m - at)
        right = tl.load(gradient + at + column, mask=column < width, other=0).to(tl.float32)
    slots = _slot(tl.arange(0, PARTS) * 64, end, step)
    if SPLIT:
        right, beyond = _divided(right, offset, end, step)
    slot = tl.arange(0, SLOTS)[None, :]
    for block in range(0, n, ROWS):
        row = block + tl.arange(0, ROWS)
        i = row[:, None, None, None]
        there = i < n
        if not FULL:
            there &= column < width
        left = tl.load(values + at * n + i * width + column, mask=there, other=0).to(tl.float32)
        parts = tl.sum(tl.reshape(left * right, [ROWS, PARTS, 64]), 2)
        sums = _add_parts(parts, slots, SLOTS)
        if SPLIT:
            parts = tl.sum(tl.reshape(left * beyond, [ROWS, PARTS, 64]), 2)
            sums += _add_parts(parts, slots + 1, SLOTS)
        tl.store(partial + (program * SLOTS + slot) * n + row[:, None], sums, mask=row[:, None] < n)


@triton.jit
def _combine_dense(
    values,
    weights,
    base,
    center,
    out,
    n,
    m,
    first,
    front,
    length,
    step,
    count,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    program = first + tl.program_id(0).to(tl.int64)
    segment, end = _first(program, 0, front, length, TILES * TILE)
    tile, group = tl.arange(0, TILES)[:, None, None], tl.arange(0, TILE // 8)[None, :, None] * 8
    column = group + tl.arange(0, 8)[None, None, :]
    at, offset = (program * TILES + tile) * TILE, tile * TILE + column
    if FULL:
        width, there, other = TILE, None, None
    else:
        width = tl.minimum(TILE, m - at)
        there, other = column < width, 0
    slots = _slot(tile * TILE + group, end, step)
    own = weights + tl.minimum(segment + slots, count - 1) * n
    if SPLIT:
        beyond = weights + tl.minimum(segment + slots + 1, count - 1) * n
        inside = offset < end + slots * step
    total = center * tl.load(base + at + column, mask=there, other=other)
    for i in tl.range(0, n, loop_unroll_factor=ROWS):
        row = tl.load(values + at * n + i * width + column, mask=there, other=other).to(tl.float32)
        weight = tl.load(own + i)
        if SPLIT:
            weight = tl.where(inside, weight, tl.load(beyond + i))
        total += weight * row
    tl.store(out + at + column, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _project_packed(
    words,
    scales,
    gradient,
    partial,
    n,
    limit,
    lead,
    first,
    exponent,
    front,
    length,
    step,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    PARTS: tl.constexpr = TILES * FIELDS * BLOCK // 64
    program = first + tl.program_id(0).to(tl.int64)
    _, end = _first(program, lead, front, length, TILES * FIELDS * BLOCK)
    place = tl.arange(0, TILES)[None, :, None, None, None]
    field = tl.arange(0, FIELDS)[None, None, :, None, None]
    word = tl.arange(0, BLOCK // 8)[None, None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, None, :]
    tile, element = program * TILES + place, field * BLOCK + word
    at, offset = tile * (BLOCK * FIELDS), place * (BLOCK * FIELDS) + element
    if FULL:
        width, present = BLOCK, FIELDS
        right = tl.load(gradient + (at + element - lead)).to(tl.float32)
    else:
        width, present, there = clipped(at, element, lead, limit, BLOCK, FIELDS)
        right = tl.load(gradient + (at + element - lead), mask=there, other=0).to(tl.float32)
    right *= 0.5 / (1 << (BITS * field)).to(tl.float32)
    slots = _slot(tl.arange(0, PARTS) * 64, end, step)
    if SPLIT:
        right, beyond = _divided(right, offset, end, step)
    slot = tl.arange(0, SLOTS)[None, :]
    for block in range(0, n, ROWS):
        row = block + tl.arange(0, ROWS)
        i = row[:, None, None, None, None]
        has_word, has_scale = i < n, i < n
        if not FULL:
            has_word &= word < width
            has_scale &= field < present
        packed, scale = load_codes(
            words, scales, tile, i, n, width, present, word, field, has_word, has_scale, 0, BLOCK, FIELDS
        )
        codes = decoded(packed, field, exponent, BITS)
        parts = tl.sum(codes * right, 4, keep_dims=True) * scale
        sums = _add_parts(tl.sum(tl.reshape(parts, [ROWS, PARTS, 8]), 2), slots, SLOTS)
        if SPLIT:
            parts = tl.sum(codes * beyond, 4, keep_dims=True) * scale
            sums += _add_parts(tl.sum(tl.reshape(parts, [ROWS, PARTS, 8]), 2), slots + 1, SLOTS)
        tl.store(partial + (program * SLOTS + slot) * n + row[:, None], sums, mask=row[:, None] < n)


@triton.jit
def _combine_packed(
    words,
    scales,
    weights,
    base,
    center,
    out,
    n,
    limit,
    lead,
    first,
    exponent,
    front,
    length,
    step,
    count,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    program = first + tl.program_id(0).to(tl.int64)
    segment, end = _first(program, lead, front, length, TILES * FIELDS * BLOCK)
    place = tl.arange(0, TILES)[:, None, None, None]
    field = tl.arange(0, FIELDS)[None, :, None, None]
    group = tl.arange(0, BLOCK // 8)[None, None, :, None] * 8
    word = group + tl.arange(0, 8)[None, None, None, :]
    tile, element = program * TILES + place, field * BLOCK + word
    at, offset = tile * (BLOCK * FIELDS), place * (BLOCK * FIELDS) + element
    if FULL:
        width, present = BLOCK, FIELDS
        there, has_word, has_scale, other = None, None, None, None
    else:
        width, present, there = clipped(at, element, lead, limit, BLOCK, FIELDS)
        has_word, has_scale, other = word < width, field < present, 0
    slots = _slot(place * (BLOCK * FIELDS) + field * BLOCK + group, end, step)
    own = weights + tl.minimum(segment + slots, count - 1) * n
    if SPLIT:
        beyond = weights + tl.minimum(segment + slots + 1, count - 1) * n
        inside = offset < end + slots * step
    unit = 0.5 / (1 << (BITS * field)).to(tl.float32)
    total = tl.zeros([TILES, FIELDS, BLOCK // 8, 8], tl.float32)
    for i in tl.range(0, n, loop_unroll_factor=ROWS):
        packed, scale = load_codes(
            words, scales, tile, i, n, width, present, word, field, has_word, has_scale, other, BLOCK, FIELDS
        )
        weight = tl.load(own + i)
        if SPLIT:
            weight = tl.where(inside, weight, tl.load(beyond + i))
        total += decoded(packed, field, exponent, BITS) * (scale * unit * weight)
    total += center * tl.load(base + (at + element - lead), mask=there, other=other)
    tl.store(out + (at + element - lead), total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _add_programs(
    partial,
    total,
    n,
    m,
    lead,
    front,
    length,
    count,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the sums of up to CHUNK programs that overlap a segment, (chunks, count, n)."""
    segment, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    low = tl.maximum(segment * length - front, 0)
    high = tl.minimum((segment + 1) * length - front, m)
    begin = (low + lead) // SIZE + chunk * CHUNK
    stop = tl.minimum((high - 1 + lead) // SIZE + 1, begin + CHUNK)
    i = tl.arange(0, N)[None, :]
    sums = tl.zeros([STEP, N], tl.float64)
    for start in range(begin, stop, STEP):
        program = start + tl.arange(0, STEP)[:, None]
        own, _ = _first(program, lead, front, length, SIZE)
        found = partial + (program * SLOTS + segment - own) * n + i
        sums += tl.load(found, mask=(program < stop) & (i < n), other=0).to(tl.float64)
    row = tl.arange(0, N)
    tl.store(total + (chunk * count + segment) * n + row, tl.sum(sums, 0), mask=row < n)


def project_segments(rows: Dense | Packed, gradient: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Implement `Kernels.project` for segments of at least `SHORTEST` elements, and a contiguous gradient."""
    shape, lead = (DENSE, 0) if isinstance(rows, Dense) else (PROJECT_SEGMENTS[rows.bits], rows.lead)
    size, programs = rows.tile * shape.tiles, -(-rows.count // shape.tiles)
    slots = _slots(segments, lead, size)
    partial = gradient.new_empty(programs * slots * rows.n, dtype=torch.float32)
    chunks = max(1, -(-min(programs, segments.length // size + 2) // _CHUNK))
    total = gradient.new_empty(chunks, segments.count, rows.n, dtype=torch.float64)
    how = {"ROWS": shape.rows, "SLOTS": slots, "SPLIT": _split(segments, lead, SHORTEST), "num_warps": 1}
    place = (segments.lead, segments.length, min(segments.length, size))
    with torch.cuda.device_of(gradient):
        for first, count, full in launches(rows, shape.tiles):
            constants = {"TILES": shape.tiles, "FULL": full, **how}
            if isinstance(rows, Dense):
                data = (rows.values, gradient, partial, rows.n, rows.m, first, *place)
                _project_dense[(count,)](*data, TILE=TILE, **constants)
            else:
                spot = (rows.n, rows.lead + rows.m, rows.lead, first, EXPONENT, *place)
                packed = (rows.words, rows.scales, gradient, partial, *spot)
                _project_packed[(count,)](*packed, BITS=rows.bits, BLOCK=rows.block, **constants)
        if segments.count:
            sizes = {"SIZE": size, "SLOTS": slots, "CHUNK": _CHUNK, "STEP": _STEP, "num_warps": 1}
            where = (rows.n, rows.m, lead, segments.lead, segments.length, segments.count)
            grid = (segments.count, chunks)
            _add_programs[grid](partial, total, *where, N=triton.next_power_of_2(rows.n), **sizes)
    return total.sum(0).T


def combine_segments(
    rows: Dense | Packed,
    weights: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    segments: Segments,
) -> None:
    """Implement `Kernels.combine` for segments of at least `SHORTEST` elements.

    The weights are float32, (count, n), contiguous, and so is `out`.
    """
    shape, lead = (DENSE, 0) if isinstance(rows, Dense) else (COMBINE_SEGMENTS[rows.bits], rows.lead)
    size = rows.tile * shape.tiles
    place = (segments.lead, segments.length, min(segments.length, size), segments.count)
    how = {"TILES": shape.tiles, "ROWS": shape.rows, "SPLIT": _split(segments, lead, 8), "num_warps": 1}
    with torch.cuda.device_of(out):
        for first, count, full in launches(rows, shape.tiles):
            if isinstance(rows, Dense):
                data = (rows.values, weights, base, scale, out, rows.n, rows.m, first, *place)
                _combine_dense[(count,)](*data, TILE=TILE, FULL=full, **how)
            else:
                spot = (rows.n, rows.lead + rows.m, rows.lead, first, EXPONENT, *place)
                packed = (rows.words, rows.scales, weights, base, scale, out, *spot)
                _combine_packed[(count,)](*packed, BITS=rows.bits, BLOCK=rows.block, FULL=full, **how)


def _slots(segments: Segments, lead: int, size: int) -> int:
    """Return a bound of the number of segments that a program of `size` elements overlaps, a power of two."""
    step = gcd(size, segments.length)  # The positions of programs in their first segment differ by multiples of it.
    position = segments.length - step + (segments.lead - lead) % step
    return int(triton.next_power_of_2(-(-(position + size) // segments.length)))


def _split(segments: Segments, lead: int, size: int) -> bool:
    """Return whether a segment may start inside a group of `size` elements of a program."""
    return segments.length % size != 0 or (segments.lead - lead) % size != 0

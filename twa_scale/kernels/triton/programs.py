# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Shared by the Triton kernels: the sizes of programs, the launches for a span, and the decoding of codes."""

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl

from twa_scale.kernels.packed_rows import Packed
from twa_scale.kernels.rows import Dense

EXPONENT = 0x4B000000
"""The bits of 2^23 in float32. An integer in the mantissa adds to this value. It is an argument of the kernels, because
ptxas would load a constant into a register for each code."""


class Shape(NamedTuple):
    """The size of one program."""

    tiles: int
    """The number of tiles of a program."""
    rows: int
    """The number of rows that are loaded at the same time."""


DENSE = Shape(tiles=8, rows=2)
PROJECT = {8: Shape(8, 2), 4: Shape(4, 2), 2: Shape(2, 2), 1: Shape(1, 2)}
COMBINE = {8: Shape(8, 2), 4: Shape(4, 2), 2: Shape(2, 2), 1: Shape(1, 2)}
"""The shapes by bits, with 32 or 64 elements in each lane. More elements or rows would spill registers."""


def launches(rows: Dense | Packed, tiles: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the launches: the first program, the number of programs, and whether all of their tiles are full."""
    lead = rows.lead if isinstance(rows, Packed) else 0
    programs = -(-rows.count // tiles)
    full = (lead + rows.m) // (rows.tile * tiles)
    cuts = (0, min(1, full) if lead else 0, full, programs)
    for first, last, is_full in zip(cuts, cuts[1:], (False, True, False), strict=False):
        if first < last:
            yield first, last - first, is_full


@triton.jit
def clipped(at, element, lead, limit, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Return the number of words and of blocks of a row in a tile at an end of a span, and a mask of its elements."""
    used = tl.maximum(tl.minimum(BLOCK * FIELDS, limit - at), 0)
    return tl.minimum(BLOCK, used), (used + BLOCK - 1) // BLOCK, (element < used) & (at + element >= lead)


@triton.jit
def load_codes(
    words,
    scales,
    tile,
    i,
    n,
    width,
    present,
    word,
    field,
    has_word,
    has_scale,
    other,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Return the words and the scales, float32, of rows `i` of some tiles."""
    packed = tl.load(words + tile * n * BLOCK + i * width + word, mask=has_word, other=other)
    scale = tl.load(scales + tile * n * FIELDS + i * present + field, mask=has_scale, other=other)
    return packed, scale.to(tl.float32)


@triton.jit
def decoded(words, field, exponent, BITS: tl.constexpr):
    """Return 2 (code - zero) 2^(BITS field) exactly. Codes are masked in their word, without a shift.

    The factor of 2 makes the zero of 2 and 1 bits, which is a half-integer, an integer.
    """
    twice = words.to(tl.uint16, bitcast=True).to(tl.int32) << 1
    code = twice & (((1 << BITS) - 1) << (BITS * field + 1))
    zero = (1 << BITS) - (BITS < 4)  # twice zero_of(BITS)
    return (code | exponent).to(tl.float32, bitcast=True) - (8388608.0 + (zero << (BITS * field)).to(tl.float32))

"""The innermost loops over packed rows, as LLVM vector code.

Codes are small integers. The gradient and the coefficients are converted to 16-bit integers with a common unit for each
block. A processor multiplies 32 pairs of 16-bit integers and adds neighbors in one instruction, whereas float32 would
require the conversion of each code. The integers have a relative precision of 2^-16 of the largest value of a block, or
2^-15 with 2 and 1 bits. docs/decisions/integer-kernels.md explains this decision.

Sums start from -zero * sum(integers), called `firsts`, so that codes of 0 contribute 0. With 2 and 1 bits, `zero` is a
half-integer. The product is still exact, because the integers are then even.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import ForceLiteralArg
from numba.extending import intrinsic

from twa_scale.kernels.numba.intrinsics import (
    FAST,
    FLOAT,
    FLOATS,
    FUSED,
    INDEX,
    INT,
    INT16,
    INT16S,
    LANES,
    WIDE,
    Emitter,
    splat,
)
from twa_scale.kernels.packed_rows import BLOCKS, zero_of

_TINY = 1e-30  # Values up to it are treated as 0, because their inverse may overflow.
_INFINITE = 0x7F800000  # the bits of infinity in float32
_MAX_SUM = float(1 << 22)  # of the integers of a block; codes are at most 128 from zero, so sums stay below 2^30
_TOGETHER = 4  # fields that are computed together, for which there are enough registers
_U = types.uint64
# Two rows a and b are interleaved within each 16 bytes, as processors do it. The low half is a0 b0 a1 b1 a2 b2 a3 b3,
# a8 b8 .., and the high half a4 b4 a5 b5 .., a12 b12 .. `_ORDER` restores the order of the sums of both halves.
_LOW = [8 * q + e + row * WIDE for q in range(4) for e in range(4) for row in (0, 1)]
_HIGH = [i + 4 for i in _LOW]
_DOTS = "lanes words at n scales factors chunks integers units places gradient after"
_ORDER = [4 * (w // 8) + w % 4 + w % 8 // 4 * LANES for w in range(WIDE)]


class TileEmitter(Emitter):
    """Emits instructions for a tile with a constant number of bits."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, names: str) -> None:
        super().__init__(context, builder, signature.args[1:], arguments[1:], names)
        self.bits = signature.args[0].literal_value
        self.block, self.fields, self.in_byte = BLOCKS[self.bits], 16 // self.bits, 8 // self.bits
        self.even = self.bits < 4
        self.top = 16383.0 if self.even else 32767.0
        places = [1 << self.bits * (k % self.in_byte) for k in range(self.fields)]
        self.zeros = [int(-2 * zero_of(self.bits)) * place for place in places]
        self.shares = [(0.5 if self.even else 1.0) / place for place in places]

    def parts(self, size: int) -> Iterator[tuple[list[int], Any, Any]]:
        """Yield fields that are computed together, and the index of `size` words in a block, to emit instructions for.

        The loop over words runs at run time, to keep the machine code short. The fields are constants, so that their
        masks are, too. The third value is the number of earlier parts of the tile.
        """
        loops = self.block // size
        for i, k in enumerate(range(0, self.fields, _TOGETHER)):
            fields = list(range(k, min(k + _TOGETHER, self.fields)))
            with cgutils.for_range(self.build, self.at(loops)) as words:
                yield fields, self.times(words.index, size), self.at(words.index, i * loops)

    def prefetch_next(self, dense: str, part: Any, index: Any, count: Any, share: int) -> None:
        """Prefetch a share of the next tile, so that memory is read while this tile is computed.

        Args:
            dense: the name of the array of all columns, of which 16 elements are prefetched.
            part: the number of earlier parts of the tile.
            index: the index of this call in its part.
            count: the number of calls in each part.
            share: the number of words that each call prefetches.
        """
        step = self.at(index, self.build.mul(part, count))
        start = self.at(self["at"], self.times(self["n"], self.block), self.times(step, share))
        for word in range(0, share, WIDE):
            self.prefetch("words", self.at(start, word))
        self.prefetch(dense, self.at(self["after"], self.times(step, LANES)))

    def codes(self, words: Any, fields: Sequence[int]) -> list[Any]:
        """Return the codes of some fields, which keep their position in a byte."""
        sides = words, self.build.lshr(words, splat(8, WIDE))
        masks = [splat((1 << self.bits) - 1 << self.bits * k, WIDE) for k in range(self.in_byte)]
        return [self.build.and_(sides[k // self.in_byte], masks[k % self.in_byte]) for k in fields]

    def integers(self, values: Any, inverses: Any) -> Any:
        """Return values * inverses as 16-bit integers in the low halves of 16 lanes."""
        nearest = self.nearest(self.build.fmul(values, inverses, flags=FUSED))
        return self.build.shl(nearest, splat(1)) if self.even else nearest

    def inverses(self, extents: Any, finite: Any) -> Any:
        """Return the factors that map values to integers, for the largest absolute values of some blocks or of one."""
        one = extents.type == FLOAT
        tiny, top, zero = (ir.Constant(FLOAT, x) if one else splat(x) for x in (_TINY, self.top, 0.0))
        some = self.build.and_(finite, self.build.fcmp_ordered(">", extents, tiny))
        return self.build.select(some, self.build.fdiv(top, extents), zero)

    def units(self, extents: Any, finite: Any) -> Any:
        """Return the factors that map sums of codes * integers to values. They are NaN if a block is not finite."""
        units = self.build.fmul(extents, self.of_fields([share / self.top for share in self.shares], FLOAT))
        return self.build.select(finite, units, splat(float("nan")))

    def of_fields(self, values: Sequence[Any], kind: Any = INT) -> Any:
        """Return a vector constant whose lane l holds the value of field l % fields."""
        return ir.Constant(ir.VectorType(kind, LANES), [values[i % self.fields] for i in range(LANES)])


def tile_intrinsic(emit: Callable[[TileEmitter], None], names: str, bits: Any, *kinds: Any) -> Any:
    """Return the signature and the code generator of a numba intrinsic whose argument `bits` is a constant."""
    if not isinstance(bits, types.IntegerLiteral):
        raise ForceLiteralArg([0])

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(TileEmitter(context, builder, signature, arguments, names))
        return context.get_dummy_value()

    return types.void(bits, *[kind if isinstance(kind, types.Array) else _U for kind in kinds]), generate


@intrinsic
def quantize_gradient(typing, bits, integers, units, gradient, at, count):  # type: ignore[no-untyped-def]
    """Write the gradient of the first `count` blocks of a tile as 16-bit integers, and their units.

    Units are NaN if a block is not finite.
    """
    names = "integers units gradient at count"
    return tile_intrinsic(_quantize_gradient, names, bits, integers, units, gradient, at, count)


def _quantize_gradient(v: TileEmitter) -> None:
    b = v.build
    v.allocate("extents", INT, LANES)
    with cgutils.for_range(b, v["count"]) as field:
        start = v.times(field.index, v.block)
        values = [v.floats("gradient", v.at(v["at"], start, c)) for c in range(0, v.block, LANES)]
        extents = v.reduce_lanes(reduce(v.larger, map(v.magnitudes, values)), v.larger)
        extent = b.extract_element(extents, ir.Constant(INT, 0))
        for copy in range(0, LANES, v.fields):
            b.store(extent, b.gep(v["extents"], [v.at(field.index, copy)]))
        finite = b.icmp_unsigned("<", extent, ir.Constant(INT, _INFINITE))
        inverse = v.broadcast(v.inverses(b.bitcast(extent, FLOAT), finite))
        for i in range(0, len(values), 2):
            low, high = (b.bitcast(v.integers(some, inverse), INT16S) for some in values[i : i + 2])
            v.store("integers", v.at(start, i * LANES), v.shuffle(low, high, range(0, 2 * WIDE, 2)))
    extents = v.load("extents", 0)
    finite = b.icmp_unsigned("<", extents, splat(_INFINITE))
    v.store("units", 0, v.units(b.bitcast(extents, FLOATS), finite))


@intrinsic
def add_dots(  # type: ignore[no-untyped-def]
    typing, bits, lanes, words, at, n, scales, factors, chunks, integers, units, places, gradient, after
):
    """Add <row_i, gradient> of a tile to 16 lanes for each of n rows, which are summed after several tiles.

    The lanes of all fields are n rows from index `places[0]` on. Element `after` of the gradient is the first one of
    the next tile.
    """
    kinds = (lanes, words, at, n, scales, factors, chunks, integers, units, places, gradient, after)
    return tile_intrinsic(partial(_add_dots, many=False), _DOTS, bits, *kinds)


@intrinsic
def add_dots_apart(  # type: ignore[no-untyped-def]
    typing, bits, lanes, words, at, n, scales, factors, chunks, integers, units, places, gradient, after
):
    """Add as `add_dots` does, but to lanes from index `places[field]` on."""
    kinds = (lanes, words, at, n, scales, factors, chunks, integers, units, places, gradient, after)
    return tile_intrinsic(partial(_add_dots, many=True), _DOTS, bits, *kinds)


def _add_dots(v: TileEmitter, *, many: bool) -> None:
    b, units = v.build, v.load("units", 0)
    with cgutils.for_range(b, v["chunks"]) as chunk:
        start = v.times(chunk.index, LANES)
        v.store("factors", start, b.fmul(v.floats("scales", start), units))
    vectors = range(v.block // WIDE)
    for fields, s, part in v.parts(v.block):
        places = [v.at(s, k * v.block) for k in fields]
        integers = [[v.load("integers", v.at(place, c * WIDE), WIDE) for c in vectors] for place in places]
        firsts = []
        for k, some in zip(fields, integers, strict=True):
            first = splat(0)
            for c in vectors:
                first = v.add_products(first, some[c], splat(v.zeros[k], WIDE))
            firsts.append(b.ashr(first, splat(1)))
        dots = _Dots(fields, s, part, integers, firsts)
        starts = [v.element("places", k) for k in (fields if many else fields[:1])]
        if not many:
            _add_fields(v, dots, starts)
            continue
        one = reduce(b.and_, (b.icmp_unsigned("==", start, starts[0]) for start in starts[1:]))
        with b.if_else(one) as (together, apart):
            with together:
                _add_fields(v, dots, starts[:1])
            with apart:
                _add_fields(v, dots, starts)


class _Dots(NamedTuple):
    """Fields of a tile that are computed together, and their gradient."""

    fields: list[int]
    word: Any
    """The index of their first word in a block."""
    part: Any
    """The number of earlier parts of the tile."""
    integers: list[list[Any]]
    """The gradient of each field, as 16-bit integers."""
    firsts: list[Any]
    """The initial values of their sums."""


def _add_fields(v: TileEmitter, dots: _Dots, starts: Sequence[Any]) -> None:
    """Add the products of all rows to their lanes, from one index on for all fields or from one for each."""
    fields, word, part, integers, firsts = dots
    per_start = len(fields) // len(starts)
    with cgutils.for_range(v.build, v["n"]) as row:
        v.prefetch_next("gradient", part, row.index, v["n"], v.block * len(fields) // v.fields)
        sums = firsts
        for c in range(v.block // WIDE):
            words = v.load("words", v.at(v["at"], v.times(row.index, v.block), word, c * WIDE), WIDE)
            codes = v.codes(words, fields)
            sums = [v.add_products(x, code, some[c]) for x, code, some in zip(sums, codes, integers, strict=True)]
        for i, start in enumerate(starts):
            lane = v.at(v.times(row.index, LANES), start)
            total = v.load("lanes", lane)
            for j in range(i * per_start, (i + 1) * per_start):
                factor = v.broadcast_element("factors", v.at(v.times(row.index, v.fields), fields[j]))
                total = v.build.fadd(total, v.scaled(sums[j], factor), flags=FAST)
            v.store("lanes", lane, total)


@intrinsic
def spread_weights(typing, bits, spread, weights, owners, n):  # type: ignore[no-untyped-def]
    """Write the weight of row i for field k, which is that of segment `owners[k]`, to element i * fields + k.

    The number of rows n is rounded down to a multiple of 16.
    """
    return tile_intrinsic(_spread_weights, "spread weights owners n", bits, spread, weights, owners, n)


def _spread_weights(v: TileEmitter) -> None:
    starts = [v.build.mul(v.element("owners", k), v["n"]) for k in range(v.fields)]
    with cgutils.for_range(v.build, v.build.lshr(v["n"], v.at(4))) as chunk:
        row = v.times(chunk.index, LANES)
        fields = [v.load("weights", v.at(start, row)) for start in starts]
        for j, rows in enumerate(v.transposed(fields)):
            for i in range(0, LANES, v.fields):
                some = v.shuffle(rows, rows, range(i, i + v.fields))
                v.store("spread", v.times(v.at(row, i + j), v.fields), some)


@intrinsic
def quantize_factors(typing, bits, pairs, firsts, units, factors, scales, weights, chunks):  # type: ignore[no-untyped-def]
    """Write scales * weights of a tile as 16-bit integers, in pairs of two rows, with their units.

    `firsts` are the initial values of the sums, with which codes of 0 contribute 0.
    """
    names = "pairs firsts units factors scales weights chunks"
    return tile_intrinsic(_quantize_factors, names, bits, pairs, firsts, units, factors, scales, weights, chunks)


def _quantize_factors(v: TileEmitter) -> None:
    b = v.build
    largest, size, count = (v.variable(splat(zero)) for zero in (0, 0.0, 0))
    with cgutils.for_range(b, v["chunks"]) as chunk:
        start = v.times(chunk.index, LANES)
        factors = b.fmul(v.floats("scales", start), v.load("weights", start))
        v.store("factors", start, factors)
        magnitudes = v.magnitudes(factors)
        largest.set(v.larger(largest.get(), magnitudes))
        size.set(b.fadd(size.get(), b.bitcast(magnitudes, FLOATS)))
    extents = b.bitcast(v.reduce_lanes(largest.get(), v.larger, v.fields), FLOATS)
    sizes = v.reduce_lanes(size.get(), b.fadd, v.fields)
    bounds = b.fmul(sizes, splat(v.top / _MAX_SUM))
    extents = b.select(b.fcmp_ordered(">", bounds, extents), bounds, extents)
    finite = b.fcmp_ordered("<", sizes, splat(float("inf")))
    inverses = v.inverses(extents, finite)
    v.store("units", 0, v.units(extents, finite))
    even = [p // v.fields * 2 * v.fields + p % v.fields for p in range(LANES)]
    with cgutils.for_range(b, b.lshr(v["chunks"], v.at(1))) as two:
        start = v.times(two.index, WIDE)
        low, high = (v.integers(v.load("factors", v.at(start, k)), inverses) for k in (0, LANES))
        first, second = (v.shuffle(low, high, [i + row * v.fields for i in even]) for row in (0, 1))
        v.store("pairs", v.times(two.index, LANES), b.or_(b.and_(first, splat(0xFFFF)), b.shl(second, splat(16))))
        for some in (low, high):
            count.set(b.add(count.get(), b.ashr(b.shl(some, splat(16)), splat(16))))
    zeros = b.mul(v.reduce_lanes(count.get(), b.add, v.fields), v.of_fields(v.zeros))
    v.store("firsts", 0, b.ashr(zeros, splat(1)))


@intrinsic
def sum_rows(typing, bits, total, words, at, n, pairs, firsts, units, base, after):  # type: ignore[no-untyped-def]
    """Write sum_i weight_i row_i of a tile, from the results of `quantize_factors`."""
    names = "total words at n pairs firsts units base after"
    return tile_intrinsic(_sum_rows, names, bits, total, words, at, n, pairs, firsts, units, base, after)


def _sum_rows(v: TileEmitter) -> None:
    b = v.build
    last, count = b.sub(v["n"], v.at(1)), b.lshr(v.at(v["n"], 1), v.at(1))
    for fields, s, part in v.parts(2 * WIDE):
        firsts = [v.broadcast_element("firsts", k) for k in fields]
        sums = {(c, f, side): v.variable(first) for c in (0, WIDE) for f, first in enumerate(firsts) for side in (0, 1)}
        with cgutils.for_range(b, count) as pair:
            v.prefetch_next("base", part, pair.index, count, 4 * WIDE * len(fields) // v.fields)
            one = v.times(pair.index, 2)
            other = v.at(one, 1)
            other = b.select(b.icmp_unsigned("<", other, last), other, last)  # The integer of a missing row is 0.
            rows = [v.at(v["at"], v.times(i, v.block), s) for i in (one, other)]
            row = v.times(pair.index, v.fields)
            integers = [b.bitcast(v.broadcast_element("pairs", v.at(row, k)), INT16S) for k in fields]
            for c in (0, WIDE):
                first, second = (v.load("words", v.at(start, c), WIDE) for start in rows)
                for side, order in enumerate((_LOW, _HIGH)):
                    codes = v.codes(v.shuffle(first, second, order), fields)
                    for f, (code, number) in enumerate(zip(codes, integers, strict=True)):
                        place = sums[c, f, side]
                        place.set(v.add_products(place.get(), code, number))
        for f, k in enumerate(fields):
            unit = v.broadcast_element("units", k)
            for c in (0, WIDE):
                for i in (0, LANES):
                    order = _ORDER[i : i + LANES]
                    some = v.shuffle(sums[c, f, 0].get(), sums[c, f, 1].get(), order)
                    v.store("total", v.at(s, k * v.block + c + i), v.scaled(some, unit))


@intrinsic
def store_past_caches(typing, out, at, scale, base, total, count):  # type: ignore[no-untyped-def]
    """Write scale * base + total to `count` elements of `out`, a multiple of 16, with non-temporal stores.

    These do not read `out` into the caches first, but need aligned memory.

    Returns:
        Whether `out` is aligned. If not, nothing is written.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Emitter(context, builder, signature.args, arguments, "out at scale base total count")
        start = v.address("out", v["at"])
        size = LANES * (2 if start.type.pointee.element == INT16 else 4)
        low = builder.and_(builder.ptrtoint(start, INDEX), v.at(size - 1))
        aligned = builder.icmp_unsigned("==", low, v.at(0))
        with builder.if_then(aligned):
            factor = v.broadcast(v["scale"])
            with cgutils.for_range(builder, builder.lshr(v["count"], v.at(4))) as loop:
                j = v.times(loop.index, LANES)
                to = v.at(v["at"], j)
                product = builder.fmul(factor, v.load("base", to), flags=FAST)
                values = builder.fadd(product, v.load("total", j), flags=FAST)
                values = v.bfloat16(values) if start.type.pointee.element == INT16 else values
                store = builder.store(values, v.address("out", to), align=size)
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(INT, 1)]))
        return aligned

    return types.boolean(out, _U, scale, base, total, _U), generate


@intrinsic
def store_fence(typing):  # type: ignore[no-untyped-def]
    """Wait until the stores of `store_past_caches`, which are weakly ordered, are visible to other threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if context.codegen().magic_tuple()[0].startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.sfence"), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate

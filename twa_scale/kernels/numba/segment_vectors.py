"""The innermost loops over tiles that several segments share, as LLVM vector code."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from twa_scale.kernels.numba.intrinsics import FAST, FLOAT, INT, INT16, INT16S, INTS, LANES, WIDE, Emitter, splat
from twa_scale.kernels.numba.packed_vectors import TileEmitter, tile_intrinsic

_U = types.uint64
_DOUBLE = ir.DoubleType()
_NUM_DOUBLES = 8  # float64 numbers in a register of 512 bits


@intrinsic
def move_lanes(typing, products, to, lanes, at, n, sums):  # type: ignore[no-untyped-def]
    """Add the sums of the 16 lanes of each of n rows to float64 products, and set the lanes to zero.

    The last n % 16 rows remain: their sums are written to `sums`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Emitter(context, builder, signature.args, arguments, "products to lanes at n sums")
        with cgutils.for_range(builder, builder.lshr(v["n"], v.at(4))) as chunk:
            row = v.times(chunk.index, LANES)
            start = v.at(v["at"], v.times(row, LANES))
            total = v.sums([v.load("lanes", v.at(start, i * LANES)) for i in range(LANES)])
            for i in range(LANES):
                v.store("lanes", v.at(start, i * LANES), splat(0.0))
            for i in range(0, LANES, _NUM_DOUBLES):
                wide = builder.fpext(
                    v.shuffle(total, total, range(i, i + _NUM_DOUBLES)), ir.VectorType(_DOUBLE, _NUM_DOUBLES)
                )
                place = v.at(v["to"], row, i)
                v.store("products", place, builder.fadd(v.load("products", place, _NUM_DOUBLES), wide))
        rest = builder.and_(v["n"], v.at(LANES - 1))
        with builder.if_then(builder.icmp_unsigned("!=", rest, v.at(0))):
            start = v.at(v["at"], v.times(builder.sub(v["n"], rest), LANES))
            v.store("sums", 0, v.sums([v.load("lanes", v.at(start, i * LANES)) for i in range(LANES)]))
        return context.get_dummy_value()

    return types.void(products, _U, lanes, _U, _U, sums), generate


@intrinsic
def prefetch_products(typing, products, first, stop):  # type: ignore[no-untyped-def]
    """Prefetch products [first, stop), which will be written."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Emitter(context, builder, signature.args, arguments, "products first stop")
        with cgutils.for_range_slice(builder, v["first"], v["stop"], v.at(_NUM_DOUBLES), inc=True) as (index, _):
            v.prefetch("products", index, write=True)
        return context.get_dummy_value()

    return types.void(products, _U, _U), generate


@intrinsic
def dot_rest(typing, bits, lanes, words, at, n, scales, field, integers, units):  # type: ignore[no-untyped-def]
    """Write <row_i, gradient> of one block to 16 lanes for each of n rows.

    `integers` and `units` are those of a gradient that is zero outside of the rest.
    """
    names = "lanes words at n scales field integers units"
    return tile_intrinsic(_dot_rest, names, bits, lanes, words, at, n, scales, field, integers, units)


def _dot_rest(v: TileEmitter) -> None:
    vectors, code = range(v.block // WIDE), _codes_of_field(v)
    integers = [v.load("integers", c * WIDE, WIDE) for c in vectors]
    first = splat(0)
    for some in integers:
        first = v.add_products(first, some, splat(v.zeros[0], WIDE))
    first = v.build.ashr(first, splat(1))
    unit = v.element("units", 0)
    with cgutils.for_range(v.build, v["n"]) as row:
        total = first
        for c, some in zip(vectors, integers, strict=True):
            words = v.load("words", v.at(v["at"], v.times(row.index, v.block), c * WIDE), WIDE)
            total = v.add_products(total, code(words), some)
        factor = v.build.fmul(_scale(v, row.index), unit)
        v.store("lanes", v.times(row.index, LANES), v.scaled(total, v.broadcast(factor)))


@intrinsic
def sum_rest(typing, bits, total, words, at, n, scales, weights, of, field, start, stop):  # type: ignore[no-untyped-def]
    """Write sum_i weight_i row_i of the words [start, stop) of one block, in steps of 32 words.

    The weights of the rows are those from index `of` on.
    """
    names = "total words at n scales weights of field start stop"
    return tile_intrinsic(_sum_rest, names, bits, total, words, at, n, scales, weights, of, field, start, stop)


def _sum_rest(v: TileEmitter) -> None:
    b, code = v.build, _codes_of_field(v)
    zero = splat(v.zeros[0], WIDE)  # minus twice the code of 0
    with cgutils.for_range_slice(b, v["start"], v["stop"], v.at(WIDE), inc=True) as (word, _):
        sums = [v.variable(splat(0.0)) for _ in range(2)]
        with cgutils.for_range(b, v["n"]) as row:
            words = v.load("words", v.at(v["at"], v.times(row.index, v.block), word), WIDE)
            levels = b.add(b.shl(code(words), splat(1, WIDE)), zero)
            weight = b.fmul(v.element("weights", v.at(v["of"], row.index)), ir.Constant(FLOAT, 0.5))
            factor = v.broadcast(b.fmul(_scale(v, row.index), weight))
            for i, place in enumerate(sums):
                level = b.sext(v.shuffle(levels, levels, range(i * LANES, (i + 1) * LANES)), INTS)
                place.set(b.fadd(place.get(), v.scaled(level, factor), flags=FAST))
        for i, place in enumerate(sums):
            v.store("total", v.at(word, i * LANES), place.get())


def _codes_of_field(v: TileEmitter) -> Any:
    """Return a function that returns the codes in 32 words of the field of a call, which is known at run time."""
    shift = v.build.trunc(v.times(v["field"], v.bits), INT16)
    one = v.build.insert_element(ir.Constant(INT16S, ir.Undefined), shift, ir.Constant(INT, 0))
    shifts = v.shuffle(one, one, [0] * WIDE)
    mask = splat((1 << v.bits) - 1, WIDE)
    return lambda words: v.build.and_(v.build.lshr(words, shifts), mask)


def _scale(v: TileEmitter, row: Any) -> Any:
    """Return the scale of the field of a call, a float."""
    scale = v.build.zext(v.element("scales", v.at(v.times(row, v.fields), v["field"])), INT)
    return v.build.bitcast(v.build.shl(scale, ir.Constant(INT, 16)), FLOAT)

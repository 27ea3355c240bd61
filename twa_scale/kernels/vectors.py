"""The innermost loops over packed rows, written as vectors for LLVM, which splits them as the processor needs.

From loops in Python LLVM makes no sums that stay in registers from one row to the next; these are twice as fast.

Who edits this file must delete numba's caches (`__pycache__/*.nb*`): they know the file of the caller only.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
UNIT = 64
"""Words of a row that are worked on at a time, four fields of each: 16 sums, or 16 parts of the gradient."""
_CHUNKS = range(0, UNIT, LANES)
_FIELDS = range(4)
_FAST = ("contract", "reassoc", "nsz")
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_U = types.uint64


class _Vectors:
    """Emits instructions on the arguments of one call: the memory of arrays and the numbers, by their names."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, names: str) -> None:
        self.builder = builder
        self._arguments = {
            name: context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for name, kind, value in zip(names.split(), signature.args, arguments, strict=True)
        }

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def times(self, a: Any, b: Any) -> Any:
        """Return the product of two indices."""
        return self.builder.mul(a, b)

    def at(self, *terms: Any) -> Any:
        """Return the sum of indices, numbers of Python among them."""
        total = ir.Constant(ir.IntType(64), 0)
        for term in terms:
            total = self.builder.add(total, ir.Constant(ir.IntType(64), term) if isinstance(term, int) else term)
        return total

    def load(self, name: str, index: Any) -> Any:
        """Return 16 neighbours."""
        return self.builder.load(self._place(name, index), align=4)

    def store(self, name: str, index: Any, values: Any) -> None:
        """Put down 16 neighbours."""
        self.builder.store(values, self._place(name, index), align=4)

    def splat(self, name: str, index: Any) -> Any:
        """Return one element in all lanes."""
        number = self.builder.load(self.builder.gep(self[name], [index]))
        kind = ir.VectorType(number.type, LANES)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))

    def masked(self, words: Any, mask: Any) -> Any:
        """Return the field that a mask leaves, as floats."""
        return self.builder.sitofp(self.builder.and_(words, mask), _FLOATS)

    def add_product(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c; just the product where c is None."""
        product = self.builder.fmul(a, b, flags=_FAST)
        return product if c is None else self.builder.fadd(product, c, flags=_FAST)

    def _place(self, name: str, index: Any) -> Any:
        pointer = self.builder.gep(self[name], [index])
        return self.builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, LANES).as_pointer())


@intrinsic
def add_dots(  # type: ignore[no-untyped-def]
    typing, lanes, words, at, pitch, n, masks, k, factors, fields, right, s, block
):
    """Add factor_ik * <masked words, gradient> of 64 words and fields k to k + 3 to the 16 lanes of each of n rows.

    The words of row i start at `at` + i * `pitch`; `right` holds the gradient block by block, and s is where in a block
    the words start. The sums of a row stay beside each other: adding them up for each block would take longer.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = _Vectors(
            context, builder, signature, arguments, "lanes words at pitch n masks k factors fields right s block"
        )
        masks = {f: v.splat("masks", v.at(v["k"], f)) for f in _FIELDS}
        starts = {f: v.at(v["s"], v.times(v.at(v["k"], f), v["block"])) for f in _FIELDS}
        gradient = {(f, c): v.load("right", v.at(starts[f], c)) for f in _FIELDS for c in _CHUNKS}
        with cgutils.for_range(builder, v["n"]) as loop:
            start, lane = v.at(v["at"], v.times(loop.index, v["pitch"])), v.times(loop.index, v.at(LANES))
            sums: dict[int, Any] = dict.fromkeys(_FIELDS)
            for c in _CHUNKS:
                some = v.load("words", v.at(start, c))
                for f in _FIELDS:
                    sums[f] = v.add_product(v.masked(some, masks[f]), gradient[f, c], sums[f])
            total = v.load("lanes", lane)
            for f in _FIELDS:
                factor = v.splat("factors", v.at(v.times(loop.index, v["fields"]), v["k"], f))
                total = v.add_product(sums[f], factor, total)
            v.store("lanes", lane, total)
        return context.get_dummy_value()

    return types.void(lanes, words, _U, _U, _U, masks, _U, factors, _U, right, _U, _U), generate


@intrinsic
def sum_rows(  # type: ignore[no-untyped-def]
    typing, total, s, words, at, pitch, n, masks, k, factors, fields, block
):
    """Write sum_i factor_ik * masked words of 64 words and fields k to k + 3 of n rows into `total`, block by block.

    The words are placed as for `add_dots`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = _Vectors(context, builder, signature, arguments, "total s words at pitch n masks k factors fields block")
        masks = {f: v.splat("masks", v.at(v["k"], f)) for f in _FIELDS}
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = {(f, c): cgutils.alloca_once(builder, _FLOATS) for f in _FIELDS for c in _CHUNKS}  # LLVM: registers
        for place in sums.values():
            builder.store(zero, place)
        with cgutils.for_range(builder, v["n"]) as loop:
            start, q = v.at(v["at"], v.times(loop.index, v["pitch"])), v.times(loop.index, v["fields"])
            factors = {f: v.splat("factors", v.at(q, v["k"], f)) for f in _FIELDS}
            for c in _CHUNKS:
                some = v.load("words", v.at(start, c))
                for f in _FIELDS:
                    place = sums[f, c]
                    builder.store(v.add_product(v.masked(some, masks[f]), factors[f], builder.load(place)), place)
        for (f, c), place in sums.items():
            v.store("total", v.at(v["s"], v.times(v.at(v["k"], f), v["block"]), c), builder.load(place))
        return context.get_dummy_value()

    return types.void(total, _U, words, _U, _U, _U, masks, _U, factors, _U, _U), generate

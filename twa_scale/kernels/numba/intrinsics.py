"""Helpers that emit LLVM vector instructions, which LLVM splits into the registers of the processor."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

binding.initialize_native_asmparser()  # for inline assembly
LANES = 16
WIDE = 2 * LANES
INDEX, INT, INT16, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
INTS, FLOATS, INT16S = ir.VectorType(INT, LANES), ir.VectorType(FLOAT, LANES), ir.VectorType(INT16, WIDE)
FAST = ("contract", "reassoc", "nsz")
FUSED = ("contract",)
_ROUNDER = float(3 << 22)  # Adding it to a float32 of at most 2^22 leaves the nearest integer in the low bits.
Join = Callable[[Any, Any], Any]


def splat(value: float, lanes: int = LANES) -> Any:
    """Return a vector constant with equal lanes: 16 floats or 32-bit integers, or 32 16-bit integers."""
    kind = INT16 if lanes == WIDE else INT if isinstance(value, int) else FLOAT
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


class Emitter:
    """Emits instructions that use the arguments of one call, which are arrays and indices, by name.

    Args:
        context: the target context of numba.
        builder: the LLVM IR builder.
        kinds: the numba types of the arguments.
        arguments: the LLVM values of the arguments.
        names: the names of the arguments, separated by spaces.
    """

    def __init__(self, context: Any, builder: Any, kinds: Sequence[Any], arguments: Sequence[Any], names: str) -> None:
        self.build = builder
        self._features = context.codegen().magic_tuple()[2].split(",")
        self._arguments = {
            name: context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for name, kind, value in zip(names.split(), kinds, arguments, strict=True)
        }

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def at(self, *terms: Any) -> Any:
        """Return the sum of some indices."""
        total, *others = (ir.Constant(INDEX, term) if isinstance(term, int) else term for term in terms)
        for term in others:
            total = self.build.add(total, term)
        return total

    def times(self, index: Any, factor: Any) -> Any:
        """Return the product of an index and a factor."""
        return self.build.mul(index, self.at(factor))

    def address(self, name: str, index: Any, lanes: int = LANES) -> Any:
        """Return the address of `lanes` consecutive elements."""
        pointer = self.build.gep(self[name], [self.at(index)])
        return self.build.bitcast(pointer, ir.VectorType(pointer.type.pointee, lanes).as_pointer())

    def load(self, name: str, index: Any, lanes: int = LANES) -> Any:
        """Load `lanes` consecutive elements."""
        return self.build.load(self.address(name, index, lanes), align=2)

    def floats(self, name: str, index: Any) -> Any:
        """Load 16 consecutive elements as floats, from float32 or from the bits of bfloat16."""
        values = self.load(name, index)
        return values if values.type == FLOATS else self.widened(values)

    def store(self, name: str, index: Any, values: Any) -> None:
        """Store a vector to consecutive elements."""
        self.build.store(values, self.address(name, index, values.type.count), align=2)

    def prefetch(self, name: str, index: Any, write: bool = False) -> None:
        """Prefetch the cache line of an element into the L2 cache."""
        pointer = self.build.bitcast(self.build.gep(self[name], [self.at(index)]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
        fetch = cgutils.get_or_insert_function(self.build.module, kind, "llvm.prefetch.p0i8")
        self.build.call(fetch, [pointer, *(ir.Constant(INT, value) for value in (int(write), 2, 1))])

    def element(self, name: str, index: Any) -> Any:
        """Load one element."""
        return self.build.load(self.build.gep(self[name], [self.at(index)]))

    def broadcast_element(self, name: str, index: Any) -> Any:
        """Load one element into all 16 lanes."""
        return self.broadcast(self.element(name, index))

    def broadcast(self, number: Any) -> Any:
        """Return a vector of 16 equal numbers."""
        one = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        one = self.build.insert_element(one, number, ir.Constant(INT, 0))
        return self.shuffle(one, one, [0] * LANES)

    def shuffle(self, a: Any, b: Any, order: Sequence[int]) -> Any:
        """Return the lanes `order` of the concatenation of two vectors."""
        return self.build.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(order)), list(order)))

    def reduce_lanes(self, values: Any, join: Join, step: int = 1) -> Any:
        """Reduce the lanes that are a multiple of `step`, a power of two, apart. Each of them gets the result."""
        while step < LANES:
            values = join(values, self.shuffle(values, values, [(i + step) % LANES for i in range(LANES)]))
            step *= 2
        return values

    def exchanged(self, a: Any, b: Any, step: int) -> tuple[Any, Any]:
        """Return two vectors after lanes i + step of the first and i of the second are exchanged, for i & step == 0."""
        lanes = range(LANES)
        first = self.shuffle(a, b, [i - step + LANES if i & step else i for i in lanes])
        return first, self.shuffle(a, b, [i + LANES if i & step else i + step for i in lanes])

    def transposed(self, vectors: Sequence[Any]) -> list[Any]:
        """Return m vectors, a power of two. Lane i * m + k of vector j is lane i * m + j of argument k."""
        found = list(vectors)
        for step in (1, 2, 4, 8):
            for j in (j for j in range(len(found)) if not j & step and step < len(found)):
                found[j], found[j + step] = self.exchanged(found[j], found[j + step], step)
        return found

    def sums(self, vectors: Sequence[Any]) -> Any:
        """Return a vector whose lane i is the sum of the lanes of vector i, for 16 vectors."""
        found = list(vectors)
        for step in (1, 2, 4, 8):
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [self.build.fadd(*self.exchanged(a, b, step), flags=FAST) for a, b in pairs]
        return found[0]

    def magnitudes(self, values: Any) -> Any:
        """Return the bits of absolute values. As unsigned integers they have the order of the floats."""
        return self.build.and_(self.build.bitcast(values, INTS), splat(0x7FFFFFFF))

    def larger(self, a: Any, b: Any) -> Any:
        """Return the lane-wise maximum of unsigned integers."""
        return self.build.select(self.build.icmp_unsigned(">", a, b), a, b)

    def nearest(self, values: Any) -> Any:
        """Return the nearest 16-bit integers in the low halves of 16 lanes. The high halves are undefined."""
        return self.build.bitcast(self.build.fadd(values, splat(_ROUNDER), flags=FUSED), INTS)

    def add_products(self, total: Any, a: Any, b: Any) -> Any:
        """Add a_2j b_2j + a_2j+1 b_2j+1, for 32 integers each, to 16 sums."""
        if "+avx512vnni" in self._features:
            # LLVM would divide instructions that add to the same sum into two, for latency, which is no limit here.
            kind = ir.FunctionType(INTS, [INTS, INT16S, INT16S])
            instruction = ir.InlineAsm(kind, "vpdpwssd $3, $2, $0", "=v,0,v,v")
            return self.build.call(instruction, [total, a, b])
        if "+avx512bw" in self._features:  # LLVM finds the instructions of AVX2 and SSE itself.
            kind = ir.FunctionType(INTS, [INT16S, INT16S])
            instruction = cgutils.get_or_insert_function(self.build.module, kind, "llvm.x86.avx512.pmaddw.d.512")
            return self.build.add(total, self.build.call(instruction, [a, b]))
        for odd in (0, 1):
            two = [self.build.sext(self.shuffle(x, x, range(odd, WIDE, 2)), INTS) for x in (a, b)]
            total = self.build.add(total, self.build.mul(*two))
        return total

    def scaled(self, sums: Any, factor: Any) -> Any:
        """Return factor * sums as floats."""
        return self.build.fmul(self.build.sitofp(sums, FLOATS), factor, flags=FAST)

    def widened(self, values: Any) -> Any:
        """Return the floats of some bfloat16 bits."""
        return self.build.bitcast(self.build.shl(self.build.zext(values, INTS), splat(16)), FLOATS)

    def bfloat16(self, values: Any) -> Any:
        """Return the bits of floats rounded to bfloat16, to nearest even."""
        bits = self.build.bitcast(values, INTS)
        high = self.build.lshr(bits, splat(16))
        even = self.build.add(self.build.add(bits, splat(0x7FFF)), self.build.and_(high, splat(1)))
        number = self.build.fcmp_ordered("==", values, values)
        rounded = self.build.select(number, self.build.lshr(even, splat(16)), splat(0x7FC0))
        return self.build.trunc(rounded, ir.VectorType(INT16, LANES))

    def allocate(self, name: str, kind: Any, count: int) -> None:
        """Allocate a local array with this name on the stack."""
        self._arguments[name] = cgutils.alloca_once(self.build, kind, size=count)

    def variable(self, first: Any) -> "Variable":
        """Return a variable that loops may change."""
        return Variable(self.build, first)


class Variable:
    """A local variable on the stack, which LLVM promotes to a register."""

    def __init__(self, builder: Any, first: Any) -> None:
        self._builder = builder
        self._place = cgutils.alloca_once(builder, first.type)
        self.set(first)

    def get(self) -> Any:
        """Return the value."""
        return self._builder.load(self._place)

    def set(self, value: Any) -> None:
        """Set the value."""
        self._builder.store(value, self._place)

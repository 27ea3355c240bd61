"""Compile the GPU kernels with Triton for processors that this machine does not have.

`python -m tests.gpu_code` prints the registers and instructions of each kernel, and the share of a card's bandwidth
that they allow.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twa_scale.kernels.packed_rows import BLOCKS
from twa_scale.kernels.rows import TILE
from twa_scale.kernels.triton import fused, programs, segmented

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WARP = {name: target.warp_size for name, target in TARGETS.items()}
STORES = ("dense32", "dense16", "packed8", "packed4", "packed2", "packed1")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_VALUES = {"dense32": "*fp32", "dense16": "*bf16"}


OF_MEMORY = 0.92
"""Of a card's bandwidth, what a copy reaches."""
OF_SLOTS = 0.8
"""Of the issue slots, four a clock and multiprocessor, what code of this kind fills."""


@dataclass(frozen=True)
class Card:
    """The properties that determine the speed of a GPU: bytes per second, multiprocessors, and clock rate."""

    target: str
    bandwidth: float
    multiprocessors: int
    clock: float


CARDS = {
    "A100 80 GB": Card("sm_80", 2.04e12, 108, 1.41e9),
    "H100 SXM": Card("sm_90", 3.35e12, 132, 1.755e9),
    "H200": Card("sm_90", 4.8e12, 132, 1.755e9),
    "B200": Card("sm_100", 8.0e12, 148, 1.85e9),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    operation: str
    store: str
    target: str
    aligned: bool = True
    """Whether spans begin with a tile, as those of matrices whose rows are multiples of 64 do."""
    full: bool = True
    """Whether all tiles are."""
    segments: Literal["none", "whole", "split"] = "none"
    """Whether sums and weights are those of segments, and whether these may start inside a part of a program."""

    @property
    def shape(self) -> programs.Shape:
        if self.store in _VALUES:
            return programs.DENSE
        if self.segments == "none":
            return (programs.PROJECT if self.operation == "project" else programs.COMBINE)[self.bits]
        segments = segmented.PROJECT_SEGMENTS if self.operation == "project" else segmented.COMBINE_SEGMENTS
        return segments[self.bits]

    @property
    def bits(self) -> int:
        return int(self.store.removeprefix("packed"))

    @property
    def elements(self) -> int:
        """The elements of a program."""
        tile = TILE if self.store in _VALUES else BLOCKS[self.bits] * (16 // self.bits)
        return tile * self.shape.tiles

    @property
    def row_bytes(self) -> float:
        """The bytes of one row of a program."""
        if self.store in _VALUES:
            return self.elements * (4 if self.store == "dense32" else 2)
        return self.elements * (self.bits / 8 + 2 / BLOCKS[self.bits])

    @property
    def fixed_bytes(self) -> int:
        """The bytes of a program besides the rows: the gradient; or the center, and weights in bfloat16."""
        return self.elements * (4 if self.operation == "project" else 6)

    @property
    def bytes_in_flight(self) -> float:
        """The bytes of rows in flight per multiprocessor: as many programs as registers allow, at most 32."""
        programs = min(32, 65536 // (32 * -(-self.registers // 8) * 8))
        return programs * self.shape.rows * self.row_bytes

    @cached_property
    def compiled(self) -> "triton.compiler.CompiledKernel":
        dense = self.store in _VALUES
        module = fused if self.segments == "none" else segmented
        function = getattr(module, f"_{self.operation}_{'dense' if dense else 'packed'}")
        data = {"values": _VALUES[self.store]} if dense else {"words": "*i16", "scales": "*bf16"}
        constants = {"TILE": TILE} if dense else {"BITS": self.bits, "BLOCK": BLOCKS[self.bits]}
        constants |= {"TILES": self.shape.tiles, "ROWS": self.shape.rows, "FULL": self.full}
        if self.segments != "none":
            constants |= {"SPLIT": self.segments == "split"} | ({"SLOTS": 2} if self.operation == "project" else {})
        types = data | dict.fromkeys(constants, "constexpr")
        types |= {"gradient": "*fp32", "partial": "*fp32", "weights": "*fp32", "base": "*fp32", "out": "*bf16"}
        types["center"] = "fp32"
        signature = {name: types.get(name, "i32") for name in function.arg_names}
        divisible = [name for name, kind in signature.items() if kind[0] == "*"] + ["lead"] * self.aligned
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in divisible}
        source = ASTSource(function, signature, constants, attributes)
        return triton.compile(source, target=TARGETS[self.target], options={"num_warps": 1})

    @cached_property
    def text(self) -> str:
        """The disassembly."""
        if self.target.startswith("gfx"):
            return str(self.compiled.asm["amdgcn"])
        return self._inspected("nvdisasm", "-c")

    @property
    def registers(self) -> int:
        if self.target.startswith("gfx"):
            return int(re.findall(r"\.vgpr_count:\s+(\d+)", self.text)[-1])
        return int(re.findall(r"REG:(\d+)", self._usage)[-1])

    @property
    def spilled(self) -> int:
        """The spilled registers (AMD) or bytes (NVIDIA). Scalar registers of AMD are spilled to vector registers."""
        if self.target.startswith("gfx"):
            return sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", self.text)))
        return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", self._usage)))

    @property
    def wide_loads(self) -> int:
        """The number of loads of 16 bytes per lane."""
        return len(re.findall(r"LDG\.E\S*\.128|global_load_dwordx4|buffer_load_dwordx4", self.text))

    @property
    def loop(self) -> Counter[str]:
        """The number of instructions of the loop over rows, for full tiles (NVIDIA)."""
        lines = self.text.splitlines()
        labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*\.?(\.L_x?_?\w+):", line))}
        bodies = [
            lines[labels[match[1]] : i]
            for i, line in enumerate(lines)
            if (match := re.search(r"BRA\S* .*\((\.L_\w+)\)", line)) and labels.get(match[1], i) < i - 1
        ]
        return _opcodes(max(bodies, key=len))

    def slots(self, n: int) -> float:
        """The number of issue slots of a program of n rows (NVIDIA)."""
        rest = sum(_opcodes(self.text.splitlines()).values()) - sum(self.loop.values())
        return rest + n * sum(self.loop.values()) / self.shape.rows

    def share(self, card: "Card", n: int) -> float:
        """Return the predicted share of the GPU's bandwidth, limited by memory or by the issue of instructions."""
        nbytes = n * self.row_bytes + self.fixed_bytes
        memory = nbytes * card.multiprocessors * card.clock / card.bandwidth
        return memory / max(memory / OF_MEMORY, self.slots(n) / 4 / OF_SLOTS)

    @cached_property
    def _usage(self) -> str:
        return self._inspected("cuobjdump", "--dump-resource-usage")

    def _inspected(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _opcodes(lines: list[str]) -> Counter[str]:
    actual = (re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line) for line in lines)
    return Counter(match[1] for match in actual if match and match[1] != "NOP")


def main() -> None:
    """Print one line for each card, store and operation."""
    print("| card | store | operation | registers | slots per row and 1024 elements | n = 16 | n = 64 |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for name, card in CARDS.items():
        for store in STORES:
            for operation in ("project", "combine"):
                kernel = Kernel(operation, store, card.target)
                slots = sum(kernel.loop.values()) / kernel.shape.rows / kernel.elements * 1024
                shares = " | ".join(f"{kernel.share(card, n):.0%}" for n in (16, 64))
                print(f"| {name} | `{store}` | {operation} | {kernel.registers} | {slots:.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()

"""Compiling the GPU kernels with Triton for processors that this machine does not have."""

from itertools import product
from typing import Literal

import pytest
import triton
from packaging.version import Version
from triton.compiler import ASTSource

from tests.gpu_code import STORES, TARGETS, WARP, Kernel
from tests.grid import grid
from twa_scale.kernels.triton import segmented

pytestmark = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.3"), reason="earlier compilers take the attributes of arguments otherwise"
)
OPERATIONS = ("project", "combine")
IN_FLIGHT = 15_000
"""Bytes that a multiprocessor has to wait for at a time: 3.35 TB/s x 600 ns over the 132 of an H100."""


def check(kernel: Kernel) -> None:
    assert kernel.spilled == 0
    loads = kernel.shape.rows * kernel.row_bytes * (1 if kernel.store.startswith("dense") else 0.9)
    if kernel.aligned and kernel.full:
        loads += 4 * kernel.elements  # of the gradient or the center
    assert kernel.wide_loads >= int(loads / (16 * WARP[kernel.target]))
    if WARP[kernel.target] == 32 and kernel.store not in ("packed2", "packed1"):  # these are limited by instructions
        assert kernel.bytes_in_flight >= IN_FLIGHT


@pytest.mark.parametrize("operation", OPERATIONS)
def test_packed4_compiles_for_hopper(operation: str) -> None:
    check(Kernel(operation, "packed4", "sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "operation", "store"), grid(product(TARGETS, OPERATIONS, STORES)))
def test_every_store_on_every_target(target: str, operation: str, store: str) -> None:
    check(Kernel(operation, store, target))
    assert Kernel(operation, store, target, full=False).spilled == 0


@pytest.mark.parametrize(
    ("store", "target", "operation", "segments"),
    grid(product(STORES, ["sm_80", "sm_90", "gfx90a"], OPERATIONS, ["whole", "split"])),
)
def test_kernels_with_segments_compile_without_spills(
    store: str, target: str, operation: str, segments: Literal["whole", "split"]
) -> None:
    kernel = Kernel(operation, store, target, segments=segments)
    assert kernel.spilled == 0
    assert kernel.wide_loads >= int(0.9 * kernel.shape.rows * kernel.row_bytes / (16 * WARP[target]))


@pytest.mark.parametrize("target", ["sm_90", "gfx90a"])
def test_sums_over_programs_compile(target: str) -> None:
    function = segmented._add_programs
    constants = {"SIZE": 1024, "SLOTS": 2, "N": 16, "CHUNK": 4096, "STEP": 32}
    types = {"partial": "*fp32", "total": "*fp64", "m": "i64", "length": "i64"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, {name: types.get(name, "i32") for name in function.arg_names}, constants)
    assert triton.compile(source, target=TARGETS[target], options={"num_warps": 1}).asm


@pytest.mark.slow
@pytest.mark.parametrize("store", [store for store in STORES if store.startswith("packed")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_spans_that_begin_within_a_tile(operation: str, store: str) -> None:
    if (operation, store) == ("combine", "packed1") and Version(triton.__version__) < Version("3.9"):
        pytest.skip("the compiler of Triton 3.8 reads these codes in parts of less than 16 bytes")
    check(Kernel(operation, store, "sm_90", aligned=False))

"""The inner loops over dense rows on a CPU. Each processes a range of tiles in one thread, without the GIL.

The code is written so that LLVM vectorizes it. Indices are unsigned, because signed ones may count from the end.
Integers are cast back after each operation, because numba widens them to 64 bits. Arrays are flat. bfloat16 is passed
as uint16. Fast math allows only reordering and fusing, so that infinities and NaN propagate.
"""

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit, types
from numba.extending import overload

from twa_scale.kernels.numba.code_cache import CodeCache

F = TypeVar("F", bound=Callable[..., Any])
U = np.uint64
FLOAT0 = np.float32(0)
FAST = {"contract", "reassoc", "nsz", "arcp"}
OPTIONS: Any = {"fastmath": FAST, "error_model": "numpy"}


def compiled(function: F, fastmath: set[str] = FAST, variant: int = 0) -> F:
    """Compile a function on its first call, and cache the machine code for other processes.

    numba caches next to the source file or in the user's cache directory, for each processor. Files are renamed into
    place, so ranks may compile at the same time. numba identifies cached code by the name of the function, and does not
    check other source files. The name therefore gets a digest of all kernels.

    Args:
        function: the function.
        fastmath: the fast-math flags of LLVM.
        variant: a number that distinguishes functions from one definition, which could otherwise get each other's code.
    """
    function.__qualname__ += f"-{variant}-{_sources()}"
    dispatcher = njit(function, nogil=True, **OPTIONS | {"fastmath": fastmath})
    try:
        dispatcher._cache = CodeCache(function)  # what `cache=True` does with numba's own class
    except RuntimeError as error:  # No cache directory is writable.
        logging.getLogger(__name__).info("kernels are compiled again in each process: %s", error)
    return dispatcher  # type: ignore[no-any-return]


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def inlined(function: F) -> F:
    """Have LLVM inline a function into its callers.

    LLVM knows their constants. numba can inline, too, but needs twice the time to compile then.
    """
    return njit(function, forceinline=True, **OPTIONS)  # type: ignore[no-any-return]


def exact(function: F) -> F:
    """Compile a function without fast math, except for fused multiply-add."""
    return compiled(function, {"contract"})


def widen(x: Any) -> Any:
    """Return `x` as float32. A uint16 holds the bits of a bfloat16."""


def narrow(out: Any, x: Any) -> Any:
    """Return float32 `x` in the type of `out`: unchanged, or as the bits of a bfloat16, rounded to nearest even."""


@overload(widen, strict=False)  # type: ignore[untyped-decorator]
def _widen(x: Any) -> Any:
    if isinstance(x, types.Integer):
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(narrow, strict=False)  # type: ignore[untyped-decorator]
def _narrow(out: Any, x: Any) -> Any:
    if isinstance(out.dtype, types.Integer):
        return lambda out, x: bfloat16(x)
    return lambda out, x: x


@compiled
def bfloat16(x: Any) -> Any:
    """Return the bits, uint16, of float32 `x` rounded to bfloat16, to nearest even."""
    bits = np.float32(x).view(np.uint32)
    even = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((even if x == x else np.uint32(0x7FC00000)) >> np.uint32(16))


@compiled
def project_dense(
    values: Any, n: int, m: int, tile: int, gradient: Any, segments: Any, start: int, stop: int, total: Any
) -> None:
    """Write <row_i, gradient> over tiles [start, stop) to `total`: sums (count, n), float64, flat, and their stride.

    `segments` is the length of a segment, and the position of the first column of tile `start` in its segment.
    """
    sums, pitch = total
    n, m, tile = U(n), U(m), U(tile)
    length, lead = segments
    tile_gradient = np.empty(tile, np.float32)
    segment, end = U(0), U(start) * tile + length - lead
    sums[:n] = 0.0
    for t in range(U(start), U(stop)):
        first = t * tile
        width = min(tile, m - first)
        for j in range(width):
            tile_gradient[j] = widen(gradient[first + j])
        low = U(0)
        while low < width:  # each segment of the tile
            if end <= first + low:
                segment, end = segment + U(1), end + length
                sums[segment * pitch : segment * pitch + n] = 0.0
            high = min(width, end - first)
            for i in range(n):
                row = first * n + i * width
                part = FLOAT0
                for j in range(low, high):
                    part += widen(values[row + j]) * tile_gradient[j]
                sums[segment * pitch + i] += part
            low = high


@compiled
def combine_dense(
    values: Any,
    n: int,
    m: int,
    tile: int,
    weights: Any,
    segments: Any,
    base: Any,
    scale: Any,
    out: Any,
    start: int,
    stop: int,
) -> None:
    """Write scale * base + sum_i weights_i row_i for tiles [start, stop), with weights (count, n)."""
    n, m, tile = U(n), U(m), U(tile)
    length, lead = segments
    total = np.empty(tile, np.float32)
    segment, end = U(0), U(start) * tile + length - lead
    for t in range(U(start), U(stop)):
        first = t * tile
        width = min(tile, m - first)
        for j in range(width):
            total[j] = scale * base[first + j]
        low = U(0)
        while low < width:
            if end <= first + low:
                segment, end = segment + U(1), end + length
            high = min(width, end - first)
            for i in range(n):
                row = first * n + i * width
                weight = weights[segment * n + i]
                for j in range(low, high):
                    total[j] += weight * widen(values[row + j])
            low = high
        for j in range(width):
            out[first + j] = narrow(out, total[j])


@compiled
def project_differences(
    row: Any, center: Any, gradient: Any, start: int, stop: int, tile: int, segments: Any, total: Any
) -> None:
    """Add <row - center, gradient> over elements [start, stop) to `total`, (count,), float64."""
    length, lead = segments
    low, segment, end = U(start), U(0), U(start) + length - lead
    while low < U(stop):
        if end <= low:
            segment, end = segment + U(1), end + length
        high = min((low // U(tile) + U(1)) * U(tile), min(end, U(stop)))  # wherever the range starts
        part = FLOAT0
        for j in range(low, high):
            part += (widen(row[j]) - center[j]) * widen(gradient[j])
        total[segment] += part
        low = high


@compiled
def add_difference(total: Any, row: Any, center: Any, weights: Any, segments: Any, start: int) -> None:
    """Add weight * (row - center), from element `start` on, to `total`, with weights (count,)."""
    length, lead = segments
    first, low, segment, end = U(start), U(0), U(0), length - lead
    while low < U(len(total)):
        high = min(end, U(len(total)))
        for j in range(low, high):
            total[j] += weights[segment] * (widen(row[first + j]) - center[first + j])
        low, segment, end = high, segment + U(1), end + length

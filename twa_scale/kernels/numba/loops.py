"""The inner loops on a CPU, compiled by numba; each handles a range of tiles in one thread, without the GIL.

Written so that LLVM vectorizes: indices are unsigned (a signed one may count from the end), integers are cast back
after each operation (they widen to 64 bits), and arrays are flat. bfloat16 comes as uint16. Infinite and NaN gradients
must come through: the fast math is only that of order and of fusing.
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

F = TypeVar("F", bound=Callable[..., Any])
U = np.uint64
FLOAT0 = np.float32(0)
FAST = {"contract", "reassoc", "nsz", "arcp"}


def compiled(function: F, fastmath: set[str] = FAST, variant: int = 0) -> F:
    """Compile on the first call, and keep the machine code for other processes where there is a place for it.

    numba writes it beside the function's file, or else into the user's cache directory, under the name of the processor
    and by a rename: ranks that compile at the same time do no harm. It finds it again by the function's name, and
    looks at no other file for changes; so the name gets a digest of all kernels. `variant` tells functions apart that
    one definition makes: two of a name that are compiled at the same time could be given each other's code.
    """
    function.__qualname__ += f"-{variant}-{_sources()}"
    options: Any = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return njit(function, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError as error:  # no directory can be written
        logging.getLogger(__name__).info("kernels are compiled anew in each process: %s", error)
        return njit(function, **options)  # type: ignore[no-any-return]


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def inlined(function: F) -> F:
    """Compile as a part of whatever calls it, whose constants it then knows."""
    return njit(function, inline="always", fastmath=FAST, error_model="numpy")  # type: ignore[no-any-return]


def exact(function: F) -> F:
    """Compile without fast math, but for fusing."""
    return compiled(function, {"contract"})


def widen(x: Any) -> Any:
    """Return a float32; a uint16 is a bfloat16."""


def narrow(out: Any, x: Any) -> Any:
    """Return float32 x as `out` holds it: itself, or rounded to bfloat16, ties to even."""


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
    """Return the uint16 of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(x).view(np.uint32)
    even = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((even if x == x else np.uint32(0x7FC00000)) >> np.uint32(16))


@compiled
def project_dense(values: Any, n: int, m: int, tile: int, gradient: Any, start: int, stop: int, total: Any) -> None:
    """Add <row_i, gradient> over tiles [start, stop) to total (n,), float64."""
    n, m, tile = U(n), U(m), U(tile)
    right = np.empty(tile, np.float32)
    for t in range(U(start), U(stop)):
        first = t * tile
        width = min(tile, m - first)
        for j in range(width):
            right[j] = widen(gradient[first + j])
        for i in range(n):
            row = first * n + i * width
            part = FLOAT0
            for j in range(width):
                part += widen(values[row + j]) * right[j]
            total[i] += part


@compiled
def combine_dense(
    values: Any, n: int, m: int, tile: int, weights: Any, base: Any, scale: Any, out: Any, start: int, stop: int
) -> None:
    """Write scale * base + sum_i weights_i row_i of tiles [start, stop)."""
    n, m, tile = U(n), U(m), U(tile)
    total = np.empty(tile, np.float32)
    for t in range(U(start), U(stop)):
        first = t * tile
        width = min(tile, m - first)
        for j in range(width):
            total[j] = scale * base[first + j]
        for i in range(n):
            row = first * n + i * width
            weight = weights[i]
            for j in range(width):
                total[j] += weight * widen(values[row + j])
        for j in range(width):
            out[first + j] = narrow(out, total[j])


@compiled
def project_differences(row: Any, center: Any, gradient: Any, start: int, stop: int, tile: int) -> float:
    """Return <row - center, gradient> over elements [start, stop)."""
    total = 0.0
    for first in range(U(start), U(stop), U(tile)):
        part = FLOAT0
        for j in range(first, min(first + U(tile), U(stop))):
            part += (widen(row[j]) - center[j]) * widen(gradient[j])
        total += part
    return total


@compiled
def add_difference(total: Any, row: Any, center: Any, weight: Any, start: int) -> None:
    """Add weight * (row - center) from element `start` on to a piece."""
    first = U(start)
    for j in range(U(len(total))):
        total[j] += weight * (widen(row[first + j]) - center[first + j])

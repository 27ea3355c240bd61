# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Kernels for GPUs in Triton: codes are unpacked, scaled and multiplied in registers, in one pass over their bytes."""

from typing import Any

import torch
import triton
import triton.language as tl

from twa_scale.kernels.packed import RUN, Packed, zero_of
from twa_scale.kernels.protocol import Differences, Rows
from twa_scale.kernels.reference import TorchKernels
from twa_scale.kernels.rows import TILE, Dense

_SPAN = 16  # dense tiles that one program sees: enough bytes in flight, few partial sums
_WIDEST = 1 << 20  # partial sums that exist at a time


@triton.jit
def _project_dense(values, gradient, partial, n, m, first, TILE: tl.constexpr, SPAN: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tile = (first + program) * SPAN + tl.arange(0, SPAN)[:, None]
    column = tl.arange(0, TILE)[None, :]
    at = tile * TILE
    width = tl.minimum(TILE, m - at)  # the last tile is narrow; beyond it, nothing
    there = column < width
    right = tl.load(gradient + at + column, mask=there, other=0).to(tl.float32)
    for i in range(n):
        row = tl.load(values + at * n + i * width + column, mask=there, other=0).to(tl.float32)
        tl.store(partial + program * n + i, tl.sum(row * right))


@triton.jit
def _combine_dense(values, weights, base, scale, out, n, m, TILE: tl.constexpr, SPAN: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)[:, None]
    column = tl.arange(0, TILE)[None, :]
    at = tile * TILE
    width = tl.minimum(TILE, m - at)
    there = column < width
    total = scale * tl.load(base + at + column, mask=there, other=0)
    for i in range(n):
        row = tl.load(values + at * n + i * width + column, mask=there, other=0).to(tl.float32)
        total += tl.load(weights + i) * row
    tl.store(out + at + column, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _project_packed(
    words,
    scales,
    gradient,
    partial,
    n,
    end,
    lead,
    first,
    zero,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    program = tl.program_id(0).to(tl.int64)
    tile = (first + program) * TILES + tl.arange(0, TILES)[:, None, None]
    at = tile * BLOCK * FIELDS
    used = tl.maximum(tl.minimum(BLOCK * FIELDS, end - at), 0)
    width, present = tl.minimum(BLOCK, used), (used + BLOCK - 1) // BLOCK
    field = tl.arange(0, FIELDS)[None, :, None]
    word = tl.arange(0, BLOCK)[None, None, :]
    element = field * BLOCK + word
    there = (element < used) & (at + element >= lead)
    right = tl.load(gradient + at + element - lead, mask=there, other=0).to(tl.float32)
    for i in range(n):
        packed = tl.load(words + tile * n * BLOCK + i * width + word, mask=word < width, other=0).to(tl.int32)
        codes = ((packed >> (field * BITS)) & ((1 << BITS) - 1)).to(tl.float32) - zero
        row_scales = scales + tile * n * FIELDS + i * present
        scale = tl.load(row_scales + field, mask=field < present, other=0).to(tl.float32)
        tl.store(partial + program * n + i, tl.sum(codes * scale * right))


@triton.jit
def _combine_packed(
    words,
    scales,
    weights,
    base,
    center,
    out,
    n,
    end,
    lead,
    zero,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)[:, None, None]
    at = tile * BLOCK * FIELDS
    used = tl.maximum(tl.minimum(BLOCK * FIELDS, end - at), 0)
    width, present = tl.minimum(BLOCK, used), (used + BLOCK - 1) // BLOCK
    field = tl.arange(0, FIELDS)[None, :, None]
    word = tl.arange(0, BLOCK)[None, None, :]
    element = field * BLOCK + word
    there = (element < used) & (at + element >= lead)
    total = center * tl.load(base + at + element - lead, mask=there, other=0)
    for i in range(n):
        packed = tl.load(words + tile * n * BLOCK + i * width + word, mask=word < width, other=0).to(tl.int32)
        codes = ((packed >> (field * BITS)) & ((1 << BITS) - 1)).to(tl.float32) - zero
        row_scales = scales + tile * n * FIELDS + i * present
        scale = tl.load(row_scales + field, mask=field < present, other=0).to(tl.float32)
        total += (tl.load(weights + i) * scale) * codes
    tl.store(out + at + element - lead, total.to(out.dtype.element_ty), mask=there)


class TritonKernels(TorchKernels):
    """Dense and packed rows; quantizing, and differences to files, are left to torch."""

    name = "triton"

    def project(self, rows: Rows, gradient: torch.Tensor) -> torch.Tensor:
        """Return <row_i, gradient>: float32 within a program, float64 over all."""
        if isinstance(rows, Differences):
            return super().project(rows, gradient)
        with torch.cuda.device_of(gradient):  # Triton launches on the current device, torch on that of the tensors
            return self._project(rows, gradient.contiguous())

    def _project(self, rows: Dense | Packed, gradient: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(rows.n, dtype=torch.float64, device=gradient.device)
        programs = _programs(rows)
        step = max(1, _WIDEST // rows.n)
        for first in range(0, programs, step):
            count = min(step, programs - first)
            partial = torch.empty(count, rows.n, dtype=torch.float32, device=gradient.device)
            if isinstance(rows, Dense):
                _project_dense[(count,)](rows.values, gradient, partial, rows.n, rows.m, first, TILE=TILE, SPAN=_SPAN)
            else:
                _project_packed[(count,)](
                    rows.words, rows.scales, gradient, partial, rows.n, *_place(rows), first, **_constants(rows)
                )
            total += partial.sum(0, dtype=torch.float64)
        return total

    def combine(self, rows: Rows, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write scale * base + sum_i weights_i row_i."""
        out, programs = out.detach(), 0 if isinstance(rows, Differences) else _programs(rows)
        if not programs or not out.is_contiguous():
            super().combine(rows, weights, base, scale, out)
            return
        weights = weights.to(torch.float32).contiguous()
        with torch.cuda.device_of(out):
            if isinstance(rows, Dense):
                data = (rows.values, weights, base, scale, out, rows.n, rows.m)
                _combine_dense[(programs,)](*data, TILE=TILE, SPAN=_SPAN)
            elif isinstance(rows, Packed):
                packed = (rows.words, rows.scales, weights, base, scale, out, rows.n)
                _combine_packed[(programs,)](*packed, *_place(rows), **_constants(rows))


def _programs(rows: Dense | Packed) -> int:
    return -(-rows.m // (TILE * _SPAN)) if isinstance(rows, Dense) else -(-rows.count // RUN)


def _place(rows: Packed) -> tuple[int, int]:
    return rows.lead + rows.m, rows.lead


def _constants(rows: Packed) -> dict[str, Any]:
    return {"zero": zero_of(rows.bits), "BITS": rows.bits, "BLOCK": rows.block, "TILES": RUN}

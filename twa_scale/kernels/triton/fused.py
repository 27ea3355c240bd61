# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Kernels for GPUs in Triton that unpack, scale and multiply codes in registers, and read them once.

A program is one warp. It holds its elements of the gradient, or of the result, in registers and loops over the rows, of
which each lane loads 16 bytes at a time. A row therefore needs one reduction within a warp, and no barrier. Programs
whose tiles are all full are compiled without masks. Those at the ends of a span are launched separately.
docs/performance.md lists the instructions of each kernel and the resulting bandwidth.
"""

import torch
import triton
import triton.language as tl

from twa_scale.kernels.kernels import Differences, Rows
from twa_scale.kernels.packed_rows import Packed
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.segments import Segments
from twa_scale.kernels.torch.reference import TorchKernels
from twa_scale.kernels.triton.programs import COMBINE, DENSE, EXPONENT, PROJECT, clipped, decoded, launches, load_codes
from twa_scale.kernels.triton.segmented import SHORTEST, combine_segments, project_segments


@triton.jit
def _project_dense(
    values,
    gradient,
    partial,
    n,
    m,
    first,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    program = first + tl.program_id(0).to(tl.int64)
    at = (program * TILES + tl.arange(0, TILES)[None, :, None]) * TILE
    column = tl.arange(0, TILE)[None, None, :]
    if FULL:
        width = TILE
        right = tl.load(gradient + at + column).to(tl.float32)
    else:
        width = tl.minimum(TILE, m - at)  # The last tile may be narrow, and further tiles are empty.
        right = tl.load(gradient + at + column, mask=column < width, other=0).to(tl.float32)
    for block in range(0, n, ROWS):
        row = block + tl.arange(0, ROWS)
        i = row[:, None, None]
        there = i < n
        if not FULL:
            there &= column < width
        left = tl.load(values + at * n + i * width + column, mask=there, other=0).to(tl.float32)
        sums = tl.sum(tl.reshape(left * right, [ROWS, TILES * TILE]), 1)
        tl.store(partial + program * n + row, sums, mask=row < n)


@triton.jit
def _combine_dense(
    values,
    weights,
    base,
    center,
    out,
    n,
    m,
    first,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    program = first + tl.program_id(0).to(tl.int64)
    at = (program * TILES + tl.arange(0, TILES)[:, None]) * TILE
    column = tl.arange(0, TILE)[None, :]
    if FULL:
        width, there, other = TILE, None, None
    else:
        width = tl.minimum(TILE, m - at)
        there, other = column < width, 0
    total = center * tl.load(base + at + column, mask=there, other=other)
    for i in tl.range(0, n, loop_unroll_factor=ROWS):
        row = tl.load(values + at * n + i * width + column, mask=there, other=other).to(tl.float32)
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
    exponent,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    program = first + tl.program_id(0).to(tl.int64)
    tile = program * TILES + tl.arange(0, TILES)[None, :, None, None, None]
    field = tl.arange(0, FIELDS)[None, None, :, None, None]
    # A lane loads 8 words (16 bytes), and adds their products without communication between lanes.
    word = tl.arange(0, BLOCK // 8)[None, None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, None, :]
    at, element = tile * (BLOCK * FIELDS), field * BLOCK + word
    if FULL:
        width, present = BLOCK, FIELDS
        right = tl.load(gradient + (at + element - lead)).to(tl.float32)
    else:
        width, present, there = clipped(at, element, lead, end, BLOCK, FIELDS)
        right = tl.load(gradient + (at + element - lead), mask=there, other=0).to(tl.float32)
    right *= 0.5 / (1 << (BITS * field)).to(tl.float32)
    for block in range(0, n, ROWS):
        row = block + tl.arange(0, ROWS)
        i = row[:, None, None, None, None]
        has_word, has_scale = i < n, i < n
        if not FULL:
            has_word &= word < width
            has_scale &= field < present
        packed, scale = load_codes(
            words, scales, tile, i, n, width, present, word, field, has_word, has_scale, 0, BLOCK, FIELDS
        )
        sums = tl.sum(decoded(packed, field, exponent, BITS) * right, 4, keep_dims=True) * scale
        sums = tl.sum(tl.reshape(sums, [ROWS, TILES * FIELDS * BLOCK // 8]), 1)
        tl.store(partial + program * n + row, sums, mask=row < n)


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
    first,
    exponent,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    program = first + tl.program_id(0).to(tl.int64)
    tile = program * TILES + tl.arange(0, TILES)[:, None, None, None]
    field = tl.arange(0, FIELDS)[None, :, None, None]
    word = tl.arange(0, BLOCK // 8)[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    at, element = tile * (BLOCK * FIELDS), field * BLOCK + word
    if FULL:
        width, present = BLOCK, FIELDS
        there, has_word, has_scale, other = None, None, None, None
    else:
        width, present, there = clipped(at, element, lead, end, BLOCK, FIELDS)
        has_word, has_scale, other = word < width, field < present, 0
    place = 0.5 / (1 << (BITS * field)).to(tl.float32)
    total = tl.zeros([TILES, FIELDS, BLOCK // 8, 8], tl.float32)
    for i in tl.range(0, n, loop_unroll_factor=ROWS):
        packed, scale = load_codes(
            words, scales, tile, i, n, width, present, word, field, has_word, has_scale, other, BLOCK, FIELDS
        )
        total += decoded(packed, field, exponent, BITS) * (scale * (tl.load(weights + i) * place))
    total += center * tl.load(base + (at + element - lead), mask=there, other=other)
    tl.store(out + (at + element - lead), total.to(out.dtype.element_ty), mask=there)


class TritonKernels(TorchKernels):
    """Kernels for dense and packed rows. Quantization, `Differences` and segments below 64 use the torch kernels."""

    name = "triton"

    def project(
        self,
        rows: Rows,
        gradient: torch.Tensor,
        segments: Segments | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write <row_i, gradient> to `out`, added in float32 within a program and in float64 over programs."""
        if isinstance(rows, Differences) or (segments and segments.length < SHORTEST):
            return super().project(rows, gradient, segments, out)
        gradient = gradient.contiguous()
        found = project_segments(rows, gradient, segments) if segments else self._project(rows, gradient)
        return found if out is None else out.copy_(found)

    def _project(self, rows: Dense | Packed, gradient: torch.Tensor) -> torch.Tensor:
        shape = DENSE if isinstance(rows, Dense) else PROJECT[rows.bits]
        partial = gradient.new_empty(-(-rows.count // shape.tiles), rows.n, dtype=torch.float32)
        with torch.cuda.device_of(gradient):  # Triton launches on the current device.
            for first, count, full in launches(rows, shape.tiles):
                how = {"TILES": shape.tiles, "ROWS": shape.rows, "FULL": full, "num_warps": 1}
                if isinstance(rows, Dense):
                    data = (rows.values, gradient, partial, rows.n, rows.m, first)
                    _project_dense[(count,)](*data, TILE=TILE, **how)
                else:
                    place = (rows.n, rows.lead + rows.m, rows.lead, first, EXPONENT)
                    packed = (rows.words, rows.scales, gradient, partial, *place)
                    _project_packed[(count,)](*packed, BITS=rows.bits, BLOCK=rows.block, **how)
        return partial.sum(0, dtype=torch.float64)

    def combine(
        self,
        rows: Rows,
        weights: torch.Tensor,
        base: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        segments: Segments | None = None,
    ) -> None:
        """Write scale * base + sum_i weights_i row_i."""
        out = out.detach()
        short = segments is not None and segments.length < SHORTEST
        if short or isinstance(rows, Differences) or not out.is_contiguous():
            super().combine(rows, weights, base, scale, out, segments)
            return
        weights = weights.to(torch.float32)
        if segments:
            combine_segments(rows, weights.T.contiguous(), base, scale, out, segments)
            return
        weights = weights.contiguous()
        shape = DENSE if isinstance(rows, Dense) else COMBINE[rows.bits]
        with torch.cuda.device_of(out):
            for first, count, full in launches(rows, shape.tiles):
                how = {"TILES": shape.tiles, "ROWS": shape.rows, "FULL": full, "num_warps": 1}
                if isinstance(rows, Dense):
                    data = (rows.values, weights, base, scale, out, rows.n, rows.m, first)
                    _combine_dense[(count,)](*data, TILE=TILE, **how)
                else:
                    place = (rows.n, rows.lead + rows.m, rows.lead, first, EXPONENT)
                    packed = (rows.words, rows.scales, weights, base, scale, out, *place)
                    _combine_packed[(count,)](*packed, BITS=rows.bits, BLOCK=rows.block, **how)

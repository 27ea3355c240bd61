"""The computation of deltas, center, inner products and packed rows in plain torch, a chunk of columns at a time."""

from collections.abc import Iterator, Sequence
from math import lcm

import torch
from torch.nn import functional as F

from twa_scale.kernels.coding import CENTER, of_deltas
from twa_scale.kernels.kernels import SourceChecks, Sources, Target
from twa_scale.kernels.packed_rows import BLOCKS, Packed, zero_of
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.torch.checksum import checksum
from twa_scale.kernels.torch.quantize import quantize

ROW_BYTES = 4 << 20
"""The size of a chunk of deltas, in bytes."""
GRID = lcm(TILE, *(16 // bits * size for bits, size in BLOCKS.items()))
"""A multiple of every tile size. Chunks that start at multiples of it, counted from the first block, share no word."""


def make_deltas(sources: Sources, weights: Sequence[float], target: Target, start: int) -> SourceChecks:
    """Implement `Kernels.make_deltas`."""
    require_whole_blocks(target.rows, start, len(sources[0]))
    wide = any(source.dtype == torch.float64 for source in sources)
    dtype, finite = torch.float64 if wide else torch.float32, True
    for low, high in cuts(target.rows, start, len(sources[0]), ROW_BYTES // (len(sources) + 1) // dtype.itemsize):
        rows = torch.empty(len(sources) + 1, high - low, dtype=dtype, device=target.device)
        for row, source in zip(rows, sources, strict=False):
            row.copy_(source[low:high])
        _center(rows, weights)
        finite &= bool(torch.isfinite(rows[-1]).all())
        if target.products is not None:
            target.products.add_(inner_products(rows) if target.products.ndim == 2 else squared_norms(rows))
        if target.center is not None and finite:
            target.center.detach()[start + low : start + high] = rows[-1]
        match target.rows:
            case Dense():
                target.rows.write(start + low, rows[:-1])
            case Packed():
                _pack(target.rows, target, start + low, rows[:-1].to(torch.float32))
    return SourceChecks(checksums(sources), finite)


def checksums(sources: Sources) -> torch.Tensor:
    """Return the checksum of each source."""
    return torch.tensor([checksum(source) for source in sources])


def require_whole_blocks(rows: Dense | Packed | None, start: int, count: int) -> None:
    """Check that a chunk of columns does not split a block, whose scale depends on all of its elements."""
    if isinstance(rows, Packed):
        assert start == 0 or (rows.lead + start) % rows.block == 0, "the chunk starts inside a block"
        assert start + count == rows.m or (rows.lead + start + count) % rows.block == 0, "the chunk ends inside a block"


def grid_column(rows: Dense | Packed | None, column: int) -> int:
    """Return the position of a column, counted from the start of the first block."""
    return column + (rows.lead if isinstance(rows, Packed) else 0)


def cuts(rows: Dense | Packed | None, start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield chunks (low, high) of `count` columns from column `start` of the rows, of about `size` columns each.

    Chunks are split at multiples of `GRID`, counted from the first block. The bounds are relative to `start`.
    """
    size, first = max(size // GRID, 1) * GRID, grid_column(rows, start)
    low = 0
    while low < count:
        high = min(((first + low) // size + 1) * size - first, count)
        yield low, high
        low = high


def reference_of(weights: Sequence[float]) -> int:
    """Return the index of the largest weight, or the first one of several."""
    return max(range(len(weights)), key=lambda i: weights[i])


def _center(rows: torch.Tensor, weights: Sequence[float]) -> None:
    """Replace the candidates in rows[:-1] by their deltas and rows[-1] by the center, in place; rows are (n + 1, k)."""
    deltas, center = rows[:-1], rows[-1]
    center.copy_(deltas[reference_of(weights)])
    deltas.sub_(center)
    shift = torch.tensor(weights, dtype=rows.dtype, device=rows.device) @ deltas
    deltas.sub_(shift)
    center.add_(shift)


def inner_products(rows: torch.Tensor) -> torch.Tensor:
    """Return the inner products <row_i, row_j>, float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, 1 << 16, dim=1):
        exact = part.to(torch.float64)
        total += exact @ exact.T
    return total


def squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the squared norms <row_i, row_i>, float64."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def write_row(rows: Dense | Packed, i: int, values: torch.Tensor) -> torch.Tensor:
    """Replace row `i`, without synchronizing with the device.

    Args:
        rows: the rows.
        i: the index of the row.
        values: (m,), float32. They are rounded to the type of dense rows, or quantized for packed rows.

    Returns:
        The values of the row after rounding, (m,), float32.
    """
    if isinstance(rows, Dense):
        for start, part in rows.tiles(0, rows.count):
            place = part[:, i]
            place.copy_(values[start : start + place.numel()].view(place.shape))
        return values.to(rows.values.dtype).to(torch.float32)
    for _, words, scales in rows.tiles(0, rows.count):
        words[:, i] = 0
        scales[:, i] = 0
    return _write_level(rows, slice(i, i + 1), 0, values[None])[0]


def _pack(rows: Packed, target: Target, start: int, deltas: torch.Tensor) -> None:
    """Quantize columns from `start` on, and replace `deltas` by the rounded values, for all candidates of a level."""
    coding = target.coding or of_deltas(rows.n)
    for level in coding.levels:
        level_rows = slice(None) if len(level) == rows.n else list(level)
        before = [coding.before[i] for i in level]
        base = deltas[before] if before[0] != CENTER else torch.zeros(())
        values = deltas[level_rows] - base
        kept = _write_level(rows, level_rows, start, values)
        if target.errors is not None:
            target.errors[level_rows] += torch.linalg.vector_norm(values - kept, dim=1, dtype=torch.float64).square()
        deltas[level_rows] = base + kept


def _write_level(rows: Packed, level_rows: slice | list[int], start: int, values: torch.Tensor) -> torch.Tensor:
    """Quantize some rows, write their words and scales, and return the rounded values, of the shape of `values`."""
    size, fields, bits = rows.block, rows.fields, rows.bits
    block, front = divmod(rows.lead + start, size)
    count = -(-(front + values.shape[1]) // size)
    codes, scales = quantize(values, front, count * size - front - values.shape[1], size, bits)
    kept = ((codes - zero_of(bits)) * scales[..., None].to(torch.float32)).flatten(1)
    tile, before = divmod(block, fields)
    tiles = -(-(before + count) // fields)
    missing = (before, tiles * fields - before - count)  # blocks of the first and the last tile outside of the chunk
    shifts = torch.arange(fields, dtype=torch.int32, device=values.device) * bits
    codes = F.pad(codes, (0, 0, *missing)).unflatten(1, (tiles, fields)) << shifts[:, None]
    # The fields do not overlap, so that the sum is a bitwise or.
    words_of_tiles = codes.sum(2, dtype=torch.int32).to(torch.int16).transpose(0, 1)
    scales_of_tiles = F.pad(scales, missing).unflatten(1, (tiles, fields)).transpose(0, 1)
    done = 0
    for _, words, scale in rows.tiles(tile, tile + tiles):
        part = slice(done, done := done + len(words))
        words[:, level_rows] |= words_of_tiles[part, :, : words.shape[2]]
        scale[:, level_rows] += scales_of_tiles[part, :, : scale.shape[2]]
    return kept[:, front : front + values.shape[1]]

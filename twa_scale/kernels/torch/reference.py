"""Kernels in plain torch for any device, the reference for the other kernels."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from twa_scale.kernels.kernels import Differences, Rows, SourceChecks, Sources, Target, new_sums
from twa_scale.kernels.packed_rows import Packed, zero_of
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.segments import Segments
from twa_scale.kernels.torch.deltas import checksums, make_deltas

# Bytes of rows that are converted to float32 at a time: they stay in a CPU's cache; a GPU needs few, large launches.
CPU_BLOCK = 2 << 20
GPU_BLOCK = 64 << 20


class TorchKernels:
    """Kernels that convert a few tiles at a time to float32, and multiply."""

    name = "torch"

    def project(
        self,
        rows: Rows,
        gradient: torch.Tensor,
        segments: Segments | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the inner products <row_i, gradient> to `out`, and return it."""
        total = (new_sums(rows.n, segments, gradient.device) if out is None else out).zero_()
        if segments:
            _project_segments(rows, gradient, segments, total)
            return total
        for start, part in widened(rows):
            count, _, width = part.shape
            right = _cut(gradient, start, count * width).to(torch.float32).view(count, 1, width)
            total += (part * right).sum(2).sum(0, dtype=torch.float64)  # A matrix product could use TF32.
        return total

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
        weights = weights.to(torch.float32)
        if segments:
            _combine_segments(rows, weights, base, scale, out, segments)
            return
        weights = weights.view(1, -1, 1)
        for start, part in widened(rows):
            total = (part * weights).sum(1).view(-1)
            low, high = max(start, 0), min(start + len(total), len(out))
            out[low:high] = torch.add(total[low - start : high - start], base[low:high], alpha=scale)

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source."""
        return checksums(sources)

    def make_deltas(self, sources: Sources, weights: Sequence[float], target: Target, start: int) -> SourceChecks:
        """Compute deltas, center, inner products and errors."""
        return make_deltas(sources, weights, target, start)


def _project_segments(rows: Rows, gradient: torch.Tensor, segments: Segments, total: torch.Tensor) -> None:
    for low, high, part in _columns(rows, len(gradient)):
        first, here = segments.part(low, high)
        products = part * gradient[low:high].to(torch.float32)
        total[:, first : first + here.count] += here.sums(products)


def _combine_segments(
    rows: Rows, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor, segments: Segments
) -> None:
    for low, high, part in _columns(rows, len(out)):
        first, here = segments.part(low, high)
        total = (part * here.spread(weights[:, first : first + here.count])).sum(0)
        out[low:high] = torch.add(total, base[low:high], alpha=scale)


def _columns(rows: Rows, m: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield bounds (low, high) of a few tiles, and their float32 rows (n, high - low)."""
    for start, part in widened(rows):
        low, high = max(start, 0), min(start + part.shape[0] * part.shape[2], m)
        yield low, high, part.transpose(0, 1).flatten(1)[:, low - start : high - start]


def unpack(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the values of packed tiles, (tiles, n, blocks * w), float32.

    Args:
        words: (tiles, n, w), int16.
        scales: (tiles, n, blocks), bfloat16.
        bits: the number of bits of a code.
    """
    shifts = torch.arange(scales.shape[2], dtype=torch.int32, device=words.device) * bits
    codes = (words.to(torch.int32)[:, :, None] >> shifts[:, None]) & ((1 << bits) - 1)
    return ((codes - zero_of(bits)) * scales.to(torch.float32)[..., None]).flatten(2)


def widened(rows: Rows) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield float32 rows of a few tiles at a time: the first column, and values (tiles, n, w).

    The first column is negative for packed rows that start inside a block.
    """
    match rows:
        case Dense():
            step = _step(rows.values.device, rows.n * TILE)
            for tile in range(0, -(-rows.m // TILE), step):
                for start, part in rows.tiles(tile, tile + step):
                    yield start, part.to(torch.float32)
        case Packed():
            step = _step(rows.words.device, 2 * rows.n * rows.tile)  # codes and values
            for tile in range(0, rows.count, step):
                for start, words, scales in rows.tiles(tile, tile + step):
                    yield start, unpack(words, scales, rows.bits)
        case Differences():
            step = _step(rows.center.device, rows.n * TILE) * TILE
            for start in range(0, len(rows.center), step):
                cut = slice(start, start + step)
                part = torch.stack([row[cut].to(torch.float32) for row in rows.rows]).sub_(rows.center[cut])
                yield start, part[None]


def _step(device: torch.device, tile: int) -> int:
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // (4 * tile))


def _cut(row: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return elements [start, start + count) of a row, with zeros outside it."""
    low, high = max(start, 0), min(start + count, len(row))
    part = row[low:high]
    return part if len(part) == count else F.pad(part, (low - start, start + count - high))

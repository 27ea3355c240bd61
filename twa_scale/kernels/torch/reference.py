"""Plain torch, on any device: the reference that the fast kernels are held to."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from twa_scale.kernels.kernels import Differences, Rows, Seen, Sources, Target
from twa_scale.kernels.packed_rows import Packed, zero_of
from twa_scale.kernels.rows import TILE, Dense
from twa_scale.kernels.torch.deltas import checksums, make_deltas

# Bytes of float32 rows that exist at a time: on a CPU they stay in cache; a GPU wants few, large launches.
CPU_BLOCK = 2 << 20
GPU_BLOCK = 64 << 20


class TorchKernels:
    """Widens rows a few tiles at a time, and multiplies."""

    name = "torch"

    def project(self, rows: Rows, gradient: torch.Tensor) -> torch.Tensor:
        """Return <row_i, gradient>."""
        n = len(rows.rows) if isinstance(rows, Differences) else rows.n
        total = torch.zeros(n, dtype=torch.float64, device=gradient.device)
        for start, part in widened(rows):
            count, _, width = part.shape
            right = _cut(gradient, start, count * width).to(torch.float32).view(count, 1, width)
            total += (part * right).sum(2).sum(0, dtype=torch.float64)  # a matrix product could be one of TF32
        return total

    def combine(self, rows: Rows, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write scale * base + sum_i weights_i row_i."""
        weights = weights.to(torch.float32).view(1, -1, 1)
        for start, part in widened(rows):
            total = (part * weights).sum(1).view(-1)
            low, high = max(start, 0), min(start + len(total), len(out))
            out[low:high] = torch.add(total[low - start : high - start], base[low:high], alpha=scale)

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source."""
        return checksums(sources)

    def make_deltas(self, sources: Sources, weights: Sequence[float], target: Target, start: int) -> Seen:
        """Make deltas and what goes with them."""
        return make_deltas(sources, weights, target, start)


def unpack(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the values of some tiles, (tiles, n, blocks * words), float32."""
    shifts = torch.arange(scales.shape[2], dtype=torch.int32, device=words.device) * bits
    codes = (words.to(torch.int32)[:, :, None] >> shifts[:, None]) & ((1 << bits) - 1)
    return ((codes - zero_of(bits)) * scales.to(torch.float32)[..., None]).flatten(2)


def widened(rows: Rows) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield float32 rows some tiles at a time: first column (negative in a block that begins before it), (t, n, w)."""
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
            step = _step(rows.center.device, len(rows.rows) * TILE) * TILE
            for start in range(0, len(rows.center), step):
                cut = slice(start, start + step)
                part = torch.stack([row[cut].to(torch.float32) for row in rows.rows]).sub_(rows.center[cut])
                yield start, part[None]


def _step(device: torch.device, tile: int) -> int:
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // (4 * tile))


def _cut(row: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return elements [start, start + count) of a row, zero where it has none."""
    low, high = max(start, 0), min(start + count, len(row))
    part = row[low:high]
    return part if len(part) == count else F.pad(part, (low - start, start + count - high))

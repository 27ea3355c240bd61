"""Plain torch, on any device: the reference that the fast kernels are held to."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from twa_scale.kernels.checksum import checksum
from twa_scale.kernels.packed import Packed, zero_of
from twa_scale.kernels.protocol import Differences, Rows, Sources
from twa_scale.kernels.quantize import quantize
from twa_scale.kernels.rows import TILE, Dense

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
        for start, part in _blocks(rows):
            count, _, width = part.shape
            right = _cut(gradient, start, count * width).to(torch.float32).view(count, 1, width)
            total += (part * right).sum(2).sum(0, dtype=torch.float64)  # a matrix product could be one of TF32
        return total

    def combine(self, rows: Rows, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write scale * base + sum_i weights_i row_i."""
        weights = weights.to(torch.float32).view(1, -1, 1)
        for start, part in _blocks(rows):
            total = (part * weights).sum(1).view(-1)
            low, high = max(start, 0), min(start + len(total), len(out))
            out[low:high] = torch.add(total[low - start : high - start], base[low:high], alpha=scale)

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source."""
        return torch.tensor([checksum(source) for source in sources])

    def center(self, sources: Sources, weights: Sequence[float], rows: torch.Tensor) -> None:
        """Subtract the reference, then what the center differs from it."""
        for row, source in zip(rows, sources, strict=False):
            row.copy_(source)
        deltas, center = rows[:-1], rows[-1]
        center.copy_(deltas[reference_of(weights)])
        deltas.sub_(center)
        shift = torch.tensor(weights, dtype=rows.dtype, device=rows.device) @ deltas
        deltas.sub_(shift)
        center.add_(shift)

    def gram(self, rows: torch.Tensor) -> torch.Tensor:
        """Return <row_i, row_j>, a part of the columns at a time."""
        parts = (part.to(torch.float64) for part in torch.split(rows, 1 << 16, dim=1))
        return sum(
            (part @ part.T for part in parts), torch.zeros(len(rows), len(rows), dtype=torch.float64).to(rows.device)
        )

    def squares(self, rows: torch.Tensor) -> torch.Tensor:
        """Return <row_i, row_i>."""
        norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norms.square()

    def pack(self, rows: Packed, block: int, values: torch.Tensor) -> None:
        """Quantize, and put the blocks of a tile, one a field, into its words: all tiles at once."""
        size, fields, bits = rows.block, rows.fields, rows.bits
        front = rows.lead if block == 0 else 0
        count = -(-(front + values.shape[1]) // size)
        codes, scales = quantize(values, front, count * size - front - values.shape[1], size, bits)
        tile, before = divmod(block, fields)
        tiles = -(-(before + count) // fields)
        missing = (before, tiles * fields - before - count)  # blocks of the first and the last tile: all bits zero
        shifts = torch.arange(fields, dtype=torch.int32, device=values.device) * bits
        codes = F.pad(codes, (0, 0, *missing)).unflatten(1, (tiles, fields)) << shifts[:, None]
        new = (
            codes.sum(2, dtype=torch.int32).to(torch.int16).transpose(0, 1)
        )  # their bits are apart: a sum is as good as an or
        new_scales = F.pad(scales, missing).unflatten(1, (tiles, fields)).transpose(0, 1)
        done = 0
        for _, words, scale in rows.tiles(tile, tile + tiles):
            part = slice(done, done := done + len(words))
            words |= new[part, :, : words.shape[2]]
            scale += new_scales[part, :, : scale.shape[2]]


def reference_of(weights: Sequence[float]) -> int:
    """Return the index of the largest weight, the first of equals."""
    return max(range(len(weights)), key=lambda i: weights[i])


def unpack(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the values of some tiles, (tiles, n, blocks * words), float32."""
    shifts = torch.arange(scales.shape[2], dtype=torch.int32, device=words.device) * bits
    codes = (words.to(torch.int32)[:, :, None] >> shifts[:, None]) & ((1 << bits) - 1)
    return ((codes - zero_of(bits)) * scales.to(torch.float32)[..., None]).flatten(2)


def _blocks(rows: Rows) -> Iterator[tuple[int, torch.Tensor]]:
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

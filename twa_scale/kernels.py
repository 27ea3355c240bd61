"""The two operations on data of the size of the model: project and combine. Plain torch, block by block."""

from collections.abc import Iterator

import torch

# Bytes of float32 rows in one block: on a CPU they stay in cache between the uses that `combine` has for them; a GPU
# wants few, large launches.
_CPU_BLOCK = 2 << 20
_GPU_BLOCK = 256 << 20


def project(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return <row_i, gradient> for each row: DESIGN's s, float32 within a block and float64 across blocks.

    Args:
        rows: (n, m), float32 or bfloat16.
        gradient: (m,), any floating type.

    Returns:
        (n,), float64, on the device of `rows`.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for block, part in _blocks(rows):
        total += part @ gradient[block].to(part.dtype)
    return total


def combine(rows: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Write scale * base + sum_i weights_i row_i into `out`, rounded once from float32.

    Args:
        rows: (n, m), float32 or bfloat16.
        weights: (n,), any floating type.
        base: (m,), float32: the center.
        scale: the weight of the center.
        out: (m,), any floating type; it may be live model memory.
    """
    weights = weights.to(torch.float32)
    for block, part in _blocks(rows):
        if out.dtype == torch.float32:
            torch.addmv(base[block], part.T, weights, beta=scale, out=out[block])
        else:
            out[block].copy_(torch.addmv(base[block], part.T, weights, beta=scale))


def _blocks(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cut (n, m) into column blocks of float32; low-precision rows are widened one block at a time."""
    nbytes = _CPU_BLOCK if rows.device.type == "cpu" else _GPU_BLOCK
    size = max(1, nbytes // (4 * len(rows)))
    if rows.dtype != torch.float32:
        size = -(-size // 2)  # the widened copy must fit beside the original
    for start in range(0, rows.shape[1], size):
        block = slice(start, min(start + size, rows.shape[1]))
        yield block, rows[:, block].to(torch.float32)

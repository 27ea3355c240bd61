"""The quantization of blocks to codes and scales in plain torch, and its constants."""

import torch
from torch.nn import functional as F

from twa_scale.kernels.packed_rows import zero_of

REFINEMENTS = {8: 0, 4: 0, 2: 3, 1: 1}
"""The number of times that the scale is refined by least squares, by bits. Refinement gains little with 8 and 4 bits,
and 1 bit is best after one."""
SMALLEST = 1e-30
"""The smallest scale that is not rounded to zero. The inverse of a smaller one could overflow."""
EXTREMES = {8: (1 / 127, 1 / 127), 4: (1 / 8, 1 / 7)}
"""The scale divided by the larger and by the smaller extreme of a block, by bits, so that neither is clipped. Codes
have one more step below zero, and the sign of the scale gives this step to the larger extreme. With 8 bits that step
is reserved for the rounding of the scale."""
MEAN_SIZE = 1.25
"""The initial scale with 2 and 1 bits, divided by the mean absolute value of a block. Larger values are clipped."""


def quantize(values: torch.Tensor, front: int, back: int, size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows block by block.

    With 8 and 4 bits, the scale follows from the extremes of a block. With 2 and 1 bits, it follows from the mean
    absolute value, and is refined: for given codes q the least-squares scale is <x, q - zero> / |q - zero|^2.

    Args:
        values: (n, k), float32, finite.
        front: the number of elements by which the first block is incomplete.
        back: the number of elements by which the last block is incomplete.
        size: the number of elements of a block.
        bits: 8, 4, 2 or 1.

    Returns:
        Codes (n, blocks, size), int32, and scales (n, blocks), bfloat16.
    """
    blocks = F.pad(values, (front, back)).unflatten(1, (-1, size))
    present = F.pad(values.new_ones(values.shape[1]), (front, back)).view(-1, size)
    if bits >= 4:
        below, above = -blocks.amin(2), blocks.amax(2)
        far, near = EXTREMES[bits]
        extent = torch.maximum(torch.maximum(below, above) * far, torch.minimum(below, above) * near)
        scale = torch.where(below >= above, extent, -extent)
    else:
        scale = blocks.abs().sum(2) / present.sum(1) * MEAN_SIZE
    scale = _rounded(scale)
    for _ in range(REFINEMENTS[bits]):
        level = (_codes(blocks, scale, bits) - zero_of(bits)) * present
        scale = _rounded((blocks * level).sum(2) / level.square().sum(2).clamp(min=0.25))
    return _codes(blocks, scale, bits).to(torch.int32), scale.to(torch.bfloat16)


def _rounded(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() >= SMALLEST, scale, 0).to(torch.bfloat16).to(torch.float32)


def _codes(blocks: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    inverse = torch.where(scale != 0, 1 / scale, 0)[..., None]
    return (blocks * inverse + (zero_of(bits) + 0.5)).floor_().clamp_(0, (1 << bits) - 1)

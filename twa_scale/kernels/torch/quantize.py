"""From float32 to codes and scales, block by block: the rule, in plain torch."""

import torch
from torch.nn import functional as F

from twa_scale.kernels.packed_rows import zero_of

REFINEMENTS = {8: 0, 4: 0, 2: 3, 1: 1}
"""How often the scale is fitted to the codes. With 8 and 4 bits it gains next to nothing; 1 bit is best after once."""
SMALLEST = 1e-30
"""Scales below it become zero: their inverse would overflow. Such deltas are far below any weight's last bit."""
EXTREMES = {8: (1 / 127, 1 / 127), 4: (1 / 8, 1 / 7)}
"""The scale for the larger and for the other extreme of a block, in units of these, so that neither is clipped: codes
reach one step farther below zero, which a scale's sign turns to the larger. 8 bits leave it to the scale's rounding."""
MEAN_SIZE = 1.25
"""The first scale with few bits, which have to clip, in units of the mean size of a block."""


def quantize(values: torch.Tensor, front: int, back: int, size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows that `front` and `back` absent elements make whole blocks.

    The scale comes from the extremes; or, with few bits, from the mean size, and is then fitted: for given codes q the
    best one is <x, q - zero> / |q - zero|^2.

    Args:
        values: (n, k), float32, finite.
        front: absent elements of the first block.
        back: absent elements of the last block.
        size: elements of a block.
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

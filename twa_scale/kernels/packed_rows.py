"""Rows of 8, 4, 2 or 1 bit codes with one 16-bit scale per block, in a layout for kernels that unpack in registers.

A tile has one 16-bit word for each element of a block, and as many blocks as a word has fields: field k of word j is
the code of element j of block k. One load therefore serves several elements. Kernels extract a code with a mask,
without a shift, and multiply the scale of its block by the inverse of its place value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twa_scale.kernels.rows import Allocate

BLOCKS = {8: 64, 4: 64, 2: 128, 1: 128}
"""The number of elements that share a scale, by bits. Heavy-tailed deltas need short blocks with 8 and 4 bits."""


RUN = 4
"""The number of tiles whose products are added in float32. Rows are split only between such runs of tiles, so that
splits do not change sums."""


@dataclass(frozen=True)
class Packed:
    """n rows of m elements with values scale * (code - zero). Scales may be negative.

    Blocks start at multiples of their size in the flattened tensor. The same elements therefore share a scale however
    the tensor is sharded, except in blocks that a shard boundary splits.
    """

    words: torch.Tensor
    """The codes, int16: for each tile (n, words of the tile)."""
    scales: torch.Tensor
    """The scales, bfloat16, whose range is that of float32: for each tile (n, blocks of the tile)."""
    n: int
    m: int
    lead: int
    """The position of column 0 in its block."""
    bits: int
    """The number of bits of a code: 8, 4, 2 or 1."""

    @classmethod
    def empty(
        cls, n: int, m: int, start: int, bits: int, device: torch.device, allocate: Allocate = torch.zeros
    ) -> "Packed":
        """Return rows with all bits zero, for `Kernels.make_deltas`. Column 0 is element `start` of a tensor."""
        lead = start % BLOCKS[bits]
        words, blocks = sizes(m, lead, bits)
        return cls(
            allocate(n * words, dtype=torch.int16, device=device),
            allocate(n * blocks, dtype=torch.bfloat16, device=device),
            n,
            m,
            lead,
            bits,
        )

    @property
    def nbytes(self) -> int:
        """The size in memory, in bytes."""
        return self.words.nbytes + self.scales.nbytes

    @property
    def block(self) -> int:
        """The number of elements that share a scale."""
        return BLOCKS[self.bits]

    @property
    def fields(self) -> int:
        """The number of codes in a word, and of blocks in a full tile."""
        return 16 // self.bits

    @property
    def tile(self) -> int:
        """The number of columns of a full tile."""
        return self.block * self.fields

    @property
    def tile_bytes(self) -> int:
        """The size of a full tile of all rows, in bytes."""
        return self.n * (2 * self.block + 2 * self.fields)

    @property
    def run(self) -> int:
        """The number of tiles that must not be separated."""
        return RUN

    @property
    def count(self) -> int:
        """The number of tiles."""
        return -(-(self.lead + self.m) // self.tile) if self.m else 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the rows."""
        return self.words, self.scales

    def over(self, tensors: Sequence[torch.Tensor]) -> "Packed":
        """Return the same rows on other tensors, which are copies of `self.tensors`."""
        words, scales = tensors
        return Packed(words, scales, self.n, self.m, self.lead, self.bits)

    def tiles_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return the tiles [first, last) that hold columns [start, stop)."""
        return (self.lead + start) // self.tile, -(-(self.lead + stop) // self.tile)

    def part(self, start: int, stop: int) -> tuple[int, "Packed"]:
        """Return the first column of tiles [start, stop), and a view of the rows with only these columns."""
        lead = self.lead if start == 0 else 0
        first = start * self.tile + lead - self.lead
        last = min(stop * self.tile - self.lead, self.m)
        words, scales = (
            tensor[start * size : stop * size]
            for tensor, size in ((self.words, self.n * self.block), (self.scales, self.n * self.fields))
        )
        return first, Packed(words, scales, self.n, last - first, lead, self.bits)

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield views of tiles [start, stop): the first column, words (tiles, n, w) and scales (tiles, n, blocks)."""
        full = (self.lead + self.m) // self.tile
        per_word, per_scale = self.n * self.block, self.n * self.fields
        if start < (middle := min(stop, full)):
            yield (
                start * self.tile - self.lead,
                self.words[start * per_word : middle * per_word].view(-1, self.n, self.block),
                self.scales[start * per_scale : middle * per_scale].view(-1, self.n, self.fields),
            )
        if stop > full and self.count > full:
            yield (
                full * self.tile - self.lead,
                self.words[full * per_word :].view(1, self.n, -1),
                self.scales[full * per_scale :].view(1, self.n, -1),
            )


def zero_of(bits: int) -> float:
    """Return the code of 0. With 2 and 1 bits it lies halfway between two codes."""
    half = 1 << (bits - 1)
    return float(half) if bits >= 4 else half - 0.5


def sizes(m: int, lead: int, bits: int) -> tuple[int, int]:
    """Return the number of words and the number of scales of one row."""
    if m == 0:
        return 0, 0
    block = BLOCKS[bits]
    full, rest = divmod(lead + m, block * (16 // bits))
    return full * block + min(rest, block), full * (16 // bits) + -(-rest // block)


def packed_bytes(n: int, m: int, bits: int) -> int:
    """Return the size in bytes of n rows of m elements that start with a block."""
    words, blocks = sizes(m, 0, bits)
    return n * 2 * (words + blocks)

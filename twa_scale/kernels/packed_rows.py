"""Rows of 8, 4, 2 or 1 bit codes with one 16-bit scale a block, laid out for kernels that never unpack to memory.

A tile is one 16-bit word for each element of a block, and as many blocks as a word has fields: field k of word j is
the code of element j of block k. One load then serves several elements, a mask takes a code out of its byte in its
place, and the place, a power of two, goes into the block's scale.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twa_scale.kernels.rows import Allocate

BLOCKS = {8: 64, 4: 64, 2: 128, 1: 128}
"""Elements of a row that share a scale, by bits: heavy-tailed deltas need short blocks to keep what 8 or 4 bits can."""


RUN = 4
"""Tiles whose products are added in float32: rows are cut between runs, so that the cuts do not change sums."""


@dataclass(frozen=True)
class Packed:
    """n rows of m elements: scale * (code - zero), where a scale may be negative.

    Blocks are cut at multiples of their size in the numbering of the tensor, of which column 0 is element `lead` of a
    block: then the same elements share a scale however the tensor is split, but for a block that a boundary cuts.
    """

    words: torch.Tensor
    """int16: for each tile (n, words of the tile)."""
    scales: torch.Tensor
    """bfloat16, whose range is that of float32: for each tile (n, blocks of the tile)."""
    n: int
    m: int
    lead: int
    bits: int

    @classmethod
    def empty(
        cls, n: int, m: int, start: int, bits: int, device: torch.device, allocate: Allocate = torch.zeros
    ) -> "Packed":
        """Return rows of zeros, to be written by `Kernels.make_deltas`; column 0 is element `start` of a tensor."""
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
        """Bytes of memory."""
        return self.words.nbytes + self.scales.nbytes

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return BLOCKS[self.bits]

    @property
    def fields(self) -> int:
        """Codes in a word, and blocks in a tile."""
        return 16 // self.bits

    @property
    def tile(self) -> int:
        """Elements of a full tile."""
        return self.block * self.fields

    @property
    def tile_bytes(self) -> int:
        """Bytes of a full tile of all rows."""
        return self.n * (2 * self.block + 2 * self.fields)

    @property
    def run(self) -> int:
        """Tiles that belong together."""
        return RUN

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-(self.lead + self.m) // self.tile) if self.m else 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The memory of the rows."""
        return self.words, self.scales

    def over(self, tensors: Sequence[torch.Tensor]) -> "Packed":
        """Return the same rows in other memory, which holds a copy of `tensors`."""
        words, scales = tensors
        return Packed(words, scales, self.n, self.m, self.lead, self.bits)

    def part(self, start: int, stop: int) -> tuple[int, "Packed"]:
        """Return the first column of tiles [start, stop), and the rows of these columns as a view."""
        lead = self.lead if start == 0 else 0
        first = start * self.tile + lead - self.lead
        last = min(stop * self.tile - self.lead, self.m)
        words, scales = (
            tensor[start * size : stop * size]
            for tensor, size in ((self.words, self.n * self.block), (self.scales, self.n * self.fields))
        )
        return first, Packed(words, scales, self.n, last - first, lead, self.bits)

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield views of tiles [start, stop): first column, words (tiles, n, w) and scales (tiles, n, blocks)."""
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
    """Return the code that means 0: with 8 and 4 bits there is one, with less two codes stand on either side of it."""
    half = 1 << (bits - 1)
    return float(half) if bits >= 4 else half - 0.5


def sizes(m: int, lead: int, bits: int) -> tuple[int, int]:
    """Return the numbers of words and of scales of one row."""
    if m == 0:
        return 0, 0
    block = BLOCKS[bits]
    full, rest = divmod(lead + m, block * (16 // bits))
    return full * block + min(rest, block), full * (16 // bits) + -(-rest // block)


def packed_bytes(n: int, m: int, bits: int) -> int:
    """Return what n rows of m elements occupy when they start with a block."""
    words, blocks = sizes(m, 0, bits)
    return n * 2 * (words + blocks)

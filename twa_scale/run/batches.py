"""Batches in an order that depends on the seed and the step only, cut for any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from twa_scale.errors import ConfigError
from twa_scale.run.tasks import Batch, Examples, stack


@dataclass(frozen=True)
class Batches:
    """The part of one rank in global batches of `batch_size` examples."""

    examples: Examples
    batch_size: int
    micro_batch_size: int
    rank: int
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Whole global batches in one pass over the examples."""
        return len(self.examples) // self.batch_size

    @property
    def num_micro(self) -> int:
        """Backward passes of a rank per global batch."""
        return self.batch_size // (self.size * self.micro_batch_size)

    def training(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of this rank at `step`, of an order that is shuffled anew for every epoch."""
        epoch, position = divmod(step, self.per_epoch)
        order = _order(len(self.examples), self.seed, epoch)
        share = self.batch_size // self.size
        start = position * self.batch_size + self.rank * share
        for first in range(start, start + share, self.micro_batch_size):
            yield self._stack(order[first : first + self.micro_batch_size].tolist())

    def in_order(self, limit: int | None = None) -> Iterator[tuple[Batch, bool]]:
        """Yield each example once over all ranks, as (batch, counts).

        Every rank gets the same number of batches, since a forward pass may be collective: one that has run out of
        examples repeats the first, which does not count.
        """
        share = self.micro_batch_size
        starts = range(0, len(self.examples), share * self.size)
        for start in starts[:limit]:
            first = start + self.rank * share
            indices = list(range(first, min(first + share, len(self.examples))))
            yield self._stack(indices or [0]), bool(indices)

    def _stack(self, indices: list[int]) -> Batch:
        return stack([self.examples[i] for i in indices])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def make_batches(
    examples: Examples, split: str, batch_size: int, micro_batch_size: int | None, rank: int, size: int, seed: int
) -> Batches:
    """Check that the sizes fit together.

    Raises:
        ConfigError: a batch that the ranks cannot share equally, or a split smaller than one batch.
    """
    micro, _ = cut(batch_size, micro_batch_size, size)
    if len(examples) < batch_size:
        raise ConfigError(
            f"batch_size: split {split!r} has {len(examples)} examples, less than one batch of {batch_size}."
        )
    return Batches(examples, batch_size, micro, rank, size, seed)


def cut(batch_size: int, micro_batch_size: int | None, size: int) -> tuple[int, int]:
    """Return the size of a micro-batch, and how many of them a rank has in a batch.

    Raises:
        ConfigError: a batch that the ranks cannot share equally.
    """
    share, rest = divmod(batch_size, size)
    micro = min(micro_batch_size or share, share)
    if rest or share % micro:
        raise ConfigError(
            f"batch_size: {batch_size} examples cannot be cut into {size} ranks x micro-batches of {micro}; choose a "
            f"multiple of {size * micro}."
        )
    return micro, share // micro

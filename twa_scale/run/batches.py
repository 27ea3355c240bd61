"""Batches in an order that depends only on the seed and the step, divided among any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from twa_scale.errors import ConfigError
from twa_scale.run.tasks import Batch, Examples, stack


@dataclass(frozen=True)
class Batches:
    """The parts of one rank of the global batches, each of `batch_size` examples."""

    examples: Examples
    batch_size: int
    micro_batch_size: int
    rank: int
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """The number of whole global batches in one epoch."""
        return len(self.examples) // self.batch_size

    @property
    def num_micro(self) -> int:
        """The number of micro-batches of a rank in a global batch."""
        return self.batch_size // (self.size * self.micro_batch_size)

    def training(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of this rank at `step`. The order is shuffled in every epoch."""
        epoch, position = divmod(step, self.per_epoch)
        # The numbers of consecutive examples that are read together; see `Examples`.
        chunk_sizes = tuple(getattr(self.examples, "chunk_sizes", ())) or (len(self.examples),)
        order = _order(chunk_sizes, self.seed, epoch)
        share = self.batch_size // self.size
        start = position * self.batch_size + self.rank * share
        for first in range(start, start + share, self.micro_batch_size):
            yield stack([self.examples[i] for i in order[first : first + self.micro_batch_size].tolist()])

    @property
    def _unique_examples(self) -> Examples:
        """The examples, each once, without the repetitions of training."""
        return getattr(self.examples, "without_repeats", self.examples)

    def num_in_order(self, limit: int | None = None) -> int:
        """Return the number of global batches of `in_order`. The last one may be smaller."""
        total = -(-len(self._unique_examples) // self.batch_size)
        return total if limit is None else min(limit, total)

    def in_order(self, limit: int | None = None, every: int = 1) -> Iterator[tuple[Batch, bool]]:
        """Yield each example once over all ranks, as (batch, counts).

        Every rank gets the same number of batches, since a forward pass may be collective. A rank without examples
        left gets the first one again, with `counts` False.

        Examples with `token_counts` are sorted, longest first, so that a batch has examples of similar lengths and
        little padding. If memory is not sufficient, the first batch fails.

        Args:
            limit: the largest number of global batches, so that the examples do not depend on the number of ranks.
            every: yield only each `every`-th of these global batches, starting with the first one.
        """
        examples = self._unique_examples
        starts = range(0, len(examples), self.batch_size)[: self.num_in_order(limit) : every]
        order = [i for start in starts for i in range(start, min(start + self.batch_size, len(examples)))]
        if (counts := getattr(examples, "token_counts", None)) is not None:
            if len(counts) != len(examples):
                raise ConfigError(
                    f"token_counts: the task has {len(counts)} counts for {len(examples)} examples; give one for each."
                )
            order.sort(key=lambda i: int(counts[i]), reverse=True)
        share = self.micro_batch_size
        for start in range(0, len(order), share * self.size):
            first = start + self.rank * share
            indices = order[first : first + share]
            yield stack([examples[i] for i in indices or order[:1]]), bool(indices)


@lru_cache(maxsize=2)
def _order(chunk_sizes: tuple[int, ...], seed: int, epoch: int) -> torch.Tensor:
    """Return a random order of chunks of consecutive examples, and of the examples in each chunk."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if len(chunk_sizes) == 1:
        return torch.randperm(chunk_sizes[0], generator=generator)
    firsts = [0, *accumulate(chunk_sizes)]
    shuffled = torch.randperm(len(chunk_sizes), generator=generator).tolist()
    return torch.cat([firsts[i] + torch.randperm(chunk_sizes[i], generator=generator) for i in shuffled])


def make_batches(
    examples: Examples, split: str, batch_size: int, micro_batch_size: int | None, rank: int, size: int, seed: int
) -> Batches:
    """Return the batches of a rank.

    Args:
        examples: the examples of the split.
        split: the name of the split, for messages.
        batch_size: the number of examples of a global batch.
        micro_batch_size: the largest number of examples of a micro-batch; None for one micro-batch.
        rank: the index of this rank.
        size: the number of ranks.
        seed: the seed of the order.

    Raises:
        ConfigError: the batch cannot be divided equally among the ranks, or the split is smaller than one batch.
    """
    micro, _ = divide_batch(batch_size, micro_batch_size, size)
    if len(examples) < batch_size:
        raise ConfigError(
            f"batch_size: split {split!r} has {len(examples)} examples, less than one batch of {batch_size}."
        )
    return Batches(examples, batch_size, micro, rank, size, seed)


def divide_batch(batch_size: int, micro_batch_size: int | None, size: int) -> tuple[int, int]:
    """Return the size of a micro-batch, and the number of micro-batches of a rank in a global batch.

    Raises:
        ConfigError: the batch cannot be divided equally among the ranks.
    """
    share, rest = divmod(batch_size, size)
    micro = min(micro_batch_size or share, share)
    if rest or share % micro:
        raise ConfigError(
            f"batch_size: {batch_size} examples cannot be divided into {size} ranks x micro-batches of {micro}; choose "
            f"a multiple of {size * micro}."
        )
    return micro, share // micro

"""Examples of several sources in the proportions of their weights."""

from collections.abc import Sequence
from functools import cached_property
from math import ceil

from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import Batch, Examples

_MAX = 1 << 28  # examples of an epoch, whose order the training loop keeps in memory, 8 bytes each


class Mixture:
    """The examples of several sources, each source evenly distributed over the epoch.

    An epoch has each example at least once. It ends when the source that is longest for its weight has been read once;
    the others are read several times, in their order. Any part of the order therefore has the proportions of the
    weights, and the order depends only on the lengths and the weights. The j-th of the n examples of a source is at the
    place (j + 1/2) / n of the epoch, which is computed on access, so that the order needs no memory.
    """

    def __init__(self, sources: Sequence[Examples], weights: Sequence[float], key: str) -> None:
        """Compute the order.

        Args:
            sources: the examples of each source.
            weights: the weight of each, positive; they need not sum to 1.
            key: the setting in messages.

        Raises:
            ConfigError: an epoch would have more than 2^28 examples.
        """
        self._sources = sources
        shares = [weight / sum(weights) for weight in weights]
        longest = max(len(source) / share for source, share in zip(sources, shares, strict=True))
        if longest >= _MAX:
            raise ConfigError(f"{key}: an epoch with these weights has {longest:.0f} examples. Give larger weights.")
        self._numbers = [max(ceil(longest * share - 1e-6), len(s)) for s, share in zip(sources, shares, strict=True)]
        self._count = sum(self._numbers)
        repeats = [n / len(source) for n, source in zip(self._numbers, sources, strict=True)]
        if max(repeats) > 1:
            times = ", ".join(f"{repeat:.3g}" for repeat in repeats)
            notice(f"{key}: with these weights an epoch reads its sources {times} times.")

    def __len__(self) -> int:
        return self._count

    @cached_property
    def without_repeats(self) -> "Mixture":
        """The same examples for an evaluation, each once."""
        return Mixture(self._sources, [len(source) for source in self._sources], "")

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        source, j = self._find(index)
        return self._sources[source][j % len(self._sources[source])]

    def _find(self, index: int) -> tuple[int, int]:
        """Return the source at a position of the epoch, and the index of its example."""
        for i, number in enumerate(self._numbers):
            j = index * number // self._count
            while j + 1 < number and self._position(i, j) < index:
                j += 1
            while j and self._position(i, j) > index:
                j -= 1
            if self._position(i, j) == index:
                return i, j
        raise AssertionError(f"no example has the position {index} of {self._numbers}")

    def _position(self, i: int, j: int) -> int:
        """Return the number of examples before the j-th of source i. At equal places, earlier sources come first."""
        before = 0
        for k, number in enumerate(self._numbers):
            # The l-th of source k comes before if (2l + 1) / number < (2j + 1) / numbers[i].
            value = (2 * j + 1) * number - (k >= i)
            before += (value // self._numbers[i] + 1) // 2
        return before

"""Examples of several sources in the proportions of their weights."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import Batch, Examples

_MAX = 1 << 31  # examples of an epoch: their order is in memory


class Mixture:
    """The examples of several sources, each source evenly distributed over the epoch.

    An epoch has each example at least once. It ends when the source that is longest for its weight has been read once;
    the others are read several times, in their order. So any part of the order has the proportions of the weights, and
    the order depends on nothing but the lengths and the weights.
    """

    def __init__(self, sources: Sequence[Examples], weights: Sequence[float], key: str) -> None:
        """Compute the order.

        Args:
            sources: the examples of each source.
            weights: the weight of each, positive; they need not sum to 1.
            key: the setting in messages.

        Raises:
            ConfigError: an epoch would have more than 2^31 examples.
        """
        self._sources = sources
        shares = np.array(weights, np.float64) / sum(weights)
        longest = max(len(source) / share for source, share in zip(sources, shares, strict=True))
        if longest >= _MAX:
            raise ConfigError(f"{key}: an epoch with these weights has {longest:.0f} examples. Give larger weights.")
        numbers = [max(ceil(longest * share - 1e-6), len(s)) for s, share in zip(sources, shares, strict=True)]
        # The j-th of n examples of a source is at the place (j + 1/2) / n of the epoch.
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in numbers])
        order = np.argsort(places, kind="stable")
        self._source = np.repeat(np.arange(len(sources), dtype=np.int32), numbers)[order]
        self._index = np.concatenate([np.arange(n) % len(s) for n, s in zip(numbers, sources, strict=True)])[order]
        repeats = [n / len(source) for n, source in zip(numbers, sources, strict=True)]
        if max(repeats) > 1:
            times = ", ".join(f"{repeat:.3g}" for repeat in repeats)
            notice(f"{key}: with these weights an epoch reads its sources {times} times.")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._sources[int(self._source[index])][int(self._index[index])]

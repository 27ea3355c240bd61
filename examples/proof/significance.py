"""Paired differences over seeds, with 95 % intervals of Student's t."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# The 0.975 quantiles of Student's t with 1, 2, .. degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods on the same seeds, and half the width of its 95 % interval."""

    mean: float
    half: float
    """Infinite for one seed."""
    num_seeds: int

    def verdict(self, higher_is_better: bool, margin: float = 0.0) -> str:
        """Return what the interval shows, in bold if the first method is worse.

        With a margin, it has to show that the first method is worse by less than this, or better.
        """
        if self.num_seeds < 2:
            return "one seed: no interval"
        if margin:
            better = self.mean if higher_is_better else -self.mean
            return "worse by less than the margin" if better - self.half > -margin else "**margin not shown**"
        if abs(self.mean) <= self.half:
            return "no difference shown"
        shown = "higher" if self.mean > 0 else "lower"
        return shown if (self.mean > 0) == higher_is_better else f"**{shown}**"

    def shown(self, unit: float, digits: int) -> str:
        """Return the difference and half its interval, divided by `unit`."""
        half = f" ± {self.half / unit:.{digits}f}" if math.isfinite(self.half) else ""
        return f"{self.mean / unit:+.{digits}f}{half}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the paired difference `ours` - `theirs`, one value of each for each seed."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(pairs)
    if not 1 <= count <= len(_T) + 1:
        raise ValueError(f"{count} seeds; 1 to {len(_T) + 1} are known")
    half = math.inf if count == 1 else _T[count - 2] * statistics.stdev(pairs) / math.sqrt(count)
    return Difference(statistics.mean(pairs), half, count)

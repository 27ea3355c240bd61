"""Detects that `step()` is called more often than the optimizer's."""

from collections.abc import Mapping

import torch

from twa_scale.base.notices import notice
from twa_scale.base.spans import Span

_ENOUGH = 8  # updates without a write before, which a loss scaler that skips its first steps does not reach
_PART = 3  # one of so many updates is without a write
_SAMPLE = 64  # elements of each tensor


class Repeats:
    """Reports once that weights are often the same at two updates one after the other.

    torch counts writes in a tensor's version. Some optimizers write without it, so that a comparison of values decides,
    for which the host waits once for a GPU.
    """

    def __init__(self) -> None:
        self._versions: Mapping[str, object] = {}
        self._updates = 0
        self._same = 0
        self._sample: torch.Tensor | None = None
        self._decided = False

    def check(self, versions: Mapping[str, object], live: Mapping[Span, torch.Tensor], *, report: bool) -> None:
        """Note an update, and report where the weights were often not written since the one before.

        Args:
            versions: values that change when torch writes the weights; empty where the engine cannot say.
            live: the weights.
            report: whether this rank reports.
        """
        if self._decided or not versions or not live:
            return
        same, self._versions = versions == self._versions, versions
        self._updates += 1
        self._same += same
        if same and self._sample is not None:
            self._decided = True
            if torch.equal(self._sample, _sample(live)) and report:
                notice(
                    f"averages.step(): the weights were not written before {self._same} of {self._updates} updates. "
                    "Call it once, after each step of the optimizer: not in every micro-batch, and not twice."
                )
        elif self._same >= _ENOUGH and self._same * _PART >= self._updates:
            self._sample = _sample(live)


def _sample(live: Mapping[Span, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([values[:_SAMPLE].to(torch.float64) for values in live.values()])

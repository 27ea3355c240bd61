"""Detects calls of `step()` without a preceding step of the optimizer."""

from collections.abc import Mapping

import torch

from twa_scale.base.notices import notice
from twa_scale.base.spans import Span

_MIN_UNCHANGED = 8  # updates without a preceding write; a loss scaler that skips its first steps causes fewer
_UNCHANGED_PERIOD = 3  # at least one of three updates has no preceding write
_SAMPLE = 64  # elements of each tensor that are compared


class Repeats:
    """Reports once if the weights are often equal at two consecutive updates.

    torch counts the writes of a tensor in its version. Some optimizers do not increase it, so the values are compared,
    too. For this comparison the host waits once for a GPU.
    """

    def __init__(self) -> None:
        self._versions: Mapping[str, object] = {}
        self._updates = 0
        self._same = 0
        self._sample: torch.Tensor | None = None
        self._decided = False

    def check(self, versions: Mapping[str, object], live: Mapping[Span, torch.Tensor], *, report: bool) -> None:
        """Record an update, and report if the weights were often not written between updates.

        Args:
            versions: values that change when torch writes the weights; empty if the engine does not provide them.
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
        elif self._same >= _MIN_UNCHANGED and self._same * _UNCHANGED_PERIOD >= self._updates:
            self._sample = _sample(live)


def _sample(live: Mapping[Span, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([values[:_SAMPLE].to(torch.float64) for values in live.values()])

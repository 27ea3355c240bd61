"""What backward passes have left for the next step: the gradient, projected onto the deltas span by span."""

from collections.abc import Mapping

import torch

from twa_scale.clock import Clock
from twa_scale.spans import Span
from twa_scale.store import Store


class Gradients:
    """Sums s = <delta, gradient> over spans and backward passes; the gradients themselves may be freed.

    Args:
        store: holds the deltas.
        groups: the number of the group of each trained span of this rank.
        sums: zeros, (n + 1, G) float64, on the device of the gradients; the last row is for <center, gradient>.
        clock: is told what projecting costs, in backward and in a step.
        with_center: whether the last row is needed.
    """

    def __init__(
        self, store: Store, groups: Mapping[Span, int], sums: torch.Tensor, clock: Clock, *, with_center: bool
    ) -> None:
        self._store = store
        self._groups = groups
        self._clock = clock
        self._with_center = with_center
        self._sums = sums
        self._streams: set[torch.cuda.Stream] = set()
        self.received = False
        """Whether a gradient of a trained span has come to this rank since the last step."""

    def project(self, span: Span, gradient: torch.Tensor, *, in_step: bool) -> None:
        """Add the products of one span's gradient, 1-D; it may be freed afterwards."""
        group = self._groups.get(span)
        if group is None:
            return
        self.received = True
        if not len(span):
            return
        if gradient.is_cuda:
            self._streams.add(torch.cuda.current_stream())
        with self._clock.part("project in step" if in_step else "project in backward"):
            self._sums[:, group] += self._store.project(span, gradient, self._with_center)

    def sums(self) -> torch.Tensor:
        """Return what this rank has summed, (n + 1, G) float64; the current stream waits for it."""
        for stream in self._streams:  # hooks may have run on the stream that reduced the gradient
            torch.cuda.current_stream().wait_stream(stream)
        return self._sums

    def clear(self) -> None:
        """Begin a new step."""
        self.received = False
        self._sums.zero_()

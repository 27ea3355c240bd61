"""Project gradients onto the deltas, span by span, and sum the products until the next step."""

import math
from collections.abc import Mapping

import torch

from twa_scale.average.rows import RowCorrections
from twa_scale.base.clock import Clock
from twa_scale.base.spans import Span
from twa_scale.errors import EngineError, TwaError
from twa_scale.ranks import Pods, Reduction
from twa_scale.store import Store


class Gradients:
    """The sums of <row, gradient> over spans and backward passes; gradients can be freed after each.

    The rows are those of the store: deltas, or increments that deltas are sums of. `reduced` returns
    s = <delta, gradient>.

    Args:
        store: holds the deltas.
        groups: the index of the group of each trained span of this rank.
        corrections: the corrections of output rows, if there are any. They receive their part of each projection.
        sums: zeros, (store.coding.num_rows + 1, G) float64, on the device of the gradients; the last row is for
            <base, gradient>.
        clock: measures the time of projections, in backward and in a step.
        with_center: whether the last row is needed.
        with_norm: whether to compute the norm of the gradient of all trainable weights, including fixed tensors.
    """

    def __init__(
        self,
        store: Store,
        groups: Mapping[Span, int],
        corrections: RowCorrections | None,
        sums: torch.Tensor,
        clock: Clock,
        with_center: bool,
        *,
        with_norm: bool,
    ) -> None:
        self._store = store
        self._groups = groups
        self._corrections = corrections
        self._clock = clock
        self._with_center = with_center
        self._sums = sums
        # A full row, so that one all-reduce sums it together with the products.
        self._squares = torch.zeros_like(sums[:1]) if with_norm else None
        self._squared: set[Span] = set()
        self._streams: set[torch.cuda.Stream] = set()
        self._fault: Exception | None = None
        self.received = False
        """Whether this rank has received a gradient of a trained span since the last step."""

    def project(self, span: Span, gradient: torch.Tensor, *, in_step: bool) -> None:
        """Add the products of the gradient of one span, 1-D. The gradient can be freed afterwards.

        Raises:
            EngineError: the gradient has another length than the span.
        """
        if gradient.shape != (len(span),):
            raise EngineError(
                f"the gradient of {span.name!r} has the shape {tuple(gradient.shape)}, but this rank holds {len(span)} "
                "elements of the parameter: an engine of your own passes on 1-D gradients of the length of the span, "
                "and a parameter must not get another shape after attach."
            )
        group = self._groups.get(span)
        self.received |= group is not None
        if not len(span):
            return
        if gradient.is_cuda:
            self._streams.add(torch.cuda.current_stream())
        self._square(span, gradient)
        if group is None:
            return
        with self._clock.part("project in step" if in_step else "project in backward"):
            if self._corrections is None or (part := self._corrections.part(span)) is None:
                self._sums[:, group] += self._store.project(span, gradient, self._with_center)
            else:
                for sums in self._store.project_rows(span, gradient, self._with_center, part.segments):
                    self._sums[:, group] += sums.products.sum(1)
                    self._corrections.add(part, sums)

    def _square(self, span: Span, gradient: torch.Tensor) -> None:
        if self._squares is None:
            return
        if span in self._squared:  # the norm of a sum cannot be computed from the norms of its terms
            self.set_fault(
                TwaError(
                    f"max_weight_grad_norm: the gradient of {span.name!r} has arrived in several parts since the last "
                    "step, and the norm of their sum is not known. Run one backward pass for each step, or an engine "
                    "that keeps gradients (DDP, FSDP1, FSDP2)."
                )
            )
        self._squared.add(span)
        precise = torch.promote_types(gradient.dtype, torch.float32)
        self._squares[0, 0] += torch.linalg.vector_norm(gradient, dtype=precise).double().square()

    def reduced(self, reduction: Reduction) -> tuple[torch.Tensor, float | None]:
        """Return the sums over all ranks, (n + 1, G) float64 on the CPU, and the gradient norm or None. Collective.

        The norm is the 2-norm of the gradient of all trainable weights of the shard group, each element counted once.
        It is None without `with_norm`.
        """
        for stream in self._streams:  # hooks may run on the stream that reduces the gradient
            torch.cuda.current_stream().wait_stream(stream)
        if self._squares is None:
            return self._of_deltas(reduction(self._sums)), None
        sums = reduction(torch.cat([self._sums, self._squares]))
        return self._of_deltas(sums[:-1]), math.sqrt(sums[-1, 0])

    def _of_deltas(self, sums: torch.Tensor) -> torch.Tensor:
        return self._store.coding.delta_products(sums)

    def require_any(self, sums: torch.Tensor, pods: Pods) -> None:
        """Check that there was a backward pass since the last step. Collective.

        Momentum would change the coefficients. Ranks communicate only if the reduced sums are all zero.

        Raises:
            TwaError: on every rank.
        """
        if sums.any():
            return
        if not pods.sum_(torch.tensor(float(self.received), device=self._sums.device)).item():
            raise TwaError(
                "step() without a backward pass since the last one, or with a loss that reaches no trained tensor. "
                "twa.step() and twa.optimizer.step() are the same step: call one of them, once for each gradient."
            )

    def set_fault(self, fault: Exception) -> None:
        """Set the sums to NaN, so that the all-reduce of the next step reports the error to all ranks."""
        self._fault = self._fault or fault
        self._sums.fill_(torch.nan)

    def require_no_fault(self, pods: Pods) -> None:
        """Raise an error of any rank on every rank. Call it if the reduced sums are not finite. Collective."""
        with pods.agree():
            if self._fault:
                raise self._fault

    def clear(self) -> None:
        """Reset the sums for a new step."""
        self._fault = None
        self.received = False
        self._sums.zero_()
        if self._corrections is not None:
            self._corrections.clear()
        if self._squares is not None:
            self._squares.zero_()
            self._squared.clear()


def clipping(norm: float | None, max_norm: float | None) -> float:
    """Return the factor of `torch.nn.utils.clip_grad_norm_` for a gradient of this norm; NaN if it is not finite."""
    if norm is None or max_norm is None:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan

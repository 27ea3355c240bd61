"""The step of an average: sum the products over ranks, check them, train the coefficients, and write the weights."""

import torch

from twa_scale.average.gradients import Gradients, clipping
from twa_scale.average.parts import Parts
from twa_scale.average.same_on_ranks import SameOnRanks
from twa_scale.average.step_optimizer import AverageOptimizer
from twa_scale.average.weights import Weights
from twa_scale.average.written import WrittenCoefficients
from twa_scale.base.clock import Clock
from twa_scale.base.spans import Span
from twa_scale.errors import NotFiniteError, RankError, TwaError


class CoefficientStep:
    """Takes steps from the inner products of deltas and gradient that backward passes have added up.

    Args:
        parts: the engine, the ranks and the settings.
        gradients: the sums of the products.
        written: the coefficients.
        weights: the weights in the model.
        optimizer: trains the coefficients.
        same: compares settings and coefficients of the ranks.
        clock: measures the time of the reduction.
    """

    def __init__(
        self,
        parts: Parts,
        gradients: Gradients,
        written: WrittenCoefficients,
        weights: Weights,
        optimizer: AverageOptimizer,
        same: SameOnRanks,
        clock: Clock,
    ) -> None:
        self._config = parts.config
        self._engine = parts.engine
        self._pods = parts.pods
        self._reduction = parts.reduction
        self._gradients = gradients
        self._written = written
        self._weights = weights
        self._optimizer = optimizer
        self._same = same
        self._clock = clock
        self._draining = False
        self._accumulating = False
        self.count = 0
        """The number of steps that have changed the coefficients."""

    @property
    def only_received(self) -> bool:
        """Whether this rank has received a gradient since attach, but no step has used one."""
        return self.count == 0 and self._gradients.received

    def project(self, span: Span, gradient: torch.Tensor) -> None:
        """Add the products of the gradient of one span, 1-D."""
        self._gradients.project(span, gradient, in_step=self._draining)

    def take(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Take a step, and return whether the coefficients changed. Collective.

        Raises:
            TwaError: as `TrainableAverage.step` does.
        """
        self._accumulating = not self._engine.boundary()
        if self._accumulating:
            return False
        self._drain()
        with self._clock.part("reduce"):
            products, norm = self._gradients.reduced(self._reduction)  # small tensors on the CPU
        self._gradients.require_any(products, self._pods)
        if scaler and not scaler.is_enabled():
            scaler = None  # a disabled scaler does not check for overflow
        scale = self._loss_scale(scaler)
        self._require_same(scale)
        clip = clipping(None if norm is None else norm / scale, self._config.max_weight_grad_norm)
        products *= clip
        finite = self._checked(products)
        if not finite and scaler is None:
            if self._engine.loss_scale:
                return False
            raise NotFiniteError(
                "the gradient is not finite: check for a diverging loss or an overflow, then lower the learning rate."
            )
        # This also unscales the gradient of the rows. `_checked` or the scaler unscales that of the coefficients.
        if finite and self._written.rows is not None:
            self._written.rows.reduce(clip / scale)
        self._train(products, scaler)
        self.count += finite
        self._weights.report_samples()  # the host has waited for the device, and the ranks for each other
        return finite

    def _require_same(self, loss_scale: float) -> None:
        try:
            self._same.require_in_step(self.count + 1, loss_scale)
        except RankError:
            raise
        except TwaError:  # the gradient may be scaled differently on each rank
            self.clear()
            raise

    def clear(self) -> None:
        """Clear the gradients that were added since the last step, except within a gradient accumulation."""
        if self._accumulating:
            return
        self._optimizer.inner.zero_grad()
        self._gradients.clear()
        self._engine.forget()

    def _drain(self) -> None:
        """Project the gradients that were not passed on during backward; errors are raised after the reduction."""
        self._draining = True
        try:
            self._engine.drain()
            self._weights.check()
        except RankError:
            raise
        except Exception as error:
            self._gradients.set_fault(error)
        finally:
            self._draining = False

    def _loss_scale(self, scaler: torch.amp.GradScaler | None) -> float:
        """Return the factor of the loss that this backward pass had."""
        if engine_scale := self._engine.loss_scale:
            return engine_scale.value()
        return scaler.get_scale() if scaler else 1.0

    def _checked(self, products: torch.Tensor) -> bool:
        """Return whether the products are finite. Those of an engine with a loss scale are unscaled in place.

        Raises:
            TwaError: a rank has failed; on every rank.
        """
        finite = bool(torch.isfinite(products).all())
        if not finite:
            try:
                self._gradients.require_no_fault(self._pods)
            finally:
                self.clear()  # also what the engine holds, which the next step would take for all of a gradient
        if engine_scale := self._engine.loss_scale:
            products /= engine_scale.value()
            engine_scale.update(overflow=not finite)
        return finite

    def _train(self, products: torch.Tensor, scaler: torch.amp.GradScaler | None) -> None:
        """Step the optimizer with the gradient of these products, (n + 1, G), and write the weights. Collective.

        Args:
            products: the reduced products, scaled like the loss if there is a scaler.
            scaler: the scaler of the loss.
        """
        gradient = self._written.gradient(products)
        before = self._written.saved()
        self._optimizer.update(gradient, scaler, self._config.max_grad_norm)
        self._gradients.clear()
        self._written.confirm(before)

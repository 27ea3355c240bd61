"""The average: gradients are projected onto the deltas, coefficients are trained, and weights are combined."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from twa_scale.average import batchnorm
from twa_scale.average.basis import Basis
from twa_scale.average.closing import while_open
from twa_scale.average.coefficients import Which, averaging_coefficients
from twa_scale.average.export import export
from twa_scale.average.gradients import Gradients, clipping
from twa_scale.average.layout import Layout
from twa_scale.average.optimizer import make_optimizer
from twa_scale.average.overflow import WeightLimits
from twa_scale.average.state import StateForm, require_same_state
from twa_scale.average.step_optimizer import AverageOptimizer, refuse_copies
from twa_scale.average.swap import Shown
from twa_scale.average.weights import Weights
from twa_scale.base.clock import Clock
from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.candidates.carry_over import Carried
from twa_scale.candidates.conversion import conversions
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.candidates.read_ahead import Progress, job_bytes
from twa_scale.candidates.rounding import Rounding
from twa_scale.config import TwaConfig
from twa_scale.config.kinds import MappedFiles, store_kind
from twa_scale.engines import Engine
from twa_scale.errors import ConfigError, RankError, TwaError
from twa_scale.output.provenance import provenance
from twa_scale.ranks import Pods, Reduction
from twa_scale.store import Store, step_cost, update_bytes


class TrainableAverage:
    """A model whose weights are an average of candidates with trained coefficients. Made by `attach`.

    A backward pass adds up the inner products s of deltas and gradient, span by span. `step` sums s over the ranks,
    computes the gradient of the coefficients x, steps the optimizer, and writes w = (1 + u_c) c + sum_i u_i delta_i.
    """

    def __init__(
        self,
        config: TwaConfig,
        engine: Engine,
        pods: Pods,
        reduction: Reduction,
        layout: Layout,
        store: Store,
        basis: Basis,
        fingerprint: Fingerprint,
        candidates: Sequence[Candidate],
        carried: Carried,
        rounding: Rounding | None,
    ) -> None:
        self.config = config
        self.rounding = rounding
        """What a packed store holds in place of the candidates, and averages; None for other stores."""
        self.layout = layout
        self.fingerprint = fingerprint
        self.pods = pods
        self._reduction = reduction
        self._engine = engine
        self._store = store
        self._basis = basis
        self._candidates = candidates
        self._carried = carried
        self._form = StateForm(config, layout, basis, fingerprint, conversions(candidates))
        self._spans = {span: layout.group_of[span.name] for span in engine.spans() if span.name in layout.group_of}
        # From one rank, as the basis: all have the same bits.
        self._x = nn.Parameter(pods.broadcast(basis.locate(self._chosen(config.start))))
        self.clock = Clock(engine.device)
        sums = torch.zeros(store.coding.num_rows + 1, len(layout.groups), dtype=torch.float64, device=engine.device)
        clips = config.max_weight_grad_norm is not None
        self._gradients = Gradients(store, self._spans, sums, self.clock, basis.needs_center, with_norm=clips)
        self.optimizer = AverageOptimizer(make_optimizer(config, self._x), self, self._take_step)
        """For schedulers, and for what calls optimizers: its step is `step`."""
        self.closed = self._moved = self._in_step = self._accumulating = False
        self._shown = Shown(engine, pods, self._write, self._gradients.spoil)
        self._weights = Weights(engine, store, self._spans, layout, self.clock, postpone=config.combine == "forward")
        self._limits = WeightLimits(engine, self._weights, layout, basis, pods)
        self._write()
        self._limits.require_weights(self._x, self._spans)
        engine.forget()
        engine.keeps_gradients = clips
        engine.watch(self._project)
        self._weights.watch()

    @property
    def num_candidates(self) -> int:
        """n."""
        return len(self._candidates)

    @property
    def lost(self) -> str:
        """Why the average can no longer be used; empty as long as it can."""
        return self._shown.lost

    @property
    def coefficients(self) -> torch.Tensor:
        """The averaging coefficients a, (n, G) float64: w_g = sum_i a[i, g] w_i; in centered bases they sum to 1."""
        return self._form.averaging(self._x)

    @property
    def bytes_read(self) -> int:
        """Bytes of the candidates that this rank has read."""
        return sum(candidate.bytes_read for candidate in self._candidates)

    @property
    def store_bytes(self) -> int:
        """Bytes of deltas and center that this rank holds."""
        return self._store.nbytes

    @while_open
    def cost(self, steps: int) -> dict[str, dict[str, float]]:
        """Return the mean seconds of the parts of a step since the last call, and the bytes of memory each moves.

        `project` reads the deltas and the gradient, `combine` the deltas and the center, and writes the weights;
        `publish` makes them visible to the engine. Of `project`, `seconds_in_backward` are spent in backward hooks; for
        `combine`, with `combine: forward`, forward passes have waited `seconds_in_forward`.
        """
        elements = sum(len(span) for span in self._spans)
        weights = sum(self._engine.live(span).nbytes for span in self._spans)
        mapped = 0
        if isinstance(
            store_kind(self.config.store), MappedFiles
        ):  # it reads the candidates' own files where other stores read deltas
            everyone = range(self.num_candidates)
            mapped = job_bytes(self._candidates, [(self.layout.sourced(span), everyone) for span in self._spans])
        nbytes = update_bytes(self._store.nbytes, elements, mapped=mapped, weights=weights)
        return step_cost(self.clock.read(), nbytes, steps)

    @while_open
    def step(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Take one step of the optimizer on the coefficients, and write the new weights. Collective.

        Call it, or `optimizer.step()`, which is the same, after one or more backward passes; it sees the sum of their
        gradients. With DeepSpeed call it after each `engine.backward`, in place of `engine.step`: it acts when the
        engine's accumulation is full.

        Args:
            scaler: what scaled the loss; call its `update` afterwards, as with any optimizer.

        Returns:
            Whether the coefficients moved: not within an accumulation, nor when a scaled gradient overflowed.

        Raises:
            TwaError: a gradient that is not finite, weights that would not be, no backward pass since the last step, or
                a step inside `weights`; coefficients and weights are as they were.
            EngineError: on every rank, also when only one of them has gradients that are incomplete.
        """
        self.optimizer.step(grad_scaler=scaler)  # through its hooks, and so that schedulers see a step
        return self._moved

    @while_open
    def _take_step(self, scaler: torch.amp.GradScaler | None) -> None:
        """Do what `step` and `optimizer.step` do."""
        self._moved = False
        if self._shown:
            raise TwaError("step() inside weights(): the gradient is not that of the trained weights; leave it first.")
        self._accumulating = not self._engine.boundary()
        if self._accumulating:
            return
        self._in_step = True
        try:
            self._engine.drain()
            self._weights.check()
        except RankError:
            raise
        except Exception as error:
            self._gradients.spoil(error)
        finally:
            self._in_step = False
        with self.clock.part("reduce"):
            products, norm = self._gradients.reduced(self._reduction)  # from here to the weights everything is small
        self._gradients.require_any(products, self.pods)
        if scaler and not scaler.is_enabled():
            scaler = None  # it would let an overflow through
        engine_scale = self._engine.loss_scale
        scale = engine_scale.value() if engine_scale else scaler.get_scale() if scaler else 1.0
        products *= clipping(norm and norm / scale, self.config.max_weight_grad_norm)
        finite = bool(torch.isfinite(products).all())
        if not finite:
            self._require_no_fault()
        if engine_scale:
            products /= scale
            engine_scale.update(overflow=not finite)
        if not finite and scaler is None:
            self.zero_grad()
            if engine_scale:
                return
            raise TwaError("the gradient is not finite: look for a diverging loss or an overflow, then lower the rate.")
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._basis.expand(self._x), self._x, products)
        before = self._x.detach().clone()
        self.optimizer.update(gradient, scaler, self.config.max_grad_norm)
        self._gradients.clear()
        self._write_or_return_to(before)
        self._moved = finite

    def as_optimizer(self) -> AverageOptimizer:
        """Return `optimizer`, for trainers of other libraries that take one: its step is that of the average.

        Its state dict continues the run: coefficients, moments and, when it is loaded, the weights.
        """
        return self.optimizer

    @while_open
    def settle(self) -> None:
        """Write what a step has left to the next forward pass (`combine: forward`). Not collective.

        Forward passes, all methods here and the module's `state_dict` do so themselves: this is for those who read
        parameters in between.
        """
        self._weights.settle()

    @while_open
    def zero_grad(self) -> None:
        """Forget the gradients of the coefficients and what backward passes have added since the last step.

        After a `step` that only counted a micro-batch of the engine's accumulation it keeps them.
        """
        if self._accumulating:
            return
        self.optimizer.inside.zero_grad()
        self._gradients.clear()
        self._engine.forget()

    @while_open
    @contextmanager
    def weights(self, which: Which) -> Iterator[None]:
        """Show the model with other weights in a `with` block, then restore weights and buffers. Collective.

        Tensors that are not trained keep their value at the center, and buffers theirs: measure BatchNorm statistics
        anew inside the block (`recalibrate_batchnorm`) where the model has them.

        Args:
            which: "trained", "center", what the setting `center` takes ("mean", "ema:0.9", "last", the index of a
                candidate), or coefficients a: n numbers, or (n, G), of any sum. The same on every rank.

        Raises:
            TwaError: a backward pass inside the block, which would give the gradient of other weights.
            RankError: another rank has left the block by an error and has not come to its end: nothing is restored, and
                the average cannot be used any more. An error of the block is raised on every rank that ends it.
        """
        trained = isinstance(which, str) and which == "trained"
        with self._shown.showing(which, lambda: None if trained else self._chosen(which)):
            yield

    @while_open
    def recalibrate_batchnorm(
        self, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] | None = None
    ) -> int:
        """Measure the BatchNorm statistics of the present weights on `batches` of all ranks. Collective.

        Returns the number of batches seen over all ranks. See `batchnorm.recalibrate` for the arguments.
        """
        engine = self._engine
        self.settle()
        synced = any(isinstance(layer, nn.SyncBatchNorm) for layer in engine.module.modules())
        apart = self.pods.size == self.pods.count and not synced  # then no forward pass waits for another rank
        seen = batchnorm.recalibrate(engine.module, batches, self.pods, engine.device, forward, apart=apart)
        engine.publish(())
        return seen

    @while_open
    def export(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the live weights as safetensors into the directory `path`, as the candidates were written. Collective.

        See `export.export` for the arguments and errors.
        """
        self.settle()
        origin = provenance(
            "the live weights of an average",
            self.fingerprint.labels,
            config=self._form.settings(),
            groups=list(self.layout.groups),
            coefficients=(self.coefficients if self._shown.now is None else self._shown.now).tolist(),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )
        export(
            self._engine,
            self.pods,
            self.layout,
            self._candidates,
            self._carried,
            path,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            provenance=origin,
            progress=progress,
        )

    def can_start_from(self, which: Which) -> bool:
        """Whether `start_from(which)` is possible; the simplex cannot start where a candidate has no weight.

        Raises:
            ConfigError: as `weights` does.
        """
        return self._basis.reaches(self._chosen(which))

    @while_open
    def start_from(self, which: Which) -> None:
        """Set the coefficients to an average that needs no training, and write its weights. Collective.

        The basis `pca` takes the nearest point of its subspace. The optimizer keeps its state, so call this before the
        first step.

        Args:
            which: what `weights` takes, but for "trained".

        Raises:
            ConfigError: on every rank; an unknown average, or one that the basis cannot start from.
        """
        with self.pods.agree():
            if self._shown:
                raise TwaError("start_from() inside weights(): leave it first.")
            if not self.can_start_from(which):
                raise ConfigError(f"start_from: basis {self.config.basis!r} cannot start from {which!r}.")
        before = self._x.detach().clone()
        with torch.no_grad():
            self._x.copy_(self.pods.broadcast(self._basis.locate(self._chosen(which))))
        self._write_or_return_to(before)
        self.zero_grad()

    @while_open
    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to continue on any engine and number of ranks: kilobytes.

        It is the same on every rank, but for BatchNorm statistics where ranks keep their own.
        """
        names = batchnorm.statistics(self._engine.module, self._engine.buffers())
        statistics = {name: buffer for name, buffer in self._shown.own_buffers().items() if name in names}
        return self._form.state(self._x, self.optimizer.inside.state_dict(), statistics)

    @while_open
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Collective.

        Raises:
            StateError: on every rank; a field that is missing or of another type or shape, other candidates, or
                settings under which the coefficients would mean something else. The average is as it was.
        """
        with self.pods.agree():
            if self._shown:
                raise TwaError("load_state_dict() inside weights(): leave it first.")
            saved = self._form.checked(state, self._x, self._engine.buffers())
        require_same_state(self.pods, saved)
        before = self._x.detach().clone()
        with torch.no_grad():
            self._x.copy_(saved.x)
        self._write_or_return_to(before)
        self.optimizer.load_inside(saved.optimizer)
        self.zero_grad()
        live = self._engine.buffers()
        for name, value in saved.buffers.items():
            live[name].copy_(value)

    def close(self) -> None:
        """Take the hooks off the model and release the store and the candidates; the model keeps its weights.

        A second call does nothing; other methods raise TwaError from then on.
        """
        if self.closed:
            return
        if self._shown:
            raise TwaError("close() inside weights(): the model would keep those; leave it first.")
        try:
            if not self.lost:
                self.settle()
        finally:  # also where the weights can no longer be written
            self.closed = True
            self._engine.close()
            self._reduction.close()
            self._store.close()
            for candidate in self._candidates:
                candidate.close()

    def _project(self, span: Span, gradient: torch.Tensor) -> None:
        self._gradients.project(span, gradient, in_step=self._in_step)

    def _require_no_fault(self) -> None:
        """Raise on every rank what one has found; the next step begins anew. Collective."""
        try:
            self._gradients.require_no_fault(self.pods)
        finally:
            self._gradients.clear()

    def _write_or_return_to(self, before: torch.Tensor) -> None:
        """Write the weights after a step; where they are not finite, restore the coefficients `before` it and raise."""
        try:
            self._limits.require_coefficients(self._x)
            self._write(postpone=self.config.combine == "forward")
            self._limits.require_weights(self._x, self._spans)
        except RankError:  # writing again would wait for the same rank again
            raise
        except TwaError:
            with torch.no_grad():
                self._x.copy_(before)
            self._write()
            raise

    def _write(self, *, postpone: bool = False) -> None:
        """Write the weights that are shown now, or `postpone` what can be. Collective."""
        self._weights.write(self._u, postpone=postpone)

    def _u(self) -> torch.Tensor:
        """Return u, (n + 1, G), of the weights that are shown now."""
        shown = self._shown.now
        return self._basis.expand(self._x) if shown is None else self._basis.weights_of(shown)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copies("a TrainableAverage")

    def _chosen(self, which: Which) -> torch.Tensor:
        return averaging_coefficients(which, self._basis.center_weights, len(self.layout.groups))

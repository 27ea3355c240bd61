"""`TrainableAverage`, the average in a model: its steps, its weights and its state."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from twa_scale.average import batchnorm
from twa_scale.average.basis import Basis
from twa_scale.average.closing import while_open
from twa_scale.average.coefficients import Which, averaging_coefficients, name_for_ranks
from twa_scale.average.export import export
from twa_scale.average.gradients import Gradients
from twa_scale.average.measures import elements_of_groups
from twa_scale.average.optimizer import checked_lr, make_optimizer
from twa_scale.average.overflow import WeightLimits
from twa_scale.average.parts import Parts
from twa_scale.average.rows import RowCorrections
from twa_scale.average.same_on_ranks import SameOnRanks
from twa_scale.average.state import StateForm
from twa_scale.average.stateful import Stateful
from twa_scale.average.step import CoefficientStep
from twa_scale.average.step_optimizer import AverageOptimizer, refuse_copies, refuse_unpacking
from twa_scale.average.swap import SwappedWeights
from twa_scale.average.weights import Weights
from twa_scale.average.written import WrittenCoefficients
from twa_scale.base.clock import Clock
from twa_scale.base.notices import notice
from twa_scale.candidates.conversion import conversions
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.candidates.read_ahead import Progress
from twa_scale.candidates.rounding import Rounding
from twa_scale.errors import ConfigError, TwaError
from twa_scale.output.options import OutputOptions
from twa_scale.output.provenance import provenance
from twa_scale.ranks import require_same_settings


class TrainableAverage(Stateful):
    """A model whose weights are an average of candidates with trained coefficients. Made by `attach`.

    A backward pass adds up the inner products s of deltas and gradient, span by span. `step` sums s over the ranks,
    computes the gradient of the coefficients x, steps the optimizer, and writes w = (1 + u_c) c + sum_i u_i delta_i.
    """

    def __init__(
        self,
        parts: Parts,
        basis: Basis,
        rows: RowCorrections | None,
        fingerprint: Fingerprint,
        rounding: Rounding | None,
    ) -> None:
        config, engine, pods, layout, store = parts.config, parts.engine, parts.pods, parts.layout, parts.store
        self.rounding = rounding
        """The rounding errors of a packed store, of candidates and averages; None for other stores."""
        self.layout = layout
        self.fingerprint = fingerprint
        self.pods = pods
        self._reduction = parts.reduction
        self._engine = engine
        self._store = store
        self._basis = basis
        self._rows = rows
        self._candidates = parts.candidates
        self._carried = parts.carried
        self._form = StateForm(config, layout, basis, fingerprint, conversions(parts.candidates))
        groups_of = {layout.source(name): layout.groups_of(name) for name in layout.group_of}
        self.elements = elements_of_groups(len(layout.groups), groups_of, fingerprint.shapes)
        """The number of elements of each group."""
        self._spans = {span: layout.group(span) for span in engine.spans() if span.name in layout.group_of}
        self._x = nn.Parameter(self._located(config.start))
        self.clock = Clock(engine.device)
        sums = torch.zeros(store.coding.num_rows + 1, len(layout.groups), dtype=torch.float64, device=engine.device)
        clips = config.max_weight_grad_norm is not None
        gradients = Gradients(store, self._spans, rows, sums, self.clock, basis.needs_center, with_norm=clips)
        take_step = torch.compiler.disable(self._take_step)  # a compiled function may call step()
        self.optimizer = AverageOptimizer(make_optimizer(config, self._x), rows, self, take_step)
        """A torch optimizer for schedulers and trainers; its step is `step`."""
        self.closed = self._moved = False
        self._swapped = SwappedWeights(engine, pods, lambda: self._written.write(), gradients.set_fault)
        postpone = config.combine == "forward"
        self._weights = Weights(engine, store, self._spans, layout, self.clock, postpone=postpone)
        limits = WeightLimits(engine, self._weights, layout, basis, rows, pods)
        self._written = WrittenCoefficients(
            self._x, rows, basis, self._weights, limits, self._swapped, self._spans, postpone=postpone
        )
        self._same = SameOnRanks(pods, self._x, self.optimizer)
        self._step = CoefficientStep(
            parts, gradients, self._written, self._weights, self.optimizer, self._same, self.clock
        )
        self._written.write_first()
        engine.forget()
        engine.keeps_gradients = clips
        engine.watch(self._step.project)
        self._weights.watch()

    @property
    def lost(self) -> str:
        """The reason why the average can no longer be used, or an empty text."""
        return self._swapped.lost

    @property
    def updates(self) -> int:
        """The number of steps since `attach` that have changed the coefficients. Steps with an overflow do not."""
        return self._step.count

    @while_open
    def step(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Take one step of the optimizer on the coefficients, and write the new weights. Collective.

        Call it after one or more backward passes; it uses the sum of their gradients. `optimizer.step()` is the same
        step. With DeepSpeed, call it after each `engine.backward`, in place of `engine.step`: it updates the
        coefficients at the end of each gradient accumulation.

        Args:
            scaler: the scaler of the loss; call its `update` afterwards, as with any optimizer.

        Returns:
            Whether the coefficients changed. False within a gradient accumulation, and when a scaled gradient
            overflowed.

        Raises:
            TwaError: the gradient or the new weights are not finite, there was no backward pass since the last step,
                or the call is inside `weights`. Coefficients and weights are unchanged.
            EngineError: gradients of a rank are incomplete; raised on every rank. The gradients are discarded.
        """
        self.optimizer.step(grad_scaler=scaler)  # runs the hooks of the optimizer, and schedulers count the step
        return self._moved

    @while_open
    def _take_step(self, scaler: torch.amp.GradScaler | None) -> None:
        """Take the step of `step` and `optimizer.step`."""
        self._moved = False
        if self._swapped:
            raise TwaError("step() inside weights(): the gradient is not that of the trained weights; leave it first.")
        self._moved = self._step.take(scaler)

    @while_open
    def as_optimizer(self) -> AverageOptimizer:
        """Return `optimizer`, for trainers that take a torch optimizer.

        Its state dict has the coefficients and the moments. Loading it also writes the weights.
        """
        return self.optimizer

    @while_open
    def write_deferred(self) -> None:
        """Write the weights that a step has deferred to the next forward pass (`combine: forward`). Not collective.

        Call it before you read parameters directly. Forward passes, the methods of this class and `state_dict` of the
        module call it themselves.
        """
        self._weights.write_deferred()

    @while_open
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that backward passes have added since the last step.

        It does nothing within a gradient accumulation of the engine. The argument is that of torch's optimizers, and
        changes nothing.
        """
        self._step.clear()

    @while_open
    @contextmanager
    def weights(self, which: Which) -> Iterator[None]:
        """Put other weights into the model in a `with` block, then restore weights and buffers. Collective.

        Tensors that are not trained keep the value of the center, and buffers keep their value. In a model with
        BatchNorm, running statistics therefore do not belong to the weights that are shown, and a comparison favors the
        average to which they belong: by default, the mean. Call `recalibrate_batchnorm` first in each block whose
        results you compare, and before you evaluate the trained weights. The end of the block restores them.

        Args:
            which: "trained", "center", a value of the setting `center` ("mean", "ema:0.9", "last", the index of a
                candidate), or coefficients a of shape (n,) or (n, G) with any sum. The same on every rank.

        Raises:
            TwaError: a backward pass ran inside the block; its gradient is not that of the trained weights.
            RankError: another rank left the block with an error and did not reach its end. The weights are not
                restored, and the average can no longer be used. An error in the block is raised on every rank that
                reaches its end.
        """
        trained = isinstance(which, str) and which == "trained"
        with self._swapped.showing(which, lambda: None if trained else self._chosen(which)):
            yield

    @while_open
    def recalibrate_batchnorm(
        self, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] | None = None
    ) -> int:
        """Recompute the BatchNorm statistics of the current weights from `batches` of all ranks. Collective.

        All ranks stop when the first one has no batch left.

        Args:
            batches: tensors, dicts (passed by keyword), or sequences whose first item is the input.
            forward: runs one batch; by default, `module(input)`.

        Returns:
            The number of batches over all ranks. If it is 0, the statistics are unchanged.

        Raises:
            Exception: an error of `batches`, on every rank.
        """
        engine = self._engine
        self.write_deferred()
        count = batchnorm.recalibrate(engine.module, batches, self.pods, engine.device, forward)
        engine.publish(())
        return count

    @while_open
    def export(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
        format: str = "hf",
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the live weights to the directory `path`, in the form of the candidates. Collective.

        Args:
            path: a directory that is new or empty.
            dtype: of the floating point tensors; by default, the narrowest that holds the numbers of all candidates.
            max_shard_size: bytes of a file, or text such as "5GB" or "512MiB".
            format: "hf" (safetensors), "pt" (torch.save), "dcp" (torch.distributed.checkpoint) or "same" (the format of
                the last candidate, with the state of its training).
            overwrite: replaces an earlier output of twa_scale in `path`.
            progress: called on every rank that writes, with the bytes just written and the total.

        Raises:
            ConfigError, OutputError, TwaError: on every rank; `path` is unchanged.
        """
        self.write_deferred()
        self._same.require()
        with self.pods.agree():
            change = self._weights.change(self._written.current)
        is_exported = change is not None and change.is_live and self.pods.number == 0
        written_as = None if dtype is None else str(dtype).removeprefix("torch.")
        origin = self.origin(dtype=written_as)
        if changed := any(self.pods.gather(is_exported)):  # the coefficients do not describe these weights
            origin = provenance("those of a model that other code has changed since an average wrote them", ())
        export(
            self._engine,
            self.pods,
            self.layout,
            self._candidates,
            self._carried,
            path,
            OutputOptions(dtype=dtype, max_shard_size=max_shard_size, form=format, overwrite=overwrite),
            origin,
            progress,
        )
        if change:
            which = "as they are now, without coefficients" if changed else "that the average wrote"
            notice(f"{change.text} The export has the weights {which}.")
        if self._step.only_received and self.pods.rank == 0:
            notice(
                "backward passes have computed gradients, but no step was taken since attach, so the export is the "
                "average that attach wrote. Call twa.step() or twa.optimizer.step(); the steps of other optimizers do "
                "not train it."
            )

    @while_open
    def can_start_from(self, which: Which, *, exactly: bool = False) -> bool:
        """Return whether `start_from(which)` is possible: `simplex` needs a positive coefficient for every candidate.

        Args:
            which: as for `start_from`.
            exactly: whether the average itself is required, not the nearest point of the subspace of `pca`.

        Raises:
            ConfigError: as `weights` does.
        """
        a = self._chosen(which)
        return self._basis.represents(a) if exactly else self._basis.can_start_at(a)

    @while_open
    def start_from(self, which: Which) -> None:
        """Set the coefficients to an average that needs no training, and write its weights. Collective.

        The basis `pca` uses the nearest point of its subspace. The optimizer keeps its state, so call this before the
        first step.

        Args:
            which: as for `weights`, except "trained".

        Raises:
            ConfigError: the average is unknown or differs between ranks, or the basis cannot start from it; raised on
                every rank.
        """
        with self.pods.agree():
            if self._swapped:
                raise TwaError("start_from() inside weights(): leave it first.")
            if not self.can_start_from(which):
                raise ConfigError(f"start_from: basis {self.config.basis!r} cannot start from {which!r}.")
        require_same_settings(self.pods, {"start_from": name_for_ranks(which, self._chosen(which))})
        self._written.set(self._located(which))
        self.zero_grad()

    @while_open
    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coefficients, the same on every rank. Not collective.

        States and exports record it. Corrections of rows have a tenth of it, or `optimizer.row_lr`. Create a scheduler
        afterwards, because most schedulers copy the rate.

        Raises:
            ConfigError: `lr` is not a positive, finite number.
        """
        self._form.config = self.config.with_lr(checked_lr(lr, "set_lr"))
        for group, rate in zip(self.optimizer.param_groups, (self.config.lr, self.config.row_lr), strict=False):
            group |= {key: rate for key in ("lr", "initial_lr") if key in group}  # keys of earlier schedulers

    @while_open
    def together(self, failure: BaseException | None) -> BaseException | None:
        """Return the error that ended collective code of the user on this rank or another one. Collective.

        Raises:
            BaseException: `failure`, if another rank may still wait in a collective of that code.
        """
        return self._swapped.together(failure)

    def close(self) -> None:
        """Remove the hooks from the model and release the store and the candidates; the model keeps its weights.

        Without it, the hooks hold average and store as long as the process runs, because Python does not find cycles
        through hooks.

        A second call does nothing. Other methods raise TwaError after it.
        """
        if self.closed:
            return
        if self._swapped:
            raise TwaError("close() inside weights(): the model would keep those; leave it first.")
        try:
            if not self.lost:
                self.write_deferred()
        finally:  # also when the weights cannot be written
            self.closed = True
            self._engine.close()
            self._reduction.close()
            self._store.close()
            for candidate in self._candidates:
                candidate.close()

    def __iter__(self) -> NoReturn:
        refuse_unpacking()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copies("a TrainableAverage")

    def _located(self, which: Which) -> torch.Tensor:
        """Return the coefficients x of an average, with the same bits on all ranks. Collective."""
        return self.pods.broadcast(self._basis.locate(self._chosen(which)))

    def _chosen(self, which: Which) -> torch.Tensor:
        return averaging_coefficients(which, self._basis.center_weights, len(self.layout.groups))

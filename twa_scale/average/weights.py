"""Write the weights w = (1 + u_c) c + sum_i u_i delta_i into the live spans of a rank."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from twa_scale.average.layout import Layout
from twa_scale.average.model_changes import ModelChanges
from twa_scale.average.rows import RowCorrections
from twa_scale.average.weight_samples import WeightSamples
from twa_scale.base.clock import Clock
from twa_scale.base.notices import notice
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.engines.deferred_weights import Combine, DeferredWeights
from twa_scale.errors import EngineError
from twa_scale.kernels.torch.deltas import squared_norms
from twa_scale.store import Store

Chosen = tuple[torch.Tensor, RowCorrections | None]
"""The u of the weights to write, and the corrections of rows that are added to it."""


class Change(NamedTuple):
    """A parameter that other code has changed since the average wrote it."""

    text: str
    """A sentence that names the parameter."""
    is_live: bool
    """Whether `live` of the engine has the change, and therefore an export."""


class Weights:
    """The live weights, which are always computed from the center and the deltas, never from the previous weights.

    Args:
        engine: holds the model.
        store: holds the center and the deltas.
        groups: the index of the group of each trained span of this rank.
        layout: names the trained tensors, the same on every rank.
        clock: measures the time of `combine` and `publish`.
        postpone: whether the write of each unit of the engine can be deferred to its next use.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        groups: Mapping[Span, int],
        layout: Layout,
        clock: Clock,
        *,
        postpone: bool,
    ) -> None:
        self._engine = engine
        self._store = store
        self._groups = groups
        self._dtypes = {span: engine.live(span).dtype for span in groups}
        self._names = layout.group_of.keys()
        self._clock = clock
        self._deferred = DeferredWeights(engine.units() if postpone else [], groups, engine.device, clock)
        units = {span.name for unit in self._deferred.units for span in unit}
        self._other_names = [name for name in self._names if name not in units]
        self.write_deferred = self._deferred.write_all
        self._written: dict[str, object] = {}
        self._samples = WeightSamples(engine, groups)
        self._reported = False
        self._model = ModelChanges(engine.module, self._names)

    def watch(self) -> None:
        """Install the hooks that write deferred weights before the engine uses them."""
        if self._deferred.units:
            self._engine.before_use(self._deferred.prepare)

    def write(self, choose: Callable[[], Chosen], *, postpone: bool = False) -> None:
        """Write the weights of `choose()`. Collective.

        Args:
            choose: returns u, (n + 1, G) with u_c last, and the corrections of rows that are added to it.
            postpone: defer the units of the engine to their next use.
        """
        self._deferred.discard()

        def make() -> Combine:
            return self._combiner(choose)

        # Before the units: otherwise the current stream waits for the copies of all units from host memory.
        make()(self._deferred.rest if postpone else self._groups)
        if postpone:
            self._deferred.start(lambda: self._recording(make()))
        with self._clock.part("publish"), torch.no_grad():
            self._engine.publish(self._names)
        self._record_versions(self._other_names if postpone else self._names)
        if postpone and self._deferred.units:  # the weights are not there yet
            self._samples.clear()
        else:
            self._samples.record()

    def count_write(self) -> None:
        """Increase the version of all weights, which only torch's own kernels do.

        A backward pass through a graph from before the write is then an error, as after a step of an optimizer of
        torch.
        """
        for span in self._groups:
            torch.autograd.graph.increment_version(self._engine.live(span))

    def _record_versions(self, names: Collection[str]) -> None:
        """Record the versions of these parameters after a write; `check` compares them at the next step.

        The parameters of a deferred unit are recorded when it is written.
        """
        self._written |= self._engine.changed(names)

    def _recording(self, combine: Combine) -> Combine:
        def combine_and_record(spans: Collection[Span]) -> None:
            combine(spans)
            self._record_versions({span.name for span in spans})

        return combine_and_record

    def check(self) -> None:
        """Raise an error or report if the model has changed since attach, before a step overwrites the weights.

        Raises:
            EngineError: a parameter was replaced by another one, or frozen.
        """
        self._model.check()
        self._report(self._written_by_others())
        self._samples.compare(wait=False)

    def report_samples(self) -> None:
        """Report a change that `check` has found by the comparison that it has started on the device."""
        self._report(self._samples.changed())

    def _report(self, name: str | None) -> None:
        if name is not None and not self._reported:
            self._reported = True
            notice(
                f"{_written(name)} Each step of the average overwrites such changes. Load checkpoints before attach; "
                "use weights() to swap weights; continue a run with load_state_dict() of its average."
            )

    def change(self, choose: Callable[[], Chosen]) -> Change | None:
        """Return what other code has changed since `write(choose)`: a change that an export has, if there is one."""
        replaced = None
        try:
            may_differ = self._written_by_others() is not None
            if not may_differ:
                self._samples.compare(wait=True)
                may_differ = self._samples.changed() is not None
        except EngineError as error:
            replaced, may_differ = Change(str(error), is_live=False), True
        if may_differ and (name := self._differing(choose)) is not None:
            return Change(_written(name), is_live=True)
        if replaced:
            return replaced
        name = self._differing_copy()
        return None if name is None else Change(_written(name), is_live=False)

    @torch.no_grad()
    def _differing(self, choose: Callable[[], Chosen]) -> str | None:
        """Return a parameter whose values on this rank are not those of `choose()`."""
        write = self._writer(*choose())
        for span in self._groups:
            written = torch.empty(len(span), dtype=self._dtypes[span], device=self._engine.device)
            write(span, written)
            if not torch.equal(self._engine.live(span).to(written), written):  # other code may have moved the model
                return span.name
        return None

    @torch.no_grad()
    def _differing_copy(self) -> str | None:
        """Return a parameter whose low-precision copy on this rank has other values."""
        for span in self._groups:
            low = self._engine.low_precision(span)
            if low is not None and not torch.equal(low, self._engine.live(span).to(low.dtype)):
                return span.name
        return None

    def _written_by_others(self) -> str | None:
        """Return a parameter that other code has written since `write`, if there is one.

        Raises:
            EngineError: a parameter was replaced by another one.
        """
        current = self._engine.changed(self._names)
        for name, before in self._written.items():
            if current.get(name, before) != before:
                return name
        return None

    @torch.no_grad()
    def squared_distance(self, choose: Callable[[], Chosen]) -> torch.Tensor:
        """Return the squared norm of the weights of `choose()` minus the center on this rank's spans, float64."""
        u, rows = choose()
        difference = torch.cat([u[:-1], u[-1:] - 1])  # w - c = u_c c + sum_i u_i delta_i
        write = self._writer(difference, rows)
        total = torch.zeros(1, dtype=torch.float64, device=self._engine.device)
        for span in self._groups:
            out = torch.empty(len(span), dtype=torch.float32, device=self._engine.device)
            write(span, out)
            total += squared_norms(out[None])
        return total

    @torch.no_grad()
    def _combiner(self, choose: Callable[[], Chosen]) -> Combine:
        """Return a function that writes spans with the weights of the current u, and can be called later."""
        write = self._writer(*choose())

        @torch.no_grad()
        def combine(spans: Collection[Span]) -> None:
            with self._clock.part("combine"):
                for span in spans:
                    write(span, self._engine.live(span))

        return combine

    def _writer(self, u: torch.Tensor, rows: RowCorrections | None) -> Callable[[Span, torch.Tensor], None]:
        """Return a function that writes the weights of u, (n + 1, G), of a span into a tensor."""
        factors = self._store.coding.row_weights(u)
        scales = factors[-1].tolist()
        exact = to_device(factors[:-1].T.contiguous(), self._engine.device)
        columns = exact.to(torch.float32)

        def write(span: Span, out: torch.Tensor) -> None:
            group = self._groups[span]
            if rows is None or (part := rows.part(span)) is None:
                self._store.combine(span, columns[group], scales[group], out)
            else:
                self._store.combine(span, rows.weights(part, exact[group]), scales[group], out, part.segments)

        return write


def _written(name: str) -> str:
    return (
        f"parameter {name!r} was written since the average wrote it (load_state_dict, clamping, half(), `.data`, a "
        "swap of weights, nn.Embedding(max_norm=..))."
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a CPU tensor on `device`; the copy to a GPU is asynchronous, from page-locked memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

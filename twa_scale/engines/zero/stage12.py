"""ZeRO-1 and 2: every rank has the low-precision weights whole, and a part of their flat float32 copy."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from twa_scale.base.spans import Span
from twa_scale.engines.parameters import named_parameters, writes
from twa_scale.engines.private_attributes import require
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.engines.zero.base import NO_GRADIENT, ZeroEngine
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_BEFORE_THE_FIRST = -1  # DeepSpeed's number of micro-batches, less one, since the last step

_OPTIMIZER = (
    "bit16_groups",
    "bit16_groups_flat",
    "single_partition_of_fp32_groups",
    "partition_gradients",
    "averaged_gradients",
    "all_grad_tensors",
    "micro_step_id",
    "update_lp_params",
)


class Zero12Engine(ZeroEngine):
    """Parameters lie one after another in the flat memory of their optimizer group, of which a rank owns one part.

    Parameters that the optimizer was not given (frozen ones) are whole on every rank: their rows are split over the
    ranks, and gradients of those that are not frozen are averaged at the step.
    """

    def __init__(self, engine: Any, replica_group: Group) -> None:
        super().__init__(engine, replica_group)
        require("deepspeed", engine.optimizer, _OPTIMIZER)
        parameters, infos = named_parameters(engine)
        self._low = parameters
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._spans: dict[str, Span] = {}
        self._masters: dict[str, torch.Tensor] = {}
        self._starts: list[dict[int, Span]] = []
        for group in range(len(self._optimizer.bit16_groups)):
            self._starts.append(self._place(group, names))
        self.parameters = {
            name: replace(info, dtype=self._masters[name].dtype) if name in self._masters else info
            for name, info in infos.items()
        }
        rest = {name: parameter for name, parameter in parameters.items() if name not in self._spans}
        self._replicated = ReplicatedParameters(rest, self.shard_group)

    def _place(self, group: int, names: dict[int, str]) -> dict[int, Span]:
        """Find the spans of one optimizer group, and return them by where they start in this rank's partition."""
        optimizer = self._optimizer
        flat, master = optimizer.bit16_groups_flat[group], optimizer.single_partition_of_fp32_groups[group].detach()
        first = self.shard_group.rank * len(master)
        starts = {}
        for parameter in optimizer.bit16_groups[group]:
            # Told by the memory itself: padding and round_robin_gradients move parameters about.
            offset = parameter.storage_offset() - flat.storage_offset()
            start = min(max(first - offset, 0), parameter.numel())
            stop = min(max(first + len(master) - offset, 0), parameter.numel())
            span = Span(names[id(parameter)], start, max(start, stop))
            place = offset + start - first
            self._spans[span.name] = span
            self._masters[span.name] = master[place : place + len(span)] if len(span) else master[:0]
            if len(span):
                starts[place] = span
        return starts

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter, often none."""
        return [*self._spans.values(), *self._replicated.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the float32 weights that this rank owns."""
        if span.name not in self._spans:
            return self._replicated.live(span)
        offset = self._spans[span.name].start
        return self._masters[span.name][span.start - offset : span.stop - offset]

    @torch.no_grad()
    def publish(self, names: Collection[str]) -> None:
        """Round what was written into the low-precision weights, and all-gather those as `engine.step` does."""
        if not self._spans.keys().isdisjoint(names):
            self._optimizer.update_lp_params()
        self._replicated.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of this rank's float32 weights, and of the low-precision ones."""
        masters = {name: (writes(m), writes(self._low[name])) for name, m in self._masters.items() if name in names}
        return masters | self._replicated.changed(names)

    def drain(self) -> None:
        """Hand over this rank's part of the averaged gradients.

        Raises:
            EngineError: no backward pass, or more of them than DeepSpeed has accumulated.
        """
        assert self._consume is not None
        self._replicated.consume(self._consume, averaged=False)  # collective: before what may fail on one rank
        optimizer = self._optimizer
        passes = optimizer.micro_step_id - _BEFORE_THE_FIRST
        declared = self._engine.gradient_accumulation_steps()
        if passes > declared:
            raise EngineError(
                f"{passes} backward passes since the last step, but gradient_accumulation_steps is {declared}: "
                f"ZeRO-{1 + optimizer.partition_gradients} keeps only the last. Call twa.step() after each "
                "engine.backward(), and set gradient_accumulation_steps for more."
            )
        groups = [optimizer.averaged_gradients.get(group) for group in range(len(self._starts))]
        if any(pieces is None for pieces in groups):
            raise EngineError(NO_GRADIENT)
        for starts, pieces in zip(self._starts, groups, strict=True):
            place = 0
            for piece in pieces:  # in the order of the partition; some are padding
                if (span := starts.get(place)) is not None:
                    self._consume(span, piece.reshape(-1)[: len(span)])
                place += piece.numel()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients, as `engine.step` does after an overflow."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = _BEFORE_THE_FIRST
        for group in range(len(self._starts)):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        self._replicated.forget()

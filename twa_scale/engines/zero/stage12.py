"""ZeRO-1 and 2: every rank holds all low-precision weights, and a partition of their flat float32 copy."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from twa_scale.base.spans import Span
from twa_scale.engines.parameters import flat_view, memory_version, named_parameters
from twa_scale.engines.private_attributes import require
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.engines.zero.base import NO_GRADIENT, ZeroEngine
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_NO_MICRO_STEP = -1  # DeepSpeed's `micro_step_id` before the first micro-batch of a step

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
    """An engine for ZeRO-1 and 2. The parameters of an optimizer group share flat memory, and a rank owns a part of it.

    Parameters that the optimizer does not hold (frozen ones) are whole on every rank. Their rows are split over the
    ranks, and gradients of those that require one are averaged at the step.
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
            self._starts.append(self._add_spans(group, names))
        self.parameters = {
            name: replace(info, dtype=self._masters[name].dtype) if name in self._masters else info
            for name, info in infos.items()
        }
        rest = {name: parameter for name, parameter in parameters.items() if name not in self._spans}
        self._replicated = ReplicatedParameters(rest, self.shard_group)

    def _add_spans(self, group: int, names: dict[int, str]) -> dict[int, Span]:
        """Record the spans of one optimizer group, and return them by their start in this rank's partition."""
        optimizer = self._optimizer
        flat, master = optimizer.bit16_groups_flat[group], optimizer.single_partition_of_fp32_groups[group].detach()
        first = self.shard_group.rank * len(master)
        starts = {}
        for parameter in optimizer.bit16_groups[group]:
            # The offset comes from the memory because padding and round_robin_gradients move parameters.
            offset = parameter.storage_offset() - flat.storage_offset()
            start = min(max(first - offset, 0), parameter.numel())
            stop = min(max(first + len(master) - offset, 0), parameter.numel())
            span = Span(names[id(parameter)], start, max(start, stop))
            position = offset + start - first
            self._spans[span.name] = span
            self._masters[span.name] = master[position : position + len(span)] if len(span) else master[:0]
            if len(span):
                starts[position] = span
        return starts

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter, many of them empty."""
        return [*self._spans.values(), *self._replicated.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the float32 weights that this rank owns."""
        if span.name not in self._spans:
            return self._replicated.live(span)
        offset = self._spans[span.name].start
        return self._masters[span.name][span.start - offset : span.stop - offset]

    def low_precision(self, span: Span) -> torch.Tensor | None:
        """Return this rank's part of the low-precision weights."""
        if span.name not in self._spans:
            return None
        return flat_view(span.name, self._low[span.name], self.parameters[span.name].shape)[span.start : span.stop]

    @torch.no_grad()
    def publish(self, names: Collection[str]) -> None:
        """Round the float32 weights to the low-precision ones, and all-gather these, as `engine.step` does."""
        if not self._spans.keys().isdisjoint(names):
            self._optimizer.update_lp_params()
        self._replicated.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of this rank's float32 weights, and of the low-precision ones."""
        masters = {
            name: (memory_version(m), memory_version(self._low[name]))
            for name, m in self._masters.items()
            if name in names
        }
        return masters | self._replicated.changed(names)

    def drain(self) -> None:
        """Pass on this rank's part of the averaged gradients.

        Raises:
            EngineError: there was no backward pass, or there were more than DeepSpeed accumulates.
        """
        assert self._consume is not None
        # Collective, so before code that can fail on one rank.
        self._replicated.consume(self._consume, [self.shard_group])
        optimizer = self._optimizer
        passes = optimizer.micro_step_id - _NO_MICRO_STEP
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
            position = 0
            for piece in pieces:  # in the order of the partition, with padding
                if (span := starts.get(position)) is not None:
                    self._consume(span, piece.reshape(-1)[: len(span)])
                position += piece.numel()
        self.forget()

    def forget(self) -> None:
        """Drop the pending gradients, as `engine.step` does after an overflow."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = _NO_MICRO_STEP
        for group in range(len(self._starts)):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        self._replicated.forget()

"""ZeRO-3: each rank holds an equal part of every flattened parameter; the last parts are padded."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from twa_scale.base.spans import Span
from twa_scale.engines.parameters import memory_version, named_parameters
from twa_scale.engines.private_attributes import require
from twa_scale.engines.zero.base import NO_GRADIENT, ZeroEngine
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_OPTIMIZER = (
    "fp16_groups",
    "averaged_gradients",
    "grad_partitions_flat_buffer",
    "ipg_buckets",
    "parameter_offload",
    "get_local_fp32_param",
    "get_local_fp32_grad_for_param",
)
_OFFLOAD = ("partition_all_parameters", "persistent_parameters")
_PARAMETER = ("ds_tensor", "ds_numel", "ds_shape")


class Zero3Engine(ZeroEngine):
    """An engine for ZeRO-3. Trained parameters have a float32 and a low-precision partition, frozen ones the latter.

    The engine never reads `parameter.shape`, which is empty for a partitioned parameter. Small (persistent) parameters
    stay whole in memory, but also have a partition, which the engine uses.
    """

    def __init__(self, engine: Any, replica_group: Group) -> None:
        super().__init__(engine, replica_group)
        self._parameters, infos = named_parameters(engine)
        require("deepspeed", engine.optimizer, _OPTIMIZER)
        require("deepspeed", engine.optimizer.parameter_offload, _OFFLOAD)
        for parameter in self._parameters.values():
            require("deepspeed", parameter, _PARAMETER)
        optimized = {id(parameter) for group in self._optimizer.fp16_groups for parameter in group}
        self._trained: dict[str, Any] = {}
        self._live: dict[str, torch.Tensor] = {}
        self._spans: dict[str, Span] = {}
        self.parameters = {}
        for name, parameter in self._parameters.items():
            raw: Any = parameter
            span = self._span_of(name, raw)
            local = raw.ds_tensor
            if id(parameter) in optimized:
                self._trained[name] = raw
                local = self._optimizer.get_local_fp32_param(raw)
            elif raw.requires_grad and raw.ds_numel:
                raise EngineError(
                    f"parameter {name!r} requires a gradient, but DeepSpeed's optimizer does not hold it; give the "
                    "optimizer all parameters, or freeze this one."
                )
            self._spans[name] = span
            self._live[name] = local.detach().view(-1)[: len(span)]  # without padding
            self.parameters[name] = replace(infos[name], shape=tuple(raw.ds_shape), dtype=local.dtype)

    def _span_of(self, name: str, parameter: Any) -> Span:
        part = parameter.ds_tensor.ds_numel
        start = min(self.shard_group.rank * part, parameter.ds_numel)
        return Span(name, start, min(start + part, parameter.ds_numel))

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter; parts of small parameters are empty on the last ranks."""
        return list(self._spans.values())

    def live(self, span: Span) -> torch.Tensor:
        """Return the partition that this rank owns, in float32 if the parameter is trained."""
        offset = self._spans[span.name].start
        return self._live[span.name][span.start - offset : span.stop - offset]

    def low_precision(self, span: Span) -> torch.Tensor | None:
        """Return the low-precision partition that this rank owns."""
        if span.name not in self._trained:
            return None
        offset = self._spans[span.name].start
        return self._low(span.name)[span.start - offset : span.stop - offset]

    def _low(self, name: str) -> torch.Tensor:
        low: torch.Tensor = self._trained[name].ds_tensor.detach().view(-1)
        return low[: len(self._spans[name])]

    @torch.no_grad()
    def publish(self, names: Collection[str]) -> None:
        """Round the float32 partitions to the low-precision ones, and gather persistent parameters again.

        Parameters that a forward pass left gathered are partitioned, so that the next one gathers the new weights.
        """
        for name in self._trained:
            if name in names:
                self._low(name).copy_(self._live[name])
        offload = self._optimizer.parameter_offload
        offload.partition_all_parameters()
        if offload.persistent_parameters:
            offload.persistent_parameters[0].all_gather(offload.persistent_parameters)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of this rank's float32 partitions. DeepSpeed itself writes the others."""
        return {name: memory_version(self._live[name]) for name in self._trained if name in names}

    def drain(self) -> None:
        """Pass on this rank's part of the averaged gradients.

        Raises:
            EngineError: there was no backward pass.
        """
        assert self._consume is not None
        if not any(self._optimizer.averaged_gradients.values()):
            raise EngineError(NO_GRADIENT)
        for name, parameter in self._trained.items():
            span = self._spans[name]
            if len(span):
                self._consume(span, self._optimizer.get_local_fp32_grad_for_param(parameter)[: len(span)])
        self.forget()

    def forget(self) -> None:
        """Drop the pending gradients. DeepSpeed keeps the gradient of a parameter that the next loss does not reach."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.averaged_gradients = {}
        optimizer.grad_partitions_flat_buffer.zero_()
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()

"""FSDP2 (`fully_shard`) and tensor parallelism: each rank holds a part of every parameter, as a DTensor."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from twa_scale.base.spans import Span
from twa_scale.engines.dtensor_spans import Axis, Grid
from twa_scale.engines.engine import Consume, Engine, calling
from twa_scale.engines.fsdp2_units import SettlingUnshard, parameter_groups, require_own_unshard, settling
from twa_scale.engines.parameters import TWICE, flat, named_parameters, persistent_buffers, writes
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


class FSDP2Engine(Engine):
    """Gradients are taken in post-accumulate hooks, which FSDP2 calls when the local rows are reduced.

    A parameter that some ranks of the shard group have the same part of, as tensor parallelism leaves norms, has one
    owner for each of its elements: those ranks split their common part, and gather it when they have written.
    Parameters that FSDP2 was told to ignore are whole on every rank and nobody averages their gradients: their rows
    of the basis are split over the ranks, and their gradients averaged at the step.
    """

    def __init__(self, module: nn.Module, replica_group: Group | None = None) -> None:
        self.module = module
        self._wrapped = [child for child in module.modules() if isinstance(child, FSDPModule)]
        self._groups = parameter_groups(self._wrapped)
        for group in self._groups:
            if average := settling(group):  # whose model this is, and whose weights are looked at, as by Snapshots
                average.settle()
        self._reshard()  # after a forward pass the root may hold whole parameters in place of its shards
        parameters, self.parameters = named_parameters(module)
        self._sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
        grid = Grid(self._sharded)
        self.shard_group = grid.shard_group
        self.replica_group = _only_one(grid.replica_group, replica_group)
        self.averages_replicas = grid.replica_group.size > 1
        self._owned: dict[str, tuple[Span, int, int]] = {}  # the span, and where it lies in the local part
        self._repeated: list[ReplicatedParameters] = []
        with self.shard_group.agree():
            self._local = {name: flat(name, p.to_local()) for name, p in self._sharded.items()}
            spans = {name: grid.span(name, p) for name, p in self._sharded.items()}
        self._own(grid, spans)
        whole = {name: p for name, p in parameters.items() if name not in self._sharded}
        self._whole = ReplicatedParameters(whole, self.shard_group)
        self.device = next(iter(self._local.values())).device
        self._consume: Consume | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle | SettlingUnshard] = []

    def _own(self, grid: Grid, spans: dict[str, Span]) -> None:
        """Split what several ranks hold alike, so that over the shard group the spans tile every parameter once."""
        alike: dict[tuple[Axis, ...], list[str]] = {}
        for name in spans:
            alike.setdefault(grid.repeating(name), []).append(name)
        for axes, names in alike.items():
            units = {name: max(1, spans[name].run) for name in names}
            split = ReplicatedParameters({name: self._local[name] for name in names}, grid.group(axes), units)
            if axes:
                self._repeated.append(split)
            for part in split.spans():
                span = spans[part.name].part(part.start, part.stop)
                self._owned[part.name] = span, part.start, part.stop

    def _reshard(self) -> None:
        for child in self._wrapped:
            child.reshard()

    def spans(self) -> list[Span]:
        """Return the part of every parameter that this rank owns, some of them empty."""
        return [*(self._owned[name][0] for name in self._sharded), *self._whole.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of the local shard."""
        if span.name not in self._owned:
            return self._whole.live(span)
        _, start, stop = self._owned[span.name]
        return self._local[span.name][start:stop]

    def publish(self, names: Collection[str]) -> None:
        """Gather what several ranks hold alike; drop whole parameters, so that the next forward gathers anew."""
        self._reshard()
        for repeated in (*self._repeated, self._whole):
            repeated.publish(names)

    def sharded(self, span: Span, values: torch.Tensor) -> torch.Tensor | None:
        """Return values of a whole local shard as a DTensor like the parameter."""
        if span.name not in self._owned:
            return None
        parameter = self._sharded[span.name]
        with torch.no_grad():
            local = parameter.to_local()
        if len(values) != local.numel():
            return None
        return DTensor.from_local(
            values.view(local.shape),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def units(self) -> list[list[Span]]:
        """Return what each group of FSDP2 gathers, without parameters that `publish` has to gather first.

        Raises:
            EngineError: tensor parallelism without FSDP2, or groups that do not let us know.
        """
        if not self._groups:
            return super().units()
        require_own_unshard(self._groups)
        names = {id(p): name for name, p in self._sharded.items() if not any(name in r for r in self._repeated)}
        held = [[names.get(id(p.sharded_param)) for p in group.fsdp_params] for group in self._groups]
        return [[self._owned[name][0] for name in unit if name is not None] for unit in held]

    def before_use(self, settle: Callable[[int], torch.cuda.Event | None]) -> None:
        """Settle a unit before FSDP2 gathers it, and before its state dict is read or loaded."""
        self._hooks += [
            SettlingUnshard(group, self.module, partial(settle, unit)) for unit, group in enumerate(self._groups)
        ]

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of each local part, and of each whole parameter.

        FSDP2 puts gathered parameters in the place of its own during a forward pass, so only their memory is compared.
        """
        with torch.no_grad():
            held = {name: self._sharded[name].to_local() for name in names if name in self._sharded}
        return {name: writes(local) for name, local in held.items()} | self._whole.changed(names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which FSDP2 does not shard."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Consume the local rows of each gradient right after their reduce-scatter."""
        self._consume = consume
        if self.keeps_gradients:
            return
        for name, parameter in self._sharded.items():
            if self.parameters[name].trainable and not self._offloaded(name):
                hook = partial(self._take, name=name)
                handle = cast(torch.Tensor, parameter).register_post_accumulate_grad_hook(hook)
                self._hooks.append(handle)

    def _offloaded(self, name: str) -> bool:
        """Whether FSDP2 copies this gradient to the CPU: the copy may still be under way in a hook."""
        return self._local[name].device.type != self._sharded[name].device_mesh.device_type

    def _take(self, parameter: DTensor, name: str) -> None:
        gradient = parameter.grad
        if gradient is None:
            raise EngineError(TWICE)
        assert self._consume is not None and isinstance(gradient, DTensor)
        if gradient.placements != parameter.placements:  # partial sums, without FSDP2 to add them up
            gradient = gradient.redistribute(placements=parameter.placements)
        span, start, stop = self._owned[name]
        self._consume(span, gradient.to_local().reshape(-1)[start:stop])
        parameter.grad = None

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that reaches a parameter: when FSDP2 has reduced it, if it is sharded.

        Without synchronization it does not; then when the gradient is added to the one that FSDP2 keeps.
        """
        gathered = [getattr(p, "_unsharded_param", None) for group in self._groups for p in group.fsdp_params]
        sharded = [p for p in (*self._sharded.values(), *gathered) if p is not None and p.requires_grad]
        whole = [p for p in self._whole.parameters() if p.requires_grad]
        return calling(call, whole) + [
            cast(torch.Tensor, p).register_post_accumulate_grad_hook(lambda _: call()) for p in sharded
        ]

    def drain(self) -> None:
        """Average and hand over the gradients of ignored parameters; the hooks have consumed all others.

        Raises:
            EngineError: gradients that FSDP2 still keeps unreduced.
        """
        assert self._consume is not None
        # Collective, and so before what may fail on one rank. Without FSDP2 these parameters take part in the same
        # computation on every rank, and have the same gradient.
        self._whole.consume(self._consume, averaged=not self._wrapped)
        if next(self._unreduced(), None) is not None:
            raise EngineError(
                "FSDP2 keeps gradients that it has not reduced: call set_requires_gradient_sync(True), and "
                "set_requires_all_reduce(True) with HSDP, before the last backward pass of a step."
            )
        for name, parameter in self._sharded.items():
            if parameter.grad is not None:
                self._take(parameter, name)

    def forget(self) -> None:
        """Drop the gradients, also those that FSDP2 keeps unreduced."""
        self._whole.forget()
        for parameter in self._sharded.values():
            parameter.grad = None
        for holder, attribute in list(self._unreduced()):
            setattr(holder, attribute, None)

    def _unreduced(self) -> Iterator[tuple[Any, str]]:
        """Yield where FSDP2 keeps gradients between backward passes: (object, attribute). No public way leads there."""
        for group in self._groups:
            held = [(group, "_partial_reduce_output")]
            for p in group.fsdp_params:
                held += [(p, "unsharded_accumulated_grad"), (getattr(p, "_unsharded_param", None), "grad")]
            yield from (where for where in held if getattr(*where, None) is not None)

    def close(self) -> None:
        """Remove the hooks."""
        self._consume = None
        while self._hooks:
            self._hooks.pop().remove()


def _only_one(own: Group, given: Group | None) -> Group:
    if own.size > 1 and given is not None:
        raise EngineError(
            "replica_group: the model's mesh has replicas of its own (HSDP), over which FSDP2 averages gradients; "
            "leave replica_group out, or shard each pod on a 1-D mesh."
        )
    return given or own

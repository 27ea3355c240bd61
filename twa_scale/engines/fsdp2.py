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
from twa_scale.engines.dtensor_spans import Axis, MeshLayout, like_parameter
from twa_scale.engines.engine import Consume, Engine, register_gradient_hooks
from twa_scale.engines.fsdp2_units import (
    GATHERED,
    PreparingUnshard,
    installed_unshard,
    keep_memory_of_shards,
    parameter_groups,
    require_replaceable_unshard,
)
from twa_scale.engines.parameters import (
    GRADIENT_TAKEN,
    ParameterLocations,
    flat_view,
    memory_version,
    named_parameters,
    number_of_writes,
    parameter_locations,
    persistent_buffers,
    require_same_parameters,
    was_replaced,
)
from twa_scale.engines.projected_gradients import ProjectedGradients
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


class FSDP2Engine(Engine):
    """An engine for FSDP2 and tensor parallelism. It reads gradients in post-accumulate hooks, after the reduction.

    Some ranks of a shard group can hold the same part of a parameter, for example a norm under tensor parallelism.
    These ranks split the common part and gather it after each write, so each element has one owner. Parameters that
    FSDP2 ignores are whole on every rank, and FSDP2 does not average their gradients. Their rows of the basis are
    split over the ranks, and their gradients are averaged at the step.
    """

    def __init__(self, module: nn.Module, replica_group: Group | None = None) -> None:
        self.module = module
        self._wrapped = [child for child in module.modules() if isinstance(child, FSDPModule)]
        self._groups = parameter_groups(self._wrapped)
        for group in self._groups:
            if unshard := installed_unshard(group):  # another engine (Snapshots) reads the weights of an average
                unshard.prepare()
        self._reshard()  # after a forward pass the root module may hold unsharded parameters
        keep_memory_of_shards(self._groups)
        parameters, self.parameters = named_parameters(module)
        by_owner: dict[int, ParameterLocations] = {}
        for location in parameter_locations(module):
            by_owner.setdefault(id(location[3]), []).append(location)
        self._locations = {name: by_owner[id(parameter)] for name, parameter in parameters.items()}
        self._sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
        mesh = MeshLayout(self._sharded)
        self.shard_group = mesh.shard_group
        self.replica_group = _one_replica_group(mesh.replica_group, replica_group)
        self.averages_replicas = mesh.replica_group.size > 1
        self._owned: dict[str, tuple[Span, int, int]] = {}  # the span, and its start and stop in the local part
        self._replicated: list[ReplicatedParameters] = []
        with self.shard_group.agree():
            local = {name: p.to_local() for name, p in self._sharded.items()}
            self._local = {name: flat_view(name, part, part.shape) for name, part in local.items()}
            spans = {name: mesh.span(name, p) for name, p in self._sharded.items()}
        self._assign_owners(mesh, spans)
        replicated = {name: p for name, p in parameters.items() if name not in self._sharded}
        self._unsharded = ReplicatedParameters(replicated, self.shard_group)
        self.device = next(iter(self._local.values())).device
        self._consume: Consume | None = None
        first = self.shard_group.rank == 0 and self.replica_group.rank == 0
        self._projected = ProjectedGradients(warns=first)
        self._hooks: list[torch.utils.hooks.RemovableHandle | PreparingUnshard] = []

    def _assign_owners(self, mesh: MeshLayout, spans: dict[str, Span]) -> None:
        """Split parts that several ranks hold, so that over the shard group the spans cover every parameter once."""
        names_of: dict[tuple[Axis, ...], list[str]] = {}
        for name in spans:
            names_of.setdefault(mesh.replicating_axes(name), []).append(name)
        for axes, names in names_of.items():
            units = {name: max(1, spans[name].run) for name in names}
            split = ReplicatedParameters({name: self._local[name] for name in names}, mesh.group(axes), units)
            if axes:
                self._replicated.append(split)
            for part in split.spans():
                span = spans[part.name].part(part.start, part.stop)
                self._owned[part.name] = span, part.start, part.stop

    def _reshard(self) -> None:
        for child in self._wrapped:
            child.reshard()

    def spans(self) -> list[Span]:
        """Return the part of every parameter that this rank owns, some of them empty."""
        return [*(self._owned[name][0] for name in self._sharded), *self._unsharded.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of the local shard."""
        if span.name not in self._owned:
            return self._unsharded.live(span)
        _, start, stop = self._owned[span.name]
        return self._local[span.name][start:stop]

    def publish(self, names: Collection[str]) -> None:
        """Gather the parts that several ranks hold, and reshard, so that the next forward pass gathers again."""
        self._reshard()
        for replicated in (*self._replicated, self._unsharded):
            replicated.publish(names)

    def sharded(self, span: Span, values: torch.Tensor) -> torch.Tensor | None:
        """Return values of a whole local shard as a DTensor with the placement of the parameter."""
        if span.name not in self._owned:
            return None
        parameter = self._sharded[span.name]
        with torch.no_grad():
            local = parameter.to_local()
        if len(values) != local.numel():
            return None
        return like_parameter(parameter, values.view(local.shape))

    def units(self) -> list[list[Span]]:
        """Return the spans of each parameter group of FSDP2, without parameters that `publish` has to gather.

        Raises:
            EngineError: tensor parallelism without FSDP2, or groups whose `unshard` cannot be replaced.
        """
        if not self._groups:
            return super().units()
        require_replaceable_unshard(self._groups)
        names = {id(p): name for name, p in self._sharded.items() if not any(name in r for r in self._replicated)}
        unit_names = [[names.get(id(p.sharded_param)) for p in group.fsdp_params] for group in self._groups]
        return [[self._owned[name][0] for name in unit if name is not None] for unit in unit_names]

    def before_use(self, prepare: Callable[[int], torch.cuda.Event | None]) -> None:
        """Call `prepare` before FSDP2 gathers a unit, and before its state dict is read or loaded."""
        self._hooks += [
            PreparingUnshard(group, self.module, partial(prepare, unit)) for unit, group in enumerate(self._groups)
        ]

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of each local part and of each unsharded parameter.

        Raises:
            EngineError: a parameter or its memory was replaced by another.
        """
        require_same_parameters([location for name in names for location in self._locations[name]], self._gathered)
        with torch.no_grad():
            shards = {name: self._sharded[name].to_local() for name in names if name in self._sharded}
        for name, local in shards.items():
            if (local.data_ptr(), local.dtype) != (self._local[name].data_ptr(), self._local[name].dtype):
                raise was_replaced(name)
        # With torch 2.6 `load_state_dict` counts as a write to the DTensor only, not to its local part.
        versions = {
            name: (memory_version(local), number_of_writes(self._sharded[name])) for name, local in shards.items()
        }
        return versions | self._unsharded.changed(names)

    def _gathered(self) -> set[int]:
        """Return the ids of the parameters with which FSDP2 replaces its own from forward to backward."""
        tensors = (getattr(p, name, None) for group in self._groups for p in group.fsdp_params for name in GATHERED)
        return {id(p) for p in tensors if p is not None}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which FSDP2 does not shard."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Pass on the local rows of each gradient in a hook after their reduce-scatter."""
        self._consume = consume
        if self.keeps_gradients:
            return
        take = torch.compiler.disable(self._take_and_mark)  # as in `PlainEngine`
        for name, parameter in self._sharded.items():
            if self.parameters[name].trainable and not self._offloaded(name):
                tensor = cast(torch.Tensor, parameter)
                self._hooks += [
                    self._projected.register(name, tensor),
                    tensor.register_post_accumulate_grad_hook(partial(take, name=name)),
                ]

    def _take_and_mark(self, parameter: DTensor, name: str) -> None:
        self._pass_on(name, self._placed(parameter))
        self._projected.add(name, parameter)

    def _offloaded(self, name: str) -> bool:
        """Whether FSDP2 copies this gradient to the CPU. The copy may not have ended when a hook runs."""
        return self._local[name].device.type != self._sharded[name].device_mesh.device_type

    def _placed(self, parameter: DTensor) -> DTensor:
        """Return the gradient with the placements of the parameter. Without FSDP2 it may hold partial sums."""
        gradient = parameter.grad
        if gradient is None or self._projected.is_mark(gradient):
            raise EngineError(GRADIENT_TAKEN)
        assert isinstance(gradient, DTensor)
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        return gradient

    def _pass_on(self, name: str, gradient: DTensor) -> None:
        assert self._consume is not None
        span, start, stop = self._owned[name]
        self._consume(span, gradient.to_local().reshape(-1)[start:stop])

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that computes a gradient of a parameter.

        For a sharded parameter, the hook runs after the reduction. Without gradient synchronization it runs when the
        gradient is accumulated in the unsharded parameter.
        """
        gathered = [getattr(p, "_unsharded_param", None) for group in self._groups for p in group.fsdp_params]
        sharded = [p for p in (*self._sharded.values(), *gathered) if p is not None and p.requires_grad]
        replicated = [p for p in self._unsharded.parameters() if p.requires_grad]
        return register_gradient_hooks(call, replicated) + [
            cast(torch.Tensor, p).register_post_accumulate_grad_hook(lambda _: call()) for p in sharded
        ]

    def drain(self) -> None:
        """Average and pass on the gradients of ignored parameters. The hooks have passed on most of the others.

        Raises:
            EngineError: FSDP2 still holds unreduced gradients.
        """
        assert self._consume is not None
        # Collective, so before code that can fail on one rank. Without FSDP2 every rank computes the same gradient of
        # these parameters.
        self._unsharded.consume(self._consume, self._averaging_groups() if self._wrapped else [])
        if next(self._unreduced(), None) is not None:
            raise EngineError(
                "FSDP2 holds gradients that it has not reduced; call set_requires_gradient_sync(True), and "
                "set_requires_all_reduce(True) with HSDP, before the last backward pass of a step."
            )
        self._projected.finish()
        left = {name: p for name, p in self._sharded.items() if p.grad is not None}
        gradients = {name: self._placed(parameter) for name, parameter in left.items()}  # collective
        for name, parameter in left.items():
            self._pass_on(name, gradients[name])
            parameter.grad = None

    def forget(self) -> None:
        """Drop the pending gradients, including those that FSDP2 has not reduced."""
        self._projected.remove()
        self._unsharded.forget()
        for parameter in self._sharded.values():
            parameter.grad = None
        for holder, attribute in list(self._unreduced()):
            setattr(holder, attribute, None)

    def _unreduced(self) -> Iterator[tuple[Any, str]]:
        """Yield (object, attribute) of each unreduced gradient that FSDP2 holds between backward passes."""
        for group in self._groups:
            attributes = [(group, "_partial_reduce_output")]
            for p in group.fsdp_params:
                attributes += [(p, "unsharded_accumulated_grad"), (getattr(p, "_unsharded_param", None), "grad")]
            yield from ((holder, name) for holder, name in attributes if getattr(holder, name, None) is not None)

    def close(self) -> None:
        """Remove the hooks and the marks."""
        self._consume = None
        self._projected.remove()
        while self._hooks:
            self._hooks.pop().remove()


def _one_replica_group(mesh_group: Group, replica_group: Group | None) -> Group:
    if mesh_group.size > 1 and replica_group is not None:
        raise EngineError(
            "replica_group: the model's mesh has its own replicas (HSDP), over which FSDP2 averages gradients; "
            "leave replica_group out, or shard each pod on a 1-D mesh."
        )
    return replica_group or mesh_group

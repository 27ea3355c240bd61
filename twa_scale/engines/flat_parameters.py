"""Flat parameters: several tensors concatenated into one vector that is split evenly over the ranks.

FSDP1 and fairscale use them. The part of a rank can begin and end at any element of any tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from twa_scale.base.spans import Span, share
from twa_scale.engines.engine import Consume, Engine, ParameterInfo, register_gradient_hooks
from twa_scale.engines.parameters import by_first_name, mark_attached, persistent_buffers, unmark_attached
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


@dataclass(eq=False)
class Member:
    """One tensor of a flat parameter. It begins at element `offset` of the flat parameter."""

    unit: "FlatUnit"
    offset: int
    shape: tuple[int, ...]
    trainable: bool


class FlatUnit(ABC):
    """One flat parameter. Subclasses access the attributes of their library."""

    group: Group
    """The ranks that together hold the flat parameter once."""
    whole: bool
    """Whether every rank holds the whole flat parameter, so that only the basis is split."""
    members: dict[tuple[int, str], Member]
    """The members by module id and parameter name. Tied parameters have one member."""

    @abstractmethod
    def local(self) -> torch.Tensor:
        """Return the memory of this rank (1-D): its part with padding, or the whole vector if `whole`."""

    @abstractmethod
    def gradient(self) -> torch.Tensor | None:
        """Return the gradient of `local`, averaged over the group.

        Raises:
            EngineError: the gradient is not reduced yet.
        """

    @abstractmethod
    def leaf(self) -> torch.Tensor:
        """Return the autograd leaf that accumulates the gradient."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the gradient."""

    @abstractmethod
    def reshard(self) -> None:
        """Free the gathered weights, so that the next forward pass gathers them again."""

    def watch(self) -> None:  # noqa: B027  optional
        """Start recording which gradients are reduced, if their shape does not show it."""

    def close(self) -> None:  # noqa: B027
        """Remove the hooks of `watch`."""

    def span(self, name: str, member: Member) -> Span:
        """Return the part of a member that this rank owns."""
        numel, length = prod(member.shape), len(self.local())
        start, stop = (
            share(length, self.group.rank, self.group.size) if self.whole else (self._first, self._first + length)
        )
        start, stop = (min(max(bound - member.offset, 0), numel) for bound in (start, stop))
        return Span(name, start, stop)

    def part(self, vector: torch.Tensor, member: Member, span: Span) -> torch.Tensor:
        """Return the elements of a span in `local`, or in a vector of the same layout."""
        start = member.offset - self._first
        return vector[start + span.start : start + span.stop]

    @property
    def _first(self) -> int:
        """The element of the flat parameter at which `local` begins."""
        return 0 if self.whole else self.group.rank * len(self.local())


class FlatEngine(Engine):
    """An engine for models with flat parameters. It reads the reduced gradients at the step.

    Parameters outside of flat parameters are whole on every rank, and the library does not average their gradients.
    Their basis is split over the ranks, and their weights are gathered after each write.
    """

    def __init__(self, module: nn.Module, units: Sequence[FlatUnit], group: Group, replica_group: Group) -> None:
        self.module = module
        self.shard_group = group
        self.replica_group = replica_group
        self._units = units
        for unit in units:
            unit.reshard()
        members = by_first_name(module, _named_members(module, units))
        self.parameters = {name: _describe(name, member, aliases) for name, (member, aliases) in members.items()}
        self._members = {name: member for name, (member, _) in members.items() if isinstance(member, Member)}
        self._rest = ReplicatedParameters(
            {name: member for name, (member, _) in members.items() if isinstance(member, nn.Parameter)}, group
        )
        self.device = units[0].local().device if units else next(module.parameters()).device
        self._consume: Consume | None = None

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter, some of them empty."""
        return [*(m.unit.span(name, m) for name, m in self._members.items()), *self._rest.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of the local part of the flat parameter, or of a parameter outside."""
        member = self._members.get(span.name)
        return self._rest.live(span) if member is None else member.unit.part(member.unit.local(), member, span)

    def publish(self, names: Collection[str]) -> None:
        """Gather the parameters that every rank holds whole. The next forward pass gathers the others."""
        for unit in self._units:
            unit.reshard()
        written = {member.unit for name, member in self._members.items() if name in names}
        for unit in self._units:
            if unit.whole and unit in written:
                ReplicatedParameters({"": unit.local()}, self.shard_group).publish({""})
        self._rest.publish(names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which are not sharded."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Store the callback for `drain`."""
        mark_attached(self.module)
        self._consume = consume
        for unit in self._units:
            unit.watch()

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that computes a gradient of a parameter, flat or not."""
        leaves = [*(unit.leaf() for unit in self._units), *self._rest.parameters()]
        return register_gradient_hooks(call, [leaf for leaf in leaves if leaf.requires_grad])

    def drain(self) -> None:
        """Pass on this rank's part of every gradient and free it. Average the gradients outside flat parameters first.

        Raises:
            EngineError: gradients are not reduced yet.
        """
        assert self._consume is not None
        # Collective, so before code that can fail on one rank.
        self._rest.consume(self._consume, self._averaging_groups())
        gradients = {unit: unit.gradient() for unit in self._units}
        for name, member in self._members.items():
            gradient = gradients[member.unit]
            if gradient is not None and member.trainable:
                span = member.unit.span(name, member)
                self._consume(span, member.unit.part(gradient, member, span))
        for unit in self._units:
            unit.forget()

    def forget(self) -> None:
        """Drop the gradients, reduced or not."""
        self._rest.forget()
        for unit in self._units:
            unit.forget()

    def close(self) -> None:
        """Remove the hooks."""
        if self._consume is not None:
            unmark_attached(self.module)
        self._consume = None
        for unit in self._units:
            unit.close()


def _named_members(root: nn.Module, units: Sequence[FlatUnit]) -> Iterator[tuple[str, Member | nn.Parameter]]:
    """Yield every parameter under each of its names, in the order of the unflattened model."""
    members: dict[int, dict[str, Member]] = {}
    for unit in units:
        for (module, attribute), member in unit.members.items():
            members.setdefault(module, {})[attribute] = member
    for prefix, child in root.named_modules(remove_duplicate=False):
        flat = members.get(id(child), {})
        rest = {key: p for key, p in child._parameters.items() if p is not None and not is_flat(p)}
        for attribute, parameter in (rest | flat).items():
            yield f"{prefix}.{attribute}" if prefix else attribute, parameter


def is_flat(parameter: torch.Tensor) -> bool:
    """Return whether `parameter` is a flat parameter of torch or fairscale."""
    return hasattr(parameter, "_param_infos")


def one_group(process_groups: Sequence[dist.ProcessGroup], wrapper: str) -> Group:
    """Return the process group of all wrapped modules.

    Raises:
        EngineError: the modules are sharded over different ranks.
    """
    if len({tuple(dist.get_process_group_ranks(group)) for group in process_groups}) > 1:
        raise EngineError(
            f"the {wrapper} modules of this model are sharded over different ranks; give all the same process group."
        )
    return Group(process_groups[0])


def _describe(name: str, member: Member | nn.Parameter, aliases: tuple[str, ...]) -> ParameterInfo:
    if isinstance(member, Member):
        return ParameterInfo(name, member.shape, member.unit.local().dtype, member.trainable, aliases)
    return ParameterInfo(name, tuple(member.shape), member.dtype, member.requires_grad, aliases)

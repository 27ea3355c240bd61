"""Flat parameters: tensors laid end to end in one vector, of which every rank holds an equal part.

FSDP1 and fairscale keep a model this way. A part begins and ends at any element of any tensor.
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
from twa_scale.engines.engine import Consume, Engine, ParameterInfo, calling
from twa_scale.engines.parameters import by_first_name, claim, persistent_buffers, release
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


@dataclass(eq=False)
class Member:
    """One tensor of a flat parameter, which begins at element `offset` of it."""

    unit: "FlatUnit"
    offset: int
    shape: tuple[int, ...]
    trainable: bool


class FlatUnit(ABC):
    """One flat parameter. What its library calls things is known to the subclass only."""

    group: Group
    """The ranks that hold it once."""
    whole: bool
    """Whether every rank holds all of it, and only the basis is split."""
    members: dict[tuple[int, str], Member]
    """By the id of a module and the name of a parameter there; tied parameters are one member."""

    @abstractmethod
    def local(self) -> torch.Tensor:
        """Return the memory of this rank, 1-D: its part with padding, or all if `whole`."""

    @abstractmethod
    def gradient(self) -> torch.Tensor | None:
        """Return the gradient of `local`, averaged over the group.

        Raises:
            EngineError: a gradient that is not reduced yet.
        """

    @abstractmethod
    def leaf(self) -> torch.Tensor:
        """Return what autograd accumulates the gradient in."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the gradient."""

    @abstractmethod
    def reshard(self) -> None:
        """Drop what was gathered, so that the next forward pass gathers anew."""

    def watch(self) -> None:  # noqa: B027  most need not
        """Begin to notice which gradients are reduced, where they do not tell."""

    def close(self) -> None:  # noqa: B027
        """Stop that."""

    def span(self, name: str, member: Member) -> Span:
        """Return what this rank owns of a member."""
        numel, held = prod(member.shape), len(self.local())
        start, stop = share(held, *self._place) if self.whole else (self._first, self._first + held)
        start, stop = (min(max(bound - member.offset, 0), numel) for bound in (start, stop))
        return Span(name, start, stop)

    def part(self, vector: torch.Tensor, member: Member, span: Span) -> torch.Tensor:
        """Return the elements of a span in `local`, or in a vector like it."""
        start = member.offset - self._first
        return vector[start + span.start : start + span.stop]

    @property
    def _place(self) -> tuple[int, int]:
        return self.group.rank, self.group.size

    @property
    def _first(self) -> int:
        """Where `local` begins in the flat parameter."""
        return 0 if self.whole else self.group.rank * len(self.local())


class FlatEngine(Engine):
    """Gradients are taken at the step: their parts have been reduced by then, and wait on each rank for its own.

    Parameters that stay out of flat parameters are whole on every rank and nobody averages their gradients: the basis
    of each is split over the ranks, and gathered after it is written.
    """

    def __init__(self, module: nn.Module, units: Sequence[FlatUnit], group: Group, replica_group: Group) -> None:
        self.module = module
        self.shard_group = group
        self.replica_group = replica_group
        self._units = units
        for unit in units:
            unit.reshard()
        found = by_first_name(module, _walk(module, units))
        self.parameters = {name: _describe(name, thing, aliases) for name, (thing, aliases) in found.items()}
        self._members = {name: thing for name, (thing, _) in found.items() if isinstance(thing, Member)}
        self._rest = ReplicatedParameters(
            {name: thing for name, (thing, _) in found.items() if isinstance(thing, nn.Parameter)}, group
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
        """Gather what every rank holds whole, and have all else gathered anew by the next forward pass."""
        for unit in self._units:
            unit.reshard()
        written = {member.unit for name, member in self._members.items() if name in names}
        for unit in self._units:
            if unit.whole and unit in written:
                ReplicatedParameters({"": unit.local()}, self.shard_group).publish({""})
        self._rest.publish(names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which stay whole."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Remember who consumes the gradients."""
        claim(self.module)
        self._consume = consume
        for unit in self._units:
            unit.watch()

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that reaches a flat parameter, or one outside of them."""
        leaves = [*(unit.leaf() for unit in self._units), *self._rest.parameters()]
        return calling(call, [leaf for leaf in leaves if leaf.requires_grad])

    def drain(self) -> None:
        """Hand over this rank's part of every gradient and free it; average those that nobody has averaged.

        Raises:
            EngineError: gradients that are not reduced yet.
        """
        assert self._consume is not None
        self._rest.consume(self._consume, averaged=False)  # collective: before what may fail on one rank
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
        """Forget the consumer."""
        if self._consume is not None:
            release(self.module)
        self._consume = None
        for unit in self._units:
            unit.close()


def _walk(root: nn.Module, units: Sequence[FlatUnit]) -> Iterator[tuple[str, Member | nn.Parameter]]:
    """Yield every parameter under each of its names, in the order of the model before it was flattened."""
    members: dict[int, dict[str, Member]] = {}
    for unit in units:
        for (module, attribute), member in unit.members.items():
            members.setdefault(module, {})[attribute] = member
    for prefix, child in root.named_modules(remove_duplicate=False):
        flat = members.get(id(child), {})
        rest = {key: p for key, p in child._parameters.items() if p is not None and not is_flat(p)}
        for attribute, thing in (rest | flat).items():
            yield f"{prefix}.{attribute}" if prefix else attribute, thing


def is_flat(parameter: torch.Tensor) -> bool:
    """Whether this is a flat parameter of torch or fairscale, which is not a parameter of the model."""
    return hasattr(parameter, "_param_infos")


def one_group(process_groups: Sequence[dist.ProcessGroup], wrapper: str) -> Group:
    """Return the group that all wrapped modules share.

    Raises:
        EngineError: modules that are sharded over different ranks.
    """
    if len({tuple(dist.get_process_group_ranks(group)) for group in process_groups}) > 1:
        raise EngineError(
            f"the {wrapper} modules of this model are sharded over different ranks; give all the same process group."
        )
    return Group(process_groups[0])


def _describe(name: str, thing: Member | nn.Parameter, aliases: tuple[str, ...]) -> ParameterInfo:
    if isinstance(thing, Member):
        return ParameterInfo(name, thing.shape, thing.unit.local().dtype, thing.trainable, aliases)
    return ParameterInfo(name, tuple(thing.shape), thing.dtype, thing.requires_grad, aliases)

"""A backend for process groups that counts all bytes that ranks exchange, and forwards each call to gloo.

Ranks reach each other only through the backend of a group, whoever calls it: Python, C++ (DDP's reducer) or functional
collectives. A kind of call that is not listed here has nowhere to go and fails, so none is missed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

GATHERS = ("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single", "all_gather_single_coalesced")
SCATTERS = ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced")
OTHERS = ("allreduce", "allreduce_coalesced", "barrier", "broadcast", "gather", "reduce", "scatter", "send", "recv")


@dataclass(frozen=True)
class Call:
    """One collective: its name, the ranks that take part, and the bytes of the larger of its input and output."""

    name: str
    ranks: tuple[int, ...]
    nbytes: int

    @property
    def sent(self) -> float:
        """Return the bytes that a rank sends in a ring."""
        part = (len(self.ranks) - 1) / len(self.ranks)
        return part * self.nbytes * (2 if self.name == "allreduce" else 1)

    def stays_in(self, *groups: range) -> bool:
        """Return whether all ranks are of one of these groups."""
        return any(set(self.ranks) <= set(group) for group in groups)


calls: list[Call] = []


class Counted(dist.ProcessGroup):
    """Gloo with a list of the calls."""

    def __init__(self, options: Any, _: object) -> None:
        rank, size = options.group_rank, options.group_size
        super().__init__(rank, size)  # type: ignore[call-arg]  # a constructor that torch's stubs lack
        self.ranks = tuple(options.global_ranks_in_group or range(size))
        self._name: str = options.group_id
        gloo = dist.ProcessGroup.BackendType.GLOO
        self.inner = dist.ProcessGroup(options.store, rank, size)
        backend = dist.ProcessGroupGloo(options.store, rank, size, options.timeout)
        self.inner._register_backend(torch.device("cpu"), gloo, backend)
        self.inner._set_default_backend(gloo)

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._name

    def getBackendName(self) -> str:
        return "counted"


def _counting(name: str) -> Callable[..., Any]:
    def call(self: Counted, *arguments: Any, **options: Any) -> Any:
        calls.append(Call(name, self.ranks, max(_nbytes(argument) for argument in (*arguments, None))))
        return getattr(self.inner, name)(*arguments, **options)

    return call


def _nbytes(argument: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(argument))


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)


for _name in (*GATHERS, *SCATTERS, *OTHERS):
    setattr(Counted, _name, _counting(_name))


def count_from_here(store: str) -> None:
    """Replace the world of this rank and all groups created from now on by counted ones. `store` is a new file."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if "counted" not in dist.Backend.backend_list:
        dist.Backend.register_backend("counted", Counted, extended_api=True, devices=["cpu"])
    dist.init_process_group("counted", store=dist.FileStore(store, size), rank=rank, world_size=size)

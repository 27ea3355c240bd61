"""Groups of ranks that torch or MPI connects."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from twa_scale.ranks.destroying import destroy_process_group
from twa_scale.ranks.failures import rank_errors
from twa_scale.ranks.mpi import load_mpi, mpi_takes_cuda
from twa_scale.ranks.ranks import Ranks
from twa_scale.ranks.world import World

T = TypeVar("T")


class Group(Ranks):
    """The ranks of a torch process group. Also works in a single process without one.

    Args:
        process_group: the process group; None for the default one.
        alone: whether the group contains only this process.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, *, alone: bool = False) -> None:
        self._process_group = process_group
        self.size = 1 if alone else dist.get_world_size(process_group)
        self.rank = 0 if alone else dist.get_rank(process_group)

    @classmethod
    def alone(cls) -> "Group":
        """Return a group of this process only."""
        return cls(None, alone=True)

    @classmethod
    def world(cls) -> "Group":
        """Return all ranks of torch's default process group, else of `mpirun`, else this process alone.

        Raises:
            ConfigError: `mpirun` has started this process, no process group exists, and mpi4py cannot be loaded.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(None)
        world = World.from_environment()
        return MpiGroup(load_mpi(world.size).COMM_WORLD) if world.launcher == "mpi" and world.size > 1 else cls.alone()

    @property
    def name(self) -> str:
        """The name of this rank for messages, with its global rank."""
        return f"rank {dist.get_rank() if self.size > 1 else self.rank}"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks in place; the result is bitwise equal on every rank."""
        if self.size > 1:
            with self._rank_errors():
                dist.all_reduce(tensor, group=self._process_group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, ordered by rank. For small objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._rank_errors():
            dist.all_gather_object(values, value, group=self._process_group)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` of this group on every rank. For small objects."""
        if self.size == 1:
            return value
        values = [value]
        with self._rank_errors():
            dist.broadcast_object_list(values, group=self._process_group, group_src=source)
        return values[0]

    def copy_from(self, source: int, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with that of rank `source` of this group."""
        if self.size > 1:
            with self._rank_errors():
                dist.broadcast(tensor, group=self._process_group, group_src=source)

    def all_gather(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Fill `out`, 1-D of size * len(local) elements, with the 1-D `local` of every rank, ordered by rank."""
        if self.size == 1:
            out.copy_(local)
        else:
            # torch 2.13 renamed all_gather_into_tensor.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            with self._rank_errors():
                gather(out, local, group=self._process_group)

    def ranks_to_connect(self, device: str, backend: str) -> tuple[int, ...]:
        """Return the global ranks of this group, or () for one rank and if `backend` connects their devices already.

        Args:
            device: a device type, such as `cuda`.
            backend: a backend of torch.distributed, such as `nccl`.
        """
        if self.size <= 1 or f"{device}:{backend}" in dist.get_backend_config(self._process_group).split(","):
            return ()
        return tuple(dist.get_process_group_ranks(self._process_group or dist.group.WORLD))  # torch 2.6 refuses None

    def _rank_errors(self) -> AbstractContextManager[None]:
        return rank_errors(self._process_group)

    def close(self) -> None:
        """Destroy the process group."""
        destroy_process_group(self._process_group)


class MpiGroup(Group):
    """The ranks of an MPI communicator, for scripts without a torch process group and for `comm: mpi`."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.size = int(communicator.size)
        self.rank = int(communicator.rank)
        self._takes_cuda = mpi_takes_cuda()

    @property
    def name(self) -> str:
        """The name of this rank for messages."""
        return f"rank {self.rank}"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks in place; the result is bitwise equal on every rank."""
        with self._memory(tensor) as memory:
            # MPI does not guarantee that the result of Allreduce is bitwise equal on all ranks.
            self._communicator.Reduce(load_mpi().IN_PLACE if self.rank == 0 else memory, memory)
            self._communicator.Bcast(memory)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, ordered by rank. For small objects."""
        values: list[T] = self._communicator.allgather(value)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` of this group on every rank. For small objects."""
        result: T = self._communicator.bcast(value, source)
        return result

    def copy_from(self, source: int, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with that of rank `source` of this group."""
        with self._memory(tensor) as memory:
            self._communicator.Bcast(memory, source)

    def all_gather(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Fill `out`, 1-D of size * len(local) elements, with the 1-D `local` of every rank, ordered by rank."""
        with self._memory(local) as part, self._memory(out) as gathered:
            self._communicator.Allgather(part, gathered)

    def ranks_to_connect(self, device: str, backend: str) -> tuple[int, ...]:
        """Return (), because these ranks have no process group."""
        return ()

    def close(self) -> None:
        """Do nothing, because the communicator belongs to others."""

    @contextmanager
    def _memory(self, tensor: torch.Tensor) -> Iterator[Any]:
        """Yield the memory of `tensor` if MPI can use it, else a copy that is copied back afterwards."""
        work = tensor.detach().contiguous()
        if work.dtype in (torch.bfloat16, torch.float16):  # MPI has no such types.
            work = work.float()
        if work.is_cuda and not self._takes_cuda:
            work = work.cpu()
        if work.is_cuda:
            torch.cuda.current_stream(work.device).synchronize()  # MPI does not use CUDA streams.
        yield work if work.is_cuda else work.numpy()
        if work.data_ptr() != tensor.data_ptr():
            tensor.copy_(work)

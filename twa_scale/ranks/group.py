"""A group of ranks: sums of small tensors, exchange of small objects, and errors that reach every rank."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from twa_scale.errors import RankError, TwaError
from twa_scale.ranks.failures import waiting
from twa_scale.ranks.mpi import load_mpi, mpi_takes_cuda
from twa_scale.ranks.world import World

T = TypeVar("T")


class Group:
    """Ranks that act together; works unchanged on a single process."""

    def __init__(self, process_group: dist.ProcessGroup | None, *, alone: bool = False) -> None:
        self._process_group = process_group
        self.size: int = 1 if alone else dist.get_world_size(process_group)
        self.rank: int = 0 if alone else dist.get_rank(process_group)

    @classmethod
    def alone(cls) -> "Group":
        """A group of this process only."""
        return cls(None, alone=True)

    @classmethod
    def world(cls) -> "Group":
        """All ranks: of torch's default process group, else of `mpirun`; without either this process alone.

        Raises:
            ConfigError: started by `mpirun`, without a process group, and mpi4py cannot be loaded.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(None)
        world = World.from_environment()
        return MpiGroup(load_mpi(world.size).COMM_WORLD) if world.launcher == "mpi" and world.size > 1 else cls.alone()

    @property
    def name(self) -> str:
        """What messages call this rank: its number among all ranks."""
        return f"rank {dist.get_rank() if self.size > 1 else self.rank}"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """SUM `tensor` over the ranks, in place; every rank ends with the same bits."""
        if self.size > 1:
            with self._waiting():
                dist.all_reduce(tensor, group=self._process_group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, by rank, on every rank. For small objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(values, value, group=self._process_group)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` of this group on every rank. For small objects."""
        if self.size == 1:
            return value
        box = [value]
        with self._waiting():
            dist.broadcast_object_list(box, group=self._process_group, group_src=source)
        return box[0]

    def copy_from(self, source: int, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with what rank `source` of this group has in its own."""
        if self.size > 1:
            with self._waiting():
                dist.broadcast(tensor, group=self._process_group, group_src=source)

    def all_gather(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Fill 1-D `out` (size * len(local) elements) with every rank's 1-D `local`, by rank."""
        if self.size == 1:
            out.copy_(local)
        else:
            # torch 2.13 renamed it
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            with self._waiting():
                gather(out, local, group=self._process_group)

    def to_connect(self, device: str, backend: str) -> tuple[int, ...]:
        """Return the global ranks of this group; none when alone, or where `backend` connects the `device`s already."""
        if self.size <= 1 or f"{device}:{backend}" in dist.get_backend_config(self._process_group).split(","):
            return ()
        return tuple(dist.get_process_group_ranks(self._process_group))

    def _waiting(self) -> AbstractContextManager[None]:
        return waiting(self._process_group)

    def close(self) -> None:
        """Take down the process group."""
        dist.destroy_process_group(self._process_group)

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Turn an error of the body on any rank into the same error on every rank, so that none waits forever.

        The body must hold no collective: a rank that failed would miss it.

        Raises:
            RankError: at once and on this rank alone, where the body itself found that the ranks are apart.
        """
        failure: Exception | None = None
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            failure = error
        failures = [(rank, error) for rank, error in enumerate(self.gather(_portable(failure))) if error is not None]
        if not failures:
            return
        rank, first = failures[0]
        for known in (first, failure):
            if isinstance(known, TwaError):
                known.agreed = True
        if failure is not None and rank == self.rank:
            raise failure
        raise first from failure


class MpiGroup(Group):
    """The ranks of an MPI communicator, for scripts without a torch process group and for `comm: mpi`."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.size: int = communicator.size
        self.rank: int = communicator.rank
        self._takes_cuda = mpi_takes_cuda()

    @property
    def name(self) -> str:
        """What messages call this rank."""
        return f"rank {self.rank}"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """SUM `tensor` over the ranks, in place; every rank ends with the same bits."""
        with self._memory(tensor) as memory:
            # MPI only advises that the result of Allreduce be the same bits everywhere.
            self._communicator.Reduce(load_mpi().IN_PLACE if self.rank == 0 else memory, memory)
            self._communicator.Bcast(memory)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, by rank, on every rank. For small objects."""
        values: list[T] = self._communicator.allgather(value)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` of this group on every rank. For small objects."""
        result: T = self._communicator.bcast(value, source)
        return result

    def copy_from(self, source: int, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with what rank `source` of this group has in its own."""
        with self._memory(tensor) as memory:
            self._communicator.Bcast(memory, source)

    def all_gather(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Fill 1-D `out` (size * len(local) elements) with every rank's 1-D `local`, by rank."""
        with self._memory(local) as part, self._memory(out) as whole:
            self._communicator.Allgather(part, whole)

    @contextmanager
    def _memory(self, tensor: torch.Tensor) -> Iterator[Any]:
        """Give the memory of `tensor` where MPI can use it, else a copy that is copied back afterwards."""
        work = tensor.detach().contiguous()
        if work.dtype in (torch.bfloat16, torch.float16):  # types that MPI does not have
            work = work.float()
        if work.is_cuda and not self._takes_cuda:
            work = work.cpu()
        if work.is_cuda:
            torch.cuda.current_stream(work.device).synchronize()  # MPI knows nothing of streams
        yield work if work.is_cuda else work.numpy()
        if work.data_ptr() != tensor.data_ptr():
            tensor.copy_(work)


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that survives the trip to another process: ours as they are, others as their text."""
    if error is None or isinstance(error, TwaError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")

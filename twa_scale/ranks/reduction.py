"""The reduction of coefficient gradients over ranks, through the model's process groups or the backend of `comm`."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from twa_scale.errors import ConfigError
from twa_scale.ranks.group import Group, MpiGroup
from twa_scale.ranks.mpi import load_mpi, require_mpi4py
from twa_scale.ranks.pods import Pods
from twa_scale.ranks.ranks import Ranks
from twa_scale.ranks.timeouts import default_timeout
from twa_scale.ranks.world import mpi_size


class Reduction:
    """The mean of coefficient gradients over all pods, in float64. The result is bitwise equal on every rank."""

    def __init__(self, comm: str, pods: Pods, shard_group: Group, replica_group: Group) -> None:
        """Connect the ranks of `shard_group` and `replica_group`. Collective.

        Args:
            comm: `auto` for the model's own process groups, `mpi`, or a torch backend (`gloo`, `nccl`).
            pods: the pods that the two groups make.
            shard_group: the ranks that together hold the weights once.
            replica_group: the ranks that hold the same spans.

        Raises:
            ConfigError: `comm` cannot connect these ranks. Raised on every rank.
        """
        rank_groups = (shard_group, replica_group)
        self._made: list[Group] = []
        self._device: torch.device | None = None
        match comm:
            case "auto":
                groups: Sequence[Group] = rank_groups
            case "mpi":
                groups = [_over_mpi(group) for group in rank_groups]
            case _:
                self._device = torch.device("cuda" if comm == "nccl" else "cpu")
                groups = _over_torch(comm, self._device, rank_groups)
                self._made = [made for made, group in zip(groups, rank_groups, strict=True) if made is not group]
        self._replicas = groups[1]
        self._pods = pods if groups == rank_groups else Pods(*groups)

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Return the sums over the shard groups, averaged over pods by their numbers of ranks, on the CPU. Collective.

        Args:
            products: the local partial sums of this rank, float64 on any device; not changed.
        """
        return self.average_(products.clone()).cpu()

    def average_(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the shard groups and average over pods, in place, with equal bits everywhere. Collective."""
        return self._sum_(self._pods, values.mul_(self._pods.share))

    def average_over_replicas_(self, values: torch.Tensor) -> torch.Tensor:
        """Average `values` over the replica group only, for pods of equal size. Collective."""
        return self._sum_(self._replicas, values).div_(self._replicas.size)

    @property
    def num_replicas(self) -> int:
        """The number of ranks that hold the spans of this rank."""
        return self._replicas.size

    def gather_from_replicas(self, local: torch.Tensor) -> torch.Tensor:
        """Return the 1-D tensor `local` of each rank of the replica group, (ranks, len(local)). Collective."""
        sent = local.to(self._device or local.device)
        out = sent.new_empty(self.num_replicas * len(sent))
        self._replicas.all_gather(out, sent)
        return out.view(self.num_replicas, -1).to(local.device)

    def _sum_(self, group: Ranks, values: torch.Tensor) -> torch.Tensor:
        if group.size == 1 or self._device is None or self._device.type == values.device.type:
            return group.sum_(values)
        return values.copy_(group.sum_(values.to(self._device)))

    def close(self) -> None:
        """Destroy the process groups that were created here. MPI communicators live until the process ends."""
        while self._made:
            self._made.pop().close()


def _over_torch(backend: str, device: torch.device, groups: Sequence[Group]) -> list[Group]:
    """Return groups of the same ranks that communicate through `backend`.

    Collective over the default process group: `torch.distributed.new_group` has to be called by all of its ranks, in
    the same order.
    """
    world = Group.world()
    with world.agree():
        if isinstance(world, MpiGroup):
            raise ConfigError(
                f"comm: {backend!r} needs a torch process group, and these ranks are connected only by MPI; call "
                "torch.distributed.init_process_group first, or use comm: auto."
            )
        if device.type == "cuda" and not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise ConfigError(f"comm: {backend!r} needs a GPU on every rank; use comm: gloo or auto.")
    local = [group.ranks_to_connect(device.type, backend) for group in groups]
    wanted = sorted({ranks for ranks_of_rank in world.gather(local) for ranks in ranks_of_rank if ranks})
    limit = default_timeout()
    made = {ranks: dist.new_group(ranks, backend=backend, timeout=limit) for ranks in wanted}
    return [Group(made[ranks]) if ranks else group for ranks, group in zip(local, groups, strict=True)]


def _over_mpi(group: Group) -> Group:
    if group.size <= 1 or isinstance(group, MpiGroup):
        return group
    with group.agree():
        known = mpi_size()
        if known < group.size:  # Checked before MPI starts: MPI hangs if two processes have the same rank.
            raise ConfigError(
                f"comm: 'mpi' needs ranks that MPI has started, and it started {known} of {group.size}; start with "
                "mpirun (launch/mpirun.sh), or use comm: auto."
            )
        require_mpi4py()
    with group.agree():  # A second block, because MPI has to be initialized on all of its ranks or on none.
        world = load_mpi(known).COMM_WORLD
    ranks = group.gather(world.rank)
    with group.agree():
        if len(set(ranks)) < group.size:
            raise ConfigError(f"comm: 'mpi': MPI gives several processes the same rank: {ranks}. Start with mpirun.")
    return MpiGroup(world.Create_group(world.group.Incl(ranks)))

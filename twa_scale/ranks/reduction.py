"""What sums the coefficient gradients over the ranks: the model's own process group, or what `comm` asks for."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from twa_scale.errors import ConfigError
from twa_scale.ranks.group import Group, MpiGroup
from twa_scale.ranks.mpi import load_mpi, require_mpi4py
from twa_scale.ranks.pods import Pods
from twa_scale.ranks.timeouts import default_timeout
from twa_scale.ranks.world import mpi_size


class Reduction:
    """The mean of coefficient gradients over all ranks that see other data; float64, the same bits on every rank."""

    def __init__(self, comm: str, pods: Pods, shard_group: Group, replica_group: Group) -> None:
        """Connect the ranks of `shard_group` and `replica_group`, which make `pods`, as `comm` says. Collective.

        Raises:
            ConfigError: on every rank, when they cannot be connected so.
        """
        own = (shard_group, replica_group)
        self._made: list[Group] = []
        self._device: torch.device | None = None
        match comm:
            case "auto":
                groups: Sequence[Group] = own
            case "mpi":
                groups = [_over_mpi(group) for group in own]
            case _:
                self._device = torch.device("cuda" if comm == "nccl" else "cpu")
                groups = _over_torch(comm, self._device, own)
                self._made = [made for made, group in zip(groups, own, strict=True) if made is not group]
        self._pods = pods if groups == own else Pods(*groups)

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Return, on the CPU, the mean over pods of what each rank has summed; `products` stays. Collective."""
        mine = products * self._pods.share
        return self._pods.sum_(mine if self._device is None else mine.to(self._device)).cpu()

    def close(self) -> None:
        """Take down the process groups that were made here; communicators of MPI go with the process."""
        while self._made:
            self._made.pop().close()


def _over_torch(backend: str, device: torch.device, groups: Sequence[Group]) -> list[Group]:
    """Connect the ranks of each group by `backend`.

    Every rank of the default process group takes part: torch wants them all, in one order, to make a group of some.
    """
    world = Group.world()
    with world.agree():
        if isinstance(world, MpiGroup):
            raise ConfigError(
                f"comm: {backend!r} needs a torch process group, and these ranks meet over MPI alone; call "
                "torch.distributed.init_process_group first, or use comm: auto."
            )
        if device.type == "cuda" and not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise ConfigError(f"comm: {backend!r} needs a GPU on every rank; use comm: gloo or auto.")
    mine = [group.to_connect(device.type, backend) for group in groups]
    wanted = sorted({ranks for theirs in world.gather(mine) for ranks in theirs if ranks})
    limit = default_timeout()
    made = {ranks: dist.new_group(ranks, backend=backend, timeout=limit) for ranks in wanted}
    return [Group(made[ranks]) if ranks else group for ranks, group in zip(mine, groups, strict=True)]


def _over_mpi(group: Group) -> Group:
    if group.size <= 1 or isinstance(group, MpiGroup):
        return group
    with group.agree():
        known = mpi_size()
        if known < group.size:  # before MPI starts: two processes in the place of one would hang it
            raise ConfigError(
                f"comm: 'mpi' needs ranks that MPI has started, and it knows {known} of {group.size}; start with "
                "mpirun (launch/mpirun.sh), or use comm: auto."
            )
        require_mpi4py()
    with group.agree():  # apart: MPI starts on all of its ranks or on none
        world = load_mpi(known).COMM_WORLD
    ranks = group.gather(world.rank)
    with group.agree():
        if len(set(ranks)) < group.size:
            raise ConfigError(f"comm: 'mpi': MPI gives several processes the same place: {ranks}. Start with mpirun.")
    return MpiGroup(world.Create_group(world.group.Incl(ranks)))

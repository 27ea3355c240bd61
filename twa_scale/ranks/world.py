"""The rank of this process, read from the launcher's environment variables, and the process group of all ranks."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from twa_scale.config import TIMEOUT
from twa_scale.errors import ConfigError, RankError
from twa_scale.ranks.destroying import destroy_process_group
from twa_scale.ranks.failures import Heartbeat, publish_failure, rank_errors
from twa_scale.ranks.mpi import abort_at_exit, load_mpi, mpi4py_is_installed
from twa_scale.ranks.rendezvous import rendezvous_in_directory, rendezvous_over_mpi
from twa_scale.ranks.timeouts import default_of_new_groups

_MASTER_KEYS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of ranks, as the launcher gave them."""

    rank: int
    size: int
    local_rank: int
    launcher: str = ""
    """`torchrun` (also for DeepSpeed's launcher, with the same variables), `mpi` or `slurm`; empty for one rank."""
    job: str = ""
    """A name that is unique to this launch; empty if the launcher does not give one."""
    has_master: bool = False
    """Whether MASTER_ADDR and MASTER_PORT are set."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Read the variables of torchrun or DeepSpeed, else of mpirun, else of srun; without any, return a single rank.

        Raises:
            ConfigError: some of a launcher's variables are missing, or their values are not valid.
        """
        for launcher, keys in _launchers(environment):
            if any(key in environment for key in keys):
                rank, size, local_rank = _numbers(environment, keys)
                master = [key for key in _MASTER_KEYS if key in environment]
                if len(master) == 1:
                    raise ConfigError(f"the environment sets only {master[0]}; set both {' and '.join(_MASTER_KEYS)}.")
                return cls(rank, size, local_rank, launcher, _job(launcher, environment), bool(master))
        return cls(0, 1, 0)

    def device(self, setting: str = "auto") -> torch.device:
        """Return the device of this rank.

        Args:
            setting: `cpu`, `cuda`, or `auto` for a GPU if torch sees one.

        Raises:
            ConfigError: `setting` is `cuda`, and torch sees no GPU.
        """
        available = torch.cuda.is_available()
        if setting == "cuda" and not available:
            raise ConfigError("device: 'cuda' is set, but torch sees no GPU; use cpu or auto.")
        if setting == "cpu" or not available:
            return torch.device("cpu")
        # A scheduler may make only one GPU visible to each rank, as number 0.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @contextmanager
    def joined(
        self, device: torch.device, directory: str | Path | None = None, timeout: float = TIMEOUT
    ) -> Iterator[None]:
        """Initialize the process group for a `with` block: NCCL on GPUs, gloo on CPUs, none for one rank.

        Args:
            device: the device of this rank, from `device()`.
            directory: a directory that all ranks share. They use it for their rendezvous if neither MASTER_ADDR nor MPI
                gives the address of rank 0.
            timeout: the time limit of the rendezvous and of every collective of the group, in seconds.

        Raises:
            ConfigError: the rendezvous failed.
            RankError: a collective of the body failed or took longer than `timeout`. The message names missing ranks.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.size == 1:
            yield
            return
        if dist.is_initialized():
            with rank_errors(), publish_failure():
                yield
            return
        try:
            self._init(device, directory, timeout)
            with default_of_new_groups(timeout), Heartbeat(timeout), rank_errors(), publish_failure():
                yield
        except BaseException as error:
            if getattr(error, "agreed", False):
                _leave()
            else:  # Destroying the group would wait for ranks that wait for this one.
                abort_at_exit()
            raise
        _leave()

    def _init(self, device: torch.device, directory: str | Path | None, timeout: float) -> None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = None if self.has_master else self._rendezvous(directory, timeout)
        limit = timedelta(seconds=timeout)
        try:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        except (dist.DistError, RuntimeError) as error:
            location = f" at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if self.has_master else ""
            raise RankError(
                f"rank {self.rank} could not join the other ranks{location} in {timeout:.0f} s (`timeout`): "
                f"{str(error).strip().splitlines()[0]}"
            ) from error

    def _rendezvous(self, directory: str | Path | None, timeout: float) -> Store:
        if self.launcher == "mpi" and mpi4py_is_installed():
            return rendezvous_over_mpi(load_mpi(self.size).COMM_WORLD, timeout)
        if directory is None or not self.job:
            raise ConfigError(
                "the address of rank 0 is unknown: set MASTER_ADDR and MASTER_PORT, start with torchrun or srun, or, "
                "under mpirun, install mpi4py."
            )
        return rendezvous_in_directory(Path(directory), self.job, self.rank, self.size, timeout)


def _leave() -> None:
    if dist.is_initialized():
        destroy_process_group()


def mpi_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that mpirun, or an srun that MPI may use, has started; else 1."""
    for launcher, keys in _launchers(environment):
        if launcher != "torchrun" and keys[1] in environment:
            return _numbers(environment, keys)[1]
    return 1


def _launchers(environment: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yield the launchers that may have started this process, innermost first, with (rank, size, local rank) variables.

    mpirun may start its ranks through srun, which sets the variables of both. SLURM also sets a rank in batch scripts
    and interactive shells, which are not tasks of an `srun`. An `srun` may provide PMI to its tasks.
    """
    yield "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    yield "mpi", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    in_step = "SLURM_STEP_ID" in environment
    local = "PMI_LOCAL_RANK" if "PMI_LOCAL_RANK" in environment else "MPI_LOCALRANKID"
    if local in environment or not in_step:
        yield "mpi", ("PMI_RANK", "PMI_SIZE", local)
    if in_step:
        yield "slurm", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def _numbers(environment: Mapping[str, str], keys: tuple[str, str, str]) -> tuple[int, int, int]:
    missing = [key for key in keys if key not in environment]
    values = {key: environment[key] for key in keys if key in environment}
    settings = ", ".join(f"{key}={value}" for key, value in values.items())
    if missing:
        raise ConfigError(
            f"the environment sets {settings} but not {', '.join(missing)}: set all or none, or leave it to a launcher "
            "(torchrun, deepspeed, mpirun, srun)."
        )
    try:
        rank, size, local_rank = map(int, values.values())
    except ValueError:
        raise ConfigError(f"the environment sets {settings}: these have to be whole numbers.") from None
    if not 0 <= rank < size or local_rank < 0:
        raise ConfigError(f"the environment sets {settings}: ranks must be from 0 to the size minus 1.")
    return rank, size, local_rank


def _job(launcher: str, environment: Mapping[str, str]) -> str:
    """Return a name that is unique to this launch and valid in file names; empty if the launcher does not give one."""
    keys = {"slurm": ["SLURM_JOB_ID", "SLURM_STEP_ID"], "mpi": ["PMIX_NAMESPACE"]}.get(launcher, [])
    parts = [environment[key] for key in keys if key in environment]
    if not keys or len(parts) < len(keys):
        return ""
    name = "-".join([launcher, *parts, environment.get("SLURM_RESTART_COUNT", "0")])
    return "".join(char if char.isalnum() or char in ".-" else "-" for char in name)

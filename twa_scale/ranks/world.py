"""Which rank this process is, read once from the launcher's variables, and the process group that they make."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from twa_scale.config import TIMEOUT
from twa_scale.errors import ConfigError, RankError
from twa_scale.ranks.failures import Presence, last_words, waiting
from twa_scale.ranks.mpi import abort_at_exit, load_mpi, mpi4py_is_installed
from twa_scale.ranks.rendezvous import meet_in, meet_over

_MASTER = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    launcher: str = ""
    """`torchrun` (and all that set the same variables, as DeepSpeed does), `mpi`, `slurm`, or nothing when alone."""
    job: str = ""
    """A name that no other start of ranks has at the same time, where the launcher gives one."""
    has_master: bool = False
    """Whether MASTER_ADDR and MASTER_PORT say where rank 0 is."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Read the variables of torchrun or DeepSpeed, else of mpirun, else of srun; without any, we are alone.

        Raises:
            ConfigError: some of a launcher's variables are set and others are not, or their values cannot be.
        """
        for launcher, keys in _launchers(environment):
            if any(key in environment for key in keys):
                rank, size, local_rank = _numbers(environment, keys)
                master = [key for key in _MASTER if key in environment]
                if len(master) == 1:
                    raise ConfigError(f"the environment sets {master[0]} alone; set both of {' and '.join(_MASTER)}.")
                return cls(rank, size, local_rank, launcher, _job(launcher, environment), bool(master))
        return cls(0, 1, 0)

    def device(self, wanted: str = "auto") -> torch.device:
        """Return the device of this rank: `cpu`, `cuda`, or `auto` for a GPU where there is one.

        Raises:
            ConfigError: `cuda` is wanted and there is none.
        """
        available = torch.cuda.is_available()
        if wanted == "cuda" and not available:
            raise ConfigError("device: 'cuda' is asked for, but torch sees no GPU; use cpu or auto.")
        if wanted == "cpu" or not available:
            return torch.device("cpu")
        # A scheduler may show each rank its own GPU only, as number 0.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @contextmanager
    def joined(
        self, device: torch.device, directory: str | Path | None = None, timeout: float = TIMEOUT
    ) -> Iterator[None]:
        """Be part of the process group in a `with` block: NCCL on GPUs, gloo on CPUs, none when alone.

        Args:
            device: what `device()` has returned.
            directory: one that all ranks see, where they can find each other if nothing else says where rank 0 is.
            timeout: seconds that ranks wait for each other, now and in every collective of groups that are made here
                and by `limit_waiting`.

        Raises:
            ConfigError: the ranks cannot find each other.
            RankError: a collective of the body failed or took longer than `timeout`; names the rank that is missing.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.size == 1:
            yield
            return
        if dist.is_initialized():
            with waiting(), last_words():
                yield
            return
        try:
            self._init(device, directory, timeout)
            with Presence(timeout), waiting(), last_words():
                yield
        except BaseException as error:
            if getattr(error, "agreed", False):
                _leave()
            else:  # taking the group down would wait for ranks that wait for this one; the end of the process does not
                abort_at_exit()
            raise
        _leave()

    def _init(self, device: torch.device, directory: str | Path | None, timeout: float) -> None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = None if self.has_master else self._meet(directory, timeout)
        limit = timedelta(seconds=timeout)
        try:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        except (dist.DistError, RuntimeError) as error:
            where = f" at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if self.has_master else ""
            raise RankError(
                f"rank {self.rank} waited for the other ranks{where}, and they did not all come within {timeout:.0f} s "
                f"(`timeout`): {str(error).strip().splitlines()[0]}"
            ) from error

    def _meet(self, directory: str | Path | None, timeout: float) -> Store:
        if self.launcher == "mpi" and mpi4py_is_installed():
            return meet_over(load_mpi(self.size).COMM_WORLD, timeout)
        if directory is None or not self.job:
            raise ConfigError(
                "nothing says where rank 0 is: set MASTER_ADDR and MASTER_PORT, start with torchrun or srun, or, under "
                "mpirun, install mpi4py."
            )
        return meet_in(Path(directory), self.job, self.rank, self.size, timeout)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def mpi_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the ranks that MPI can know of: those of mpirun, or those of an srun that may have started it; else 1."""
    for launcher, keys in _launchers(environment):
        if launcher != "torchrun" and keys[1] in environment:
            return _numbers(environment, keys)[1]
    return 1


def _launchers(environment: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yield who may have started us, the innermost first, with its variables of rank, size and local rank.

    mpirun may start its ranks through srun, so that these have the variables of both. A SLURM batch script or an
    interactive shell has a rank too, but is no task of an `srun`; and an `srun` may speak PMI to its tasks.
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
    found = {key: environment[key] for key in keys if key in environment}
    said = ", ".join(f"{key}={value}" for key, value in found.items())
    if missing:
        raise ConfigError(
            f"the environment sets {said} but not {', '.join(missing)}: set all or none, or leave it to a launcher "
            "(torchrun, deepspeed, mpirun, srun)."
        )
    try:
        rank, size, local_rank = map(int, found.values())
    except ValueError:
        raise ConfigError(f"the environment sets {said}: these have to be whole numbers.") from None
    if not 0 <= rank < size or local_rank < 0:
        raise ConfigError(f"the environment sets {said}: ranks count from 0 and stay below the size.")
    return rank, size, local_rank


def _job(launcher: str, environment: Mapping[str, str]) -> str:
    """Return a name for files of this start of ranks; empty where the launcher gives nothing to make it of."""
    keys = {"slurm": ["SLURM_JOB_ID", "SLURM_STEP_ID"], "mpi": ["PMIX_NAMESPACE"]}.get(launcher, [])
    parts = [environment[key] for key in keys if key in environment]
    if not keys or len(parts) < len(keys):
        return ""
    name = "-".join([launcher, *parts, environment.get("SLURM_RESTART_COUNT", "0")])
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)

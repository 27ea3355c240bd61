"""The command that starts `twa-scale run` on many ranks, as in the scripts of launch/."""

import os
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from twa_scale.errors import ConfigError

Launcher = Literal["torchrun", "deepspeed", "slurm", "mpi"]
_PACKAGE = Path(__file__).parents[1]
_SCRIPTS = (_PACKAGE / "launch_scripts", _PACKAGE.parent / "launch")  # of an installation, and of the sources


@dataclass(frozen=True)
class Launch:
    """The configuration to run, and the number of ranks."""

    config: str
    overrides: list[str] = field(default_factory=list)
    nodes: int = 1
    ranks_per_node: int = 1
    host_file: str | None = None
    rdzv_endpoint: str | None = None

    def command(self, launcher: Launcher) -> list[str]:
        """Return the words of the command line.

        Raises:
            ConfigError: this launcher does not have an option, or several nodes are given without their addresses.
        """
        if self.host_file and launcher not in ("deepspeed", "mpi"):
            raise ConfigError(f"--host-file is for deepspeed and mpi; {launcher} does not use it.")
        if self.rdzv_endpoint and launcher != "torchrun":
            raise ConfigError(f"--rdzv-endpoint is for torchrun; {launcher} does not use it.")
        match launcher:
            case "torchrun":
                return self._torchrun()
            case "deepspeed":
                return self._deepspeed()
            case "mpi":
                return self._mpi()
            case "slurm":
                return self._slurm()

    @property
    def _run(self) -> list[str]:
        return ["twa_scale", "run", self.config, *self.overrides]

    def _torchrun(self) -> list[str]:
        nodes = ["--standalone"]
        if self.nodes > 1:
            if not self.rdzv_endpoint:
                raise ConfigError(
                    f"torchrun on {self.nodes} nodes must be started on each node, with the same rendezvous: add "
                    "--rdzv-endpoint HOST:PORT, where HOST is one of the nodes. slurm and mpi do not need it."
                )
            name = self.rdzv_endpoint
            nodes = [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={name}", f"--rdzv-id={name}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, *nodes, f"--nproc-per-node={self.ranks_per_node}", "-m", *self._run]

    def _deepspeed(self) -> list[str]:
        nodes = []
        if self.nodes > 1:
            if not self.host_file:
                raise ConfigError(
                    f"deepspeed on {self.nodes} nodes starts ranks over ssh: add --host-file FILE with a line "
                    "`HOST slots=N` for each node."
                )
            nodes = [f"--hostfile={self.host_file}", f"--num_nodes={self.nodes}"]
        # DeepSpeed's own default is one port for all jobs of a host.
        ranks = [f"--num_gpus={self.ranks_per_node}", f"--master_port={_free_port()}"]
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*deepspeed, *nodes, *ranks, "--no_local_rank", "--module", *self._run]

    def _mpi(self) -> list[str]:
        hosts = ["--hostfile", self.host_file] if self.host_file else []
        ranks = ["-n", str(self.nodes * self.ranks_per_node)]
        if self.nodes > 1:
            ranks += ["--map-by", f"ppr:{self.ranks_per_node}:node"]
        # If ranks were bound to one core, their threads would share it. If they were unbound, all would use all cores.
        threads = ["--bind-to", "none", "-x", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}"]
        return [_program_path("mpirun"), *ranks, *hosts, *threads, sys.executable, "-m", *self._run]

    def _slurm(self) -> list[str]:
        script = next(folder for folder in _SCRIPTS if folder.is_dir()) / "slurm.sbatch"
        ranks = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.ranks_per_node}"]
        python = f"--export=ALL,PYTHON={sys.executable}"  # the Python of the submitting shell may not have twa_scale
        return [_program_path("sbatch"), *ranks, python, str(script), self.config, *self.overrides]


def execute(command: list[str]) -> NoReturn:
    """Replace this process by the command, so that signals and the exit code are those of the command.

    Raises:
        ConfigError: the command is not installed.
    """
    if shutil.which(command[0]) is None:
        packages = {"mpirun": "Open MPI (Debian: openmpi-bin)", "sbatch": "SLURM (Debian: slurm-client)"}
        raise ConfigError(f"{command[0]} is not installed: it comes with {packages[command[0]]}.")
    sys.stdout.flush()
    os.execv(command[0], command)


def shown(command: list[str]) -> str:
    """Return the command as one line for a shell."""
    return shlex.join(command)


def _program_path(program: str) -> str:
    """Return the path of a program, or its name if it is not installed, because the command may be for another host."""
    return shutil.which(program) or program


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

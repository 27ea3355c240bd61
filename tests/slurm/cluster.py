"""A real SLURM with two nodes on this machine, in a directory of its own: munge, a controller, two node daemons."""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
PACKAGES = "slurm-wlm munge"
NODES = ("n1", "n2")
# A whole node belongs to one job. A job of partition `urgent` requeues one of `main` after a period of grace.
CONFIGURATION = """
ClusterName=test
SlurmUser=root
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmctldSyslogDebug=quiet
SlurmdSyslogDebug=quiet
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9
"""


class Cluster:
    """Starts the daemons. `close` ends them and all remaining processes of their jobs by process id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a user, without the variables of a job or launcher around the tests."""
        local = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "MUNGE_"))}
        return local | {"SLURM_CONF": str(self.configuration), "PATH": _path()}

    def call(
        self,
        *words: object,
        cwd: Path | None = None,
        timeout: float = 60.0,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run a command with these variables added to the environment, and return its output.

        Raises:
            AssertionError: it failed; with what it said.
        """
        ended = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **variables},
            cwd=cwd,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ended.returncode == 0, f"{' '.join(map(str, words))}: {ended.returncode}\n{ended.stdout}"
        return ended.stdout.strip()

    def job(self, job: str) -> Mapping[str, str]:
        """Return what the controller reports about a job."""
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, look: Callable[[], T | None], timeout: float, said: Callable[[], str] = str) -> T:
        """Return the first true answer of `look`.

        Raises:
            TimeoutError: there was none; with the last lines of all logs and what `said` returns.
        """
        deadline = time.monotonic() + timeout
        while not (actual := look()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not in {timeout:.0f} s\n{self._logs()}\n{said()}")
            time.sleep(0.1)
        return actual

    def close(self) -> None:
        """Kill all processes. No state needs to be saved."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        self._daemons = []
        while strays := self._strays():
            for pid in strays:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _start(self) -> None:
        directory, host = self.directory, socket.gethostname().split(".")[0]
        (directory / "state").mkdir(parents=True)
        self.configuration.write_text(CONFIGURATION.format(host=host, directory=directory, ports=_free_ports(3)))
        key = directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={directory}/munge.{ending}" for option, ending in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self.until(lambda: (directory / "munge.socket").exists(), 20)
        self._daemon("slurmctld", "-D", "-f", str(self.configuration))
        for node in NODES:
            (directory / node).mkdir()
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.configuration))
        self.until(self._nodes_are_idle, 60)

    def _daemon(self, *words: str) -> None:
        with (self.directory / f"{words[0]}-{len(self._daemons)}.log").open("wb") as log:
            command = ["setpriv", "--pdeathsig", "KILL", *words]  # it must end with this process, even if it is killed
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _nodes_are_idle(self) -> bool:
        for daemon in self._daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args!r} ended with {daemon.returncode}\n{self._logs()}")
        try:
            return self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(NODES)
        except AssertionError:  # the controller does not listen yet
            return False

    def _logs(self) -> str:
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-20:]) for log in logs)

    def _strays(self) -> list[int]:
        """Return the processes of jobs, whose environment has this configuration."""
        mark = f"SLURM_CONF={self.configuration}".encode()
        actual = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or belongs to another user
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    actual.append(int(process.name))
        return actual


def missing_programs() -> list[str]:
    """Return the programs of SLURM that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now, below those that the kernel assigns."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports

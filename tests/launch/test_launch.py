"""`launch` prints the command that it runs, refuses invalid settings, and is equivalent to the scripts in launch/.

That of DeepSpeed is in tests/commands/test_deepspeed.py.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.commands import small_runs
from tests.commands.conftest import CommandResult, TrainedCandidates, shell
from tests.commands.small_runs import load, run_here, settings
from twa_scale.tools.launch import Launch, shown

__all__ = ["shell"]  # the fixture

ROOT = Path(__file__).resolve().parents[2]
RUN = ["-m", "twa_scale", "run"]
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> TrainedCandidates:
    return TrainedCandidates(
        small_runs.SCORES, small_runs.train_candidates(small_runs.SCORES, tmp_path_factory.mktemp("scores"))
    )


@pytest.fixture(scope="module")
def alone(scores: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("alone")
    run_here(settings(scores.candidates, scores.task, output))
    return load(output / "average")


@pytest.fixture
def config(scores: TrainedCandidates, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(scores.candidates, scores.task, tmp_path / "out", engine="fsdp2")))
    return path


STARTS = {
    "torchrun": [sys.executable, "-m", "twa_scale", "launch", "--with", "torchrun", "--ranks-per-node", "2"],
    "mpi": ["launch/mpirun.sh"],
}


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        pytest.param("torchrun", "engine=fsdp2", marks=pytest.mark.slow),
        pytest.param("mpi", "comm=mpi", marks=pytest.mark.slow),  # tests/mpi starts others
    ],
)
def test_two_ranks(launcher: str, settings: str, config: Path, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    variables = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"} | MPI
    ended = subprocess.run(
        [*STARTS[launcher], str(config), "steps=4", settings],
        cwd=ROOT,
        env=os.environ | variables,
        timeout=400,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["ranks"] == 2 and summary["steps"] == 4
    assert not list((tmp_path / "out").glob(".*"))
    for name, value in load(tmp_path / "out/average").items():
        assert float((value - alone[name]).norm()) <= 2e-6 * float(alone[name].norm()), name


@pytest.mark.slow
def test_failing_run_under_mpirun_reports_once(config: Path, tmp_path: Path) -> None:
    """All ranks raise the same error. The rank that prints it is not ended before it has printed."""
    words = ["mpirun", "-n", "2", sys.executable, *RUN, str(config), "batch_size=13"]
    ended = subprocess.run(words, cwd=ROOT, env=os.environ | MPI, timeout=400, capture_output=True, text=True)
    assert ended.returncode != 0
    assert ended.stderr.count("bad configuration: batch_size: 13 examples") == 1, ended.stderr
    assert "Traceback" not in ended.stderr


# The printed command


def printed(launcher: str, **options: Any) -> list[str]:
    return Launch("run.yaml", ["steps=2"], **options).command(launcher)  # type: ignore[arg-type]


def test_torchrun() -> None:
    start = [sys.executable, "-m", "torch.distributed.run"]
    run = [*RUN, "run.yaml", "steps=2"]
    assert printed("torchrun", ranks_per_node=8) == [*start, "--standalone", "--nproc-per-node=8", *run]
    meet = ["--nnodes=4", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400", "--rdzv-id=n1:29400"]
    assert printed("torchrun", nodes=4, rdzv_endpoint="n1:29400") == [*start, *meet, "--nproc-per-node=1", *run]


def test_mpirun() -> None:
    command = printed("mpi", nodes=2, ranks_per_node=4, host_file="hosts")
    assert Path(command[0]).name == "mpirun"
    assert command[1:7] == ["-n", "8", "--map-by", "ppr:4:node", "--hostfile", "hosts"]
    assert command[-6:] == [sys.executable, *RUN, "run.yaml", "steps=2"]


def test_slurm() -> None:
    command = printed("slurm", nodes=2, ranks_per_node=4)
    assert Path(command[0]).name == "sbatch" and command[1:3] == ["--nodes=2", "--ntasks-per-node=4"]
    assert command[3] == f"--export=ALL,PYTHON={sys.executable}"
    assert Path(command[4]).read_text().startswith("#!") and command[5:] == ["run.yaml", "steps=2"]


def test_deepspeed_uses_a_new_port_each_time() -> None:
    ports = [word for _ in range(2) for word in printed("deepspeed") if word.startswith("--master_port=")]
    assert len(set(ports)) == 2 and "--master_port=29500" not in ports


def test_printed_command_is_valid_in_a_shell(shell: Any, config: Path) -> None:
    words = ["launch", config, "task.text=[a b, 'c']", "steps=2", "--ranks-per-node", 2, "--dry-run"]
    result: CommandResult = shell(*words)
    assert result.code == 0 and result.out.count("\n") == 1
    expected = Launch(str(config), ["task.text=[a b, 'c']", "steps=2"], ranks_per_node=2).command("torchrun")
    assert shlex.split(result.out) == expected and shown(expected) == result.out.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stps=2"], "did you mean 'steps'"),
        (["--with", "slurm", "stps=2"], "did you mean 'steps'"),
        (["--nodes", "2"], "--rdzv-endpoint HOST:PORT"),
        (["--with", "deepspeed", "--nodes", "2"], "--host-file FILE"),
        (["--host-file", "hosts"], "--host-file is for deepspeed and mpi"),
        (["--with", "slurm", "--rdzv-endpoint", "n1:1"], "--rdzv-endpoint is for torchrun"),
    ],
)
def test_invalid_launches_are_refused_before_start(shell: Any, config: Path, words: list[str], message: str) -> None:
    result = shell("launch", config, *words)
    assert result.code == 2 and message in result.err and result.out == ""


def test_missing_launcher(shell: Any, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for launcher, package in {"mpi": "openmpi-bin", "slurm": "slurm-client"}.items():
        result = shell("launch", config, "--with", launcher)
        assert result.code == 2 and package in result.err
        result = shell("launch", config, "--with", launcher, "--dry-run")  # for another machine
        assert result.code == 0 and shlex.split(result.out) == Launch(str(config)).command(launcher)  # type: ignore[arg-type]


# The scripts


@pytest.mark.parametrize(
    ("script", "variables", "launcher", "options"),
    [
        ("torchrun", {"NPROC": "4"}, "torchrun", {"ranks_per_node": 4}),
        (
            "torchrun",
            {"NPROC": "4", "NNODES": "2", "RDZV_ENDPOINT": "n1:29400"},
            "torchrun",
            {"ranks_per_node": 4, "nodes": 2, "rdzv_endpoint": "n1:29400"},
        ),
        ("deepspeed", {"NPROC": "4"}, "deepspeed", {"ranks_per_node": 4}),
        (
            "deepspeed",
            {"NPROC": "4", "NNODES": "2", "HOSTFILE": "hosts"},
            "deepspeed",
            {"ranks_per_node": 4, "nodes": 2, "host_file": "hosts"},
        ),
        ("mpirun", {"NPROC": "4"}, "mpi", {"ranks_per_node": 4}),
        (
            "mpirun",
            {"NPROC": "8", "PER_NODE": "4", "HOSTFILE": "hosts"},
            "mpi",
            {"ranks_per_node": 4, "nodes": 2, "host_file": "hosts"},
        ),
    ],
)
def test_script_runs_the_printed_command(
    script: str, variables: dict[str, str], launcher: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The program is replaced by one that records its arguments."""
    recorder = tmp_path / "mpirun"
    recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    recorder.chmod(0o755)
    python = sys.executable if script == "mpirun" else str(recorder)
    environment = {"PATH": f"{tmp_path}:{os.defpath}", "PYTHON": python, "MASTER_PORT": "1"} | variables
    words = [str(ROOT / "launch" / f"{script}.sh"), "run.yaml", "steps=2"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    expected = [
        "--master_port=1" if word.startswith("--master_port") else word for word in printed(launcher, **options)[1:]
    ]
    assert ended.stdout.splitlines() == expected
